"""What holds for every method as it trains: networks of another precision than its parts, options that change."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from kd_plugins import Batch, DistillError, bind, create_distiller, get_distiller, make_optimizers
from kd_plugins.catalog.installed import entries_by_name, known_rows
from kd_plugins.testing import TinyNet, tiny_batches
from kd_plugins.testing.networks import tiny_network, training_set


def in_half(batch: Batch) -> Batch:
    inputs, streams = batch.inputs, {name: in_half(other) for name, other in batch.streams.items()}
    if inputs is not None and inputs.is_floating_point():
        inputs = inputs.bfloat16()
    return dataclasses.replace(batch, inputs=inputs, streams=streams)


OURS = [name for name, entries in sorted(entries_by_name().items()) if entries[0].value in known_rows()]
OPTIONS: dict[str, dict[str, Any]] = {
    "afd": {"layer": "layer2"},
    "dafl+fitnet": {"layers": ("layer1",)},
    "dfa": {"layers": ("layer1", "layer2"), "teacher_layers": ("conv1+layer1", "layer2")},
    "internal": {},
}


@pytest.mark.parametrize("name", [*OURS, "dafl+fitnet"])
def test_networks_in_bfloat16(name: str) -> None:
    """A model may come in the precision that its weights were kept in; the parts of a method are in float32."""
    options = {} if "+" in name else dict(get_distiller(name).example)
    if "layers" in create_distiller(name, **options).config:
        options["layers"] = ("layer1", "layer2")
    options = OPTIONS.get(name, options)
    distiller = create_distiller(name, **options)
    student, teacher = (tiny_network(distiller, i).bfloat16() for i in (0, 1))
    batches = [in_half(batch) for batch in training_set(distiller)]
    peers = [teacher] if distiller.peers else []
    start: Any = dict(batch=batches[0], batches=batches, total_steps=6, epoch_steps=1)
    nets = bind(distiller, student, None if peers else teacher, peers=peers, **start)
    run = make_optimizers(distiller, torch.optim.SGD(student.parameters(), lr=0.001), nets)
    for step in range(6):
        assert run.step(batches[step % len(batches)]).isfinite()
    assert all(p.dtype == torch.bfloat16 for p in student.parameters())


@pytest.mark.parametrize(
    ("name", "option"),
    [("structured", "holistic"), ("ksanc", "adversarial_weight"), ("ksanc", "class_weight"), ("ksanc", "weight")],
)
def test_an_option_whose_part_was_left_out_stays_0(name: str, option: str) -> None:
    dense = name == "structured"
    student, teacher, (batch,) = TinyNet(4, dense=dense), TinyNet(6, dense=dense), tiny_batches(1, dense=dense)
    distiller = create_distiller(name, layers=("layer2",), **{option: 0.0})
    nets = bind(distiller, student, teacher, batch=batch, total_steps=10)
    setattr(distiller, option, 0.5)
    with pytest.raises(DistillError, match=f"{option} was 0 when {name} was set up: begin with a value above 0"):
        list(distiller.turns(nets, batch))


@pytest.mark.parametrize(("name", "group"), [("structured", "critic"), ("ksanc", "discriminator")])
def test_a_part_whose_weight_falls_to_0_stays_in_its_group(name: str, group: str) -> None:
    dense = name == "structured"
    student, teacher, (batch,) = TinyNet(4, dense=dense), TinyNet(6, dense=dense), tiny_batches(1, dense=dense)
    option = "holistic" if dense else "adversarial_weight"
    distiller = create_distiller(name, layers=("layer2",))
    bind(distiller, student, teacher, batch=batch, total_steps=10)
    own = len(distiller.own_parameters())
    setattr(distiller, option, 0.0)
    assert group in distiller.extras()
    assert len(distiller.own_parameters()) == own
