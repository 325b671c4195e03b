"""Internal: what it refuses, and options that are set in the training; its hosts are tested with these."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_contract import bert, token_batches

from kd_plugins import DistillError, bind, create_distiller


def test_options_take_effect_in_the_training():
    distiller = create_distiller("internal", schedule="all")
    batch = token_batches(1)[0]
    nets = bind(distiller, bert(2, seed=0).eval(), bert(4, seed=1), batch=batch)
    (before,) = distiller.turns(nets, batch)
    distiller.gold, distiller.attention_weight, distiller.hidden_weight = 0.1, 0.5, 0.0
    (after,) = distiller.turns(nets, batch)
    assert set(after["student"]) == {"task", "kl_attention", "soft_labels"}
    torch.testing.assert_close(after["student"]["kl_attention"], before["student"]["kl_attention"] / 2)
    torch.testing.assert_close(after["student"]["task"], 0.1 * batch.task_loss(nets.student(batch)))


def test_a_teacher_of_other_tokens_is_refused_where_attention_is_compared():
    batch = token_batches(1)[0]
    batch = dataclasses.replace(batch, teacher_kwargs={"input_ids": batch.inputs.flip(1), **batch.kwargs})
    networks = bert(2, seed=0), bert(4, seed=1)
    with pytest.raises(DistillError, match=r"input_ids of its own.*attention_weight=0"):
        bind(create_distiller("internal", schedule="all"), *networks, batch=batch)
    distiller = create_distiller("internal", schedule="all", attention_weight=0.0)
    bind(distiller, *networks, batch=batch)
    distiller.attention_weight = 1.0
    with pytest.raises(DistillError, match="input_ids of its own"):
        distiller.loss(None, None, batch)
