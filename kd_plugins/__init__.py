"""Knowledge distillation that plugs into the training code people already have."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_plugins.binding import bind
    from kd_plugins.catalog.installed import list_distillers
    from kd_plugins.catalog.options import OptimSpec
    from kd_plugins.catalog.paper import Paper
    from kd_plugins.catalog.registry import create_distiller, get_distiller
    from kd_plugins.distiller import Distiller
    from kd_plugins.errors import DistillError
    from kd_plugins.functional.dirichlet import Uncertainty, uncertainty
    from kd_plugins.reading.nets import Net, Nets
    from kd_plugins.reading.network import Network
    from kd_plugins.reading.tap import Tap
    from kd_plugins.reading.view import Attention, Batch, Needs, Reads, View
    from kd_plugins.run import Run, make_optimizers, play
    from kd_plugins.stages import Progress, Stage

__version__ = "0.1.0"

__all__ = [
    "Attention",
    "Batch",
    "DistillError",
    "Distiller",
    "Needs",
    "Net",
    "Nets",
    "Network",
    "OptimSpec",
    "Paper",
    "Progress",
    "Reads",
    "Run",
    "Stage",
    "Tap",
    "Uncertainty",
    "View",
    "bind",
    "create_distiller",
    "get_distiller",
    "list_distillers",
    "make_optimizers",
    "play",
    "uncertainty",
]

_PLACES = {
    "binding": "bind",
    "catalog.options": "OptimSpec",
    "catalog.paper": "Paper",
    "catalog.installed": "list_distillers",
    "catalog.registry": "create_distiller get_distiller",
    "distiller": "Distiller",
    "errors": "DistillError",
    "functional.dirichlet": "Uncertainty uncertainty",
    "reading.nets": "Net Nets",
    "reading.network": "Network",
    "reading.tap": "Tap",
    "reading.view": "Attention Batch Needs Reads View",
    "run": "Run make_optimizers play",
    "stages": "Progress Stage",
}


def __getattr__(name: str) -> Any:
    """The public names are imported when they are asked for: a list of methods needs no torch."""
    for place, names in _PLACES.items():
        if name in names.split():
            return getattr(import_module(f"{__name__}.{place}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
