"""Accuracy, as the module of the same name on the hub computes it, without a network."""

from typing import Any

import datasets
import evaluate
from sklearn.metrics import accuracy_score

_CITATION = """@article{scikit-learn,
  title={Scikit-learn: Machine Learning in {P}ython},
  author={Pedregosa, F. and others},
  journal={Journal of Machine Learning Research},
  volume={12},
  pages={2825--2830},
  year={2011}
}"""


class Accuracy(evaluate.Metric):  # type: ignore[misc]
    """Accuracy."""

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value("int32")
        if self.config_name == "multilabel":
            value = datasets.Sequence(value)
        return evaluate.MetricInfo(
            description="Accuracy.",
            citation=_CITATION,
            inputs_description="predictions and references, lists of the same length.",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(
        self, predictions: Any, references: Any, normalize: bool = True, sample_weight: Any = None
    ) -> dict[str, float]:
        score = accuracy_score(references, predictions, normalize=normalize, sample_weight=sample_weight)
        return {"accuracy": float(score)}
