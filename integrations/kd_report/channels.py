"""The channels of two networks' maps as points of one plane: what neuron selectivity transfer brings together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["common_maps", "project_channels"]

_POINTS = 256


def common_maps(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The deepest layers whose maps have the same height and width, above one position.

    Args:
        student: Maps `[B, C, H, W]` by layer, in the order of the network; other shapes are passed over.
        teacher: The same of the other network.

    Returns:
        The student's and the teacher's layer, or None where no two sizes are equal.

    >>> maps = {"a": torch.zeros(1, 2, 8, 8), "b": torch.zeros(1, 4, 4, 4), "c": torch.zeros(1, 4, 1, 1)}
    >>> common_maps(maps, {"x": torch.zeros(1, 3, 8, 8), "y": torch.zeros(1, 3, 4, 4)})
    ('b', 'y')
    """
    last = {x.shape[2:]: layer for layer, x in teacher.items() if x.dim() == 4}
    for layer, x in reversed(list(student.items())):
        if x.dim() == 4 and x[0, 0].numel() > 1 and x.shape[2:] in last:
            return layer, last[x.shape[2:]]
    return None


def project_channels(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Channels of maps, each scaled to length 1, in the plane of the teacher's two main directions.

    The plane is the teacher's alone (principal components of its channels, for each example), so that pictures made
    before and after a training share it. At most 256 channels of a network are kept, evenly spaced.

    Args:
        student: Maps `[B, C_s, H, W]`.
        teacher: Maps `[B, C_t, H, W]`.

    Returns:
        The student's points `[B, C_s, 2]` and the teacher's points `[B, C_t, 2]`.
    """
    ours, theirs = (F.normalize(x.flatten(2).float(), dim=2).cpu() for x in (student, teacher))
    centre = theirs.mean(1, keepdim=True)
    plane = torch.linalg.svd(theirs - centre, full_matrices=False).Vh[:, :2]
    # A component's sign is arbitrary; its largest entry shall be positive, on every machine.
    largest = plane.gather(2, plane.abs().argmax(2, keepdim=True))
    plane = (plane * largest.sign()).mT
    if plane.shape[2] < 2:  # One channel, or two positions, span no plane.
        plane = F.pad(plane, (0, 2 - plane.shape[2]))
    return _some((ours - centre) @ plane), _some((theirs - centre) @ plane)


def _some(points: Tensor) -> Tensor:
    step = -(-points.shape[1] // _POINTS)
    return points[:, ::step].contiguous()
