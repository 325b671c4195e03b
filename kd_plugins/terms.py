"""Loss terms by name, and what may be wrong with an author's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kd_plugins.errors import DistillError

Terms = dict[str, Tensor]
"""Loss terms by name; they are summed, and logged under their names."""
Turn = Mapping[str, Mapping[str, Tensor]]
"""Loss terms of each group of parameters that one turn updates."""


def check_terms(terms: Any, where: str, *, scalars: bool = True) -> None:
    """Refuses what is no mapping of names to tensors, each with one number where `scalars` says so."""
    if not isinstance(terms, Mapping):
        raise DistillError(
            f'Expected the terms of {where} by name, {{"name": term}}, got {type(terms).__name__}: give each a name.'
        )
    for name, term in terms.items() if scalars else ():
        if not isinstance(term, Tensor) or term.numel() != 1:
            got = f"shape {list(term.shape)}" if isinstance(term, Tensor) else type(term).__name__
            raise DistillError(f"Expected the term {name!r} of {where} as a tensor of one number, got {got}: mean()?")


def check_taught(terms: Any, method: str) -> None:
    """Refuses terms of a method's `loss` that have no names, or none with a gradient where there should be one."""
    check_terms(terms, f"loss() of {method}", scalars=False)
    known = [term for term in terms.values() if isinstance(term, Tensor)]
    if known and torch.is_grad_enabled() and not any(term.requires_grad for term in known):
        raise DistillError(
            f"No term of loss() of {method} has a gradient ({', '.join(terms)}), so it would teach nothing:"
            " compute them from the student's view, without detach() and no_grad(), of layers that train."
        )
