"""Averaging over processes by hand: gradients of any group, batch statistics, and what was made on one process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kd_plugins.host import world


def distributed() -> bool:
    """Whether there is more than one process."""
    return world()[1] > 1


def average_gradients(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
    """The mean of each gradient over the processes.

    The processes first agree which gradients are None everywhere: sets of different sizes would hang or mix up tensors.

    Args:
        gradients: This process's gradients.
        like: The parameters, for the shapes of gradients that only other processes have.

    Returns:
        New tensors, which share one memory for each kind of tensor.
    """
    if not distributed() or not gradients:
        return list(gradients)
    present = torch.tensor([g is not None for g in gradients], dtype=torch.uint8, device=like[0].device)
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    agreed = present.tolist()
    pairs = [(g, p) for g, p, here in zip(gradients, like, agreed, strict=True) if here]
    means = iter(_means([torch.zeros_like(p) if g is None else g for g, p in pairs]))
    return [next(means) if here else None for here in agreed]


def average_buffers(module: nn.Module) -> None:
    """Averages batch statistics, which each process collects on its own batches, as timm's `--dist-bn reduce` does."""
    if distributed():
        names = ("running_mean", "running_var")
        buffers = [b for name, b in module.named_buffers() if name.rpartition(".")[2] in names]
        for buffer, mean in zip(buffers, _means(buffers), strict=True):
            buffer.detach().copy_(mean)


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Gives every process what process 0 holds."""
    if distributed():
        for tensor in tensors:
            dist.broadcast(tensor.data, src=0)


def _means(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The means of tensors over the processes, one message for each kind of tensor; views of what was sent."""
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, tensor in enumerate(tensors):
        kinds.setdefault((tensor.dtype, tensor.device), []).append(i)
    means = list(tensors)
    for same in kinds.values():
        flat = torch.cat([tensors[i].detach().reshape(-1) for i in same])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for i, part in zip(same, flat.split([tensors[i].numel() for i in same]), strict=True):
            means[i] = part.view(tensors[i].shape)
    return means
