"""FitNets: Hints for Thin Deep Nets."""

from __future__ import annotations

from typing import Annotated, Any

from torch import Tensor, nn

from kd_plugins import Batch, Needs, Paper, Reads, Stage, View
from kd_plugins import functional as KF
from kd_plugins.catalog.values import NonNegative, Range
from kd_plugins.distiller import Terms
from kd_plugins.layers import LayerDistiller
from kd_plugins.nn.connectors import hint_regressor

_AUTHORS = "Adriana Romero, Nicolas Ballas, Samira Ebrahimi Kahou, Antoine Chassang, Carlo Gatta, Yoshua Bengio"


class FitNet(LayerDistiller):
    """The student's layer predicts a layer of the teacher, its hint, through a convolution that is trained with it.

    Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv 1412.6550, eq. 3: `|u_h(x) - r(v_g(x))|^2 / 2`
    of maps `[B, C, H, W]`; the regressor r has a kernel as large as the sizes differ, plus one.

    **Departures** The hints join the task loss all along, as in the field's benchmarks: `hint_share` gives the paper's
    two stages. A mean over the entries, not halved; r is linear; a teacher's map larger than r's is averaged down.

    Args:
        weight: Weight of the hints; 100 is that of the authors of CRD for their benchmark, for this mean.
        hint_share: Share of the training, below 1, of the hints alone; the rest is without them. 0 has no stages.
    """

    paper = Paper("FitNets: Hints for Thin Deep Nets", tuple(_AUTHORS.split(", ")), "ICLR", 2015, arxiv="1412.6550")

    def __init__(
        self, *, weight: NonNegative = 100.0, hint_share: Annotated[float, Range(low=0, below=1)] = 0.0, **layers: Any
    ) -> None:
        super().__init__(**layers)

    def stages(self) -> list[Stage]:
        both = [Stage("hints", self.hint_share), Stage("task", 1 - self.hint_share)]
        return both if self.hint_share else super().stages()

    @property
    def task_weight(self) -> float:  # type: ignore[override]
        """0 as long as the student learns from the hints alone."""
        return 0.0 if self.hint_share and self.progress.stage == 0 else 1.0

    def needs(self) -> Needs:
        return Needs(teacher=Reads(False)) if self.hint_share and self.task_weight else super().needs()

    def connect(self, student: Tensor, teacher: Tensor) -> nn.Module:
        return hint_regressor(student, teacher)

    def distance(self, student: Tensor, teacher: Tensor, part: Any, batch: Batch) -> Tensor:
        return KF.feature_l2(*KF.match_spatial(part(student), teacher, "pool"))

    def loss(self, student: View, teacher: View, batch: Batch) -> Terms:
        return {} if self.hint_share and self.task_weight else super().loss(student, teacher, batch)
