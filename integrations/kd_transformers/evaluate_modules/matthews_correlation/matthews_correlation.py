"""Matthews correlation coefficient, as the module of the same name on the hub computes it, without a network."""

from typing import Any

import datasets
import evaluate
from sklearn.metrics import matthews_corrcoef

_CITATION = """@article{scikit-learn,
  title={Scikit-learn: Machine Learning in {P}ython},
  author={Pedregosa, F. and others},
  journal={Journal of Machine Learning Research},
  volume={12},
  pages={2825--2830},
  year={2011}
}"""


class MatthewsCorrelation(evaluate.Metric):  # type: ignore[misc]
    """Matthews correlation coefficient."""

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value("int32")
        return evaluate.MetricInfo(
            description="Matthews correlation coefficient.",
            citation=_CITATION,
            inputs_description="predictions and references, lists of the same length.",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions: Any, references: Any, sample_weight: Any = None) -> dict[str, float]:
        score = matthews_corrcoef(references, predictions, sample_weight=sample_weight)
        return {"matthews_correlation": float(score)}
