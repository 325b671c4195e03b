"""Spearman correlation coefficient, as the module of the same name on the hub computes it, without a network."""

from typing import Any

import datasets
import evaluate
from scipy import stats

_CITATION = """@article{scipy,
  title={{SciPy} 1.0: Fundamental Algorithms for Scientific Computing in Python},
  author={Virtanen, Pauli and others},
  journal={Nature Methods},
  volume={17},
  pages={261--272},
  year={2020}
}"""


class Spearmanr(evaluate.Metric):  # type: ignore[misc]
    """Spearman correlation coefficient."""

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value("float32")
        return evaluate.MetricInfo(
            description="Spearman correlation coefficient.",
            citation=_CITATION,
            inputs_description="predictions and references, lists of the same length.",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions: Any, references: Any, return_pvalue: bool = False) -> dict[str, float]:
        score, p_value = stats.spearmanr(references, predictions)
        return {"spearmanr": float(score), **({"p-value": float(p_value)} if return_pvalue else {})}
