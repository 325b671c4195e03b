"""The small networks and batches that the contract trains with where it is given none."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from kd_plugins import Batch, Distiller, DistillError, Network
from kd_plugins.binding import needs_of_stages
from kd_plugins.reading.network import adapt as adapt_any

_VOCABULARY = 40


class TinyNet(nn.Module):
    """A convolutional classifier of a few hundred weights, without batch statistics or dropout.

    Its stages are `layer1` (the input's size) and `layer2` (half of it); `head` classifies their mean.

    Args:
        width: Channels of `layer1`; `layer2` has twice as many.
        classes: Number of classes K.
        channels: Channels of the images.
        dense: Classify each position of `layer2`'s map.
    """

    def __init__(self, width: int = 4, classes: int = 4, channels: int = 3, dense: bool = False) -> None:
        super().__init__()
        self.dense = dense
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.layer1 = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, C, H, W]` to logits `[B, K]`; dense, `[B, K, H / 2, W / 2]`."""
        features = self.layer2(self.layer1(self.conv1(x).relu()))
        if self.dense:
            return self.head(features.movedim(1, -1)).movedim(-1, 1)
        return self.head(features.mean((2, 3)))


class _TinyNetwork(Network):
    def stages(self) -> list[str]:
        return ["layer1", "layer2"]


def adapt(module: nn.Module) -> Network:
    """The adapter of a network; `TinyNet` has numbered stages."""
    return _TinyNetwork(module) if isinstance(module, TinyNet) else adapt_any(module)


def tiny_transformer(layers: int = 2, classes: int = 3) -> nn.Module:
    """A BERT of a few thousand weights, without dropout, whose attention and hidden states can be read.

    Raises:
        DistillError: transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise DistillError(
            "Expected transformers, of which the contract makes a network for a method that reads transformer layers:"
            " pip install transformers, or give student=, teacher= and batches=."
        )
    from transformers import BertConfig, BertForSequenceClassification

    size = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 16}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=_VOCABULARY, num_hidden_layers=layers, num_labels=classes, **size, **dropout)
    return BertForSequenceClassification(config)


def tiny_batches(
    count: int = 3, size: int = 8, classes: int = 4, *, streams: Sequence[str] = (), seed: int = 0, dense: bool = False
) -> list[Batch]:
    """Batches of noise images `[size, 3, 12, 12]` with labels, row numbers, mean and std, and further streams of them.

    Dense labels are those of a dense `TinyNet`, `[size, 6, 6]`, and the first row of each image is ignored.

    >>> batch = tiny_batches(streams=["search"])[0]
    >>> batch.inputs.shape, batch.stream("search").size
    (torch.Size([8, 3, 12, 12]), 8)
    """
    generator = torch.Generator().manual_seed(seed)

    def images(_: int) -> Batch:
        pixels = torch.randn(size, 3, 12, 12, generator=generator)
        labels = torch.randint(classes, (size, 6, 6) if dense else (size,), generator=generator)
        if dense:
            labels[:, 0] = -100
        task = "segmentation" if dense else "classification"
        return Batch.of(pixels, labels, mean=(0.5,) * 3, std=(0.25,) * 3, task=task)

    return _epoch(images, count, size, streams)


def tiny_tokens(
    count: int = 2, size: int = 4, classes: int = 3, *, streams: Sequence[str] = (), seed: int = 0
) -> list[Batch]:
    """Batches of padded token ids `[size, 8]` with labels and row numbers, and further streams of them."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(_: int) -> Batch:
        lengths = torch.randint(3, 9, (size, 1), generator=generator)
        inputs = {
            "input_ids": torch.randint(1, _VOCABULARY, (size, 8), generator=generator),
            "token_type_ids": torch.randint(2, (size, 8), generator=generator),
            "attention_mask": (torch.arange(8) < lengths).long(),
        }
        return Batch.of(inputs, torch.randint(classes, (size,), generator=generator))

    return _epoch(tokens, count, size, streams)


def _epoch(make: Callable[[int], Batch], count: int, size: int, streams: Sequence[str]) -> list[Batch]:
    def numbered(number: int) -> Batch:
        rows = count * (1 + len(streams)) * size
        return replace(make(number), index=torch.arange(number * size, (number + 1) * size), rows=rows)

    return [
        replace(numbered(i), streams={name: numbered(count * (1 + k) + i) for k, name in enumerate(streams)})
        for i in range(count)
    ]


def _reads_layers(distiller: Distiller) -> bool:
    return any(part.networks == "transformer" for part in distiller.methods.values())


def _dense(distiller: Distiller) -> bool:
    """Whether a method, or a part of a composition, is for segmentation and not for classification."""
    tasks = [part.tasks for part in distiller.methods.values()]
    return any("classification" not in fits and "segmentation" in fits for fits in tasks)


def tiny_network(distiller: Distiller, number: int) -> nn.Module:
    """A network that a method can read; those with other numbers are larger, and initialised differently."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(number)
        if _reads_layers(distiller):
            return tiny_transformer(2 + 2 * number)
        return TinyNet(4 + 2 * number, dense=_dense(distiller))


def training_set(distiller: Distiller) -> list[Batch]:
    """The batches of one epoch, with the streams that a method asks for; without inputs where it makes its own."""
    if not distiller.data:
        return [Batch(size=8, shape=(3, 12, 12), classes=4, mean=(0.5,) * 3, std=(0.25,) * 3)] * 3
    streams = dict.fromkeys(name for needs in needs_of_stages(distiller) for name in needs.streams)
    if _reads_layers(distiller):
        return tiny_tokens(streams=list(streams))
    return tiny_batches(streams=list(streams), dense=_dense(distiller))
