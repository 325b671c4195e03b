"""Which hosts can train with a method, told by what it needs."""

from __future__ import annotations

from kd_plugins.distiller import Distiller, overrides

__all__ = ["HOSTS", "refusals"]

HOSTS = {
    "bare": "a loop of your own",
    "accelerate": "kd_accelerate.TurnPlayer",
    "transformers": "DistillationTrainer and kd-transformers-train",
    "timm": "kd-timm-train",
    "timm-task": "kd_timm.DistillationTask, in timm's own train.py",
}
"""The hosts, by the names in `kd-plugins list`."""


def refusals(distiller: Distiller) -> dict[str, str]:
    """Why a host cannot train with a method, by host; the first reason, as what follows the method's name.

    What only set-up tells (groups of parts that do not exist before it) is left to the hosts.
    """
    needs = distiller.needs()
    classifies = ("does not fit classification", "classification" not in distiller.tasks)
    reasons = {
        "transformers": [("makes its own data", not distiller.data)],
        "timm": [classifies],
        "timm-task": [
            classifies,
            ("trains several networks together", distiller.peers),
            ("makes its own data", not distiller.data),
            ("trains in several stages", len(distiller.stages()) > 1),
            ("reads held-out streams", bool(needs.streams)),
            ("reads row numbers", needs.index),
            ("passes over the training data first", overrides(distiller, "prepare")),
            ("has optimizers of its own", _has_groups(distiller)),
        ],
    }
    found = {host: next((text for text, holds in given if holds), "") for host, given in reasons.items()}
    return {host: reason for host, reason in found.items() if reason}


def _has_groups(distiller: Distiller) -> bool:
    """Whether a method has groups beside the student's; one whose `extras()` misses what set-up builds has."""
    try:
        return bool(distiller.extras())
    except AttributeError:
        if distiller.ready:
            raise
        return True
