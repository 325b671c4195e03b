"""Internal: what it refuses, and options that are set in the training; its hosts are tested with these."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import XLNetConfig, XLNetForSequenceClassification

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


def test_the_weight_of_the_task_is_gold_in_a_composition_too():
    batch = tiny_tokens(1)[0]
    distiller = create_distiller("kd+internal", alpha=0.5, gold=0.5, schedule="stacked")
    nets = bind(distiller, tiny_transformer(2).eval(), tiny_transformer(4), batch=batch, total_steps=6)
    for stage, weight in ((0, 0.0), (2, 0.25)):
        distiller.progress.stage = stage
        (turn,) = distiller.turns(nets, batch)
        assert ("task" in turn["student"]) == bool(weight)
    torch.testing.assert_close(turn["student"]["task"], 0.25 * batch.task_loss(nets.student(batch)))


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


@pytest.mark.parametrize("masked", [True, False])
def test_hidden_states_with_the_tokens_first_are_refused(masked):
    def xlnet(layers: int) -> XLNetForSequenceClassification:
        config = XLNetConfig(vocab_size=40, d_model=16, n_layer=layers, n_head=2, d_inner=24, num_labels=3)
        return XLNetForSequenceClassification(config)

    (batch,) = tiny_tokens(1)
    if masked:
        batch = dataclasses.replace(batch, mask=torch.ones_like(batch.inputs))
    else:
        batch = dataclasses.replace(batch, mask=None, kwargs={})
    distiller = create_distiller("internal", schedule="all")
    with pytest.raises(
        DistillError, match=r"layer 1 of XLNetForSeq.* gives \[8, 4, 16\], tokens first.*hidden_weight=0"
    ):
        bind(distiller, xlnet(2), xlnet(4), batch=batch)
    distiller = create_distiller("internal", schedule="all", hidden_weight=0.0)
    nets = bind(distiller, xlnet(2), xlnet(4), batch=batch)
    (turn,) = distiller.turns(nets, batch)
    assert turn["student"]["kl_attention"] > 0


def test_texts_that_begin_with_padding_have_no_vector_to_compare():
    (batch,) = tiny_tokens(1)
    left = dataclasses.replace(batch, mask=batch.mask.flip(1), kwargs={"attention_mask": batch.mask.flip(1)})
    with pytest.raises(DistillError, match=r"first token, \[CLS\], and texts of this batch begin with padding: pad on"):
        bind(create_distiller("internal"), tiny_transformer(2), tiny_transformer(4), batch=left, total_steps=6)
    bind(
        create_distiller("internal", hidden_weight=0.0),
        tiny_transformer(2),
        tiny_transformer(4),
        batch=left,
        total_steps=6,
    )


def test_a_student_layer_has_one_teacher_layer():
    with pytest.raises(DistillError, match="one teacher layer for each student layer, got '1:2,1:3'"):
        create_distiller("internal", layers="1:2,1:3")
