"""Internal: what it refuses, and options that are set in the training; its hosts are tested with these."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kd_plugins import DistillError, bind, create_distiller
from kd_plugins.testing.networks import tiny_tokens, tiny_transformer


def test_options_take_effect_in_the_training():
    distiller = create_distiller("internal", schedule="all")
    batch = tiny_tokens(1)[0]
    nets = bind(distiller, tiny_transformer(2).eval(), tiny_transformer(4), batch=batch)
    (before,) = distiller.turns(nets, batch)
    distiller.gold, distiller.attention_weight, distiller.hidden_weight = 0.1, 0.5, 0.0
    (after,) = distiller.turns(nets, batch)
    assert set(after["student"]) == {"task", "kl_attention", "soft_labels"}
    torch.testing.assert_close(after["student"]["kl_attention"], before["student"]["kl_attention"] / 2)
    torch.testing.assert_close(after["student"]["task"], 0.1 * batch.task_loss(nets.student(batch)))


def test_a_teacher_of_other_tokens_is_refused_where_attention_is_compared():
    batch = tiny_tokens(1)[0]
    batch = dataclasses.replace(batch, teacher_kwargs={"input_ids": batch.inputs.roll(1, 0), **batch.kwargs})
    networks = tiny_transformer(2), tiny_transformer(4)
    with pytest.raises(DistillError, match=r"teacher_input_ids holds other tokens.*attention_weight=0"):
        bind(create_distiller("internal", schedule="all"), *networks, batch=batch)
    distiller = create_distiller("internal", schedule="all", attention_weight=0.0)
    bind(distiller, *networks, batch=batch)
    distiller.attention_weight = 1.0
    with pytest.raises(DistillError, match="teacher_input_ids holds other tokens"):
        distiller.loss(None, None, batch)
