"""Knowledge distillation that plugs into the training code people already have."""

from kd_plugins.binding import bind
from kd_plugins.catalog.options import OptimSpec
from kd_plugins.catalog.paper import Paper
from kd_plugins.catalog.registry import create_distiller, get_distiller, list_distillers
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
