"""F1 score, as the module of the same name on the hub computes it, without a network."""

from typing import Any

import datasets
import evaluate
from sklearn.metrics import f1_score

_CITATION = """@article{scikit-learn,
  title={Scikit-learn: Machine Learning in {P}ython},
  author={Pedregosa, F. and others},
  journal={Journal of Machine Learning Research},
  volume={12},
  pages={2825--2830},
  year={2011}
}"""


class F1(evaluate.Metric):  # type: ignore[misc]
    """F1 score."""

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value("int32")
        if self.config_name == "multilabel":
            value = datasets.Sequence(value)
        return evaluate.MetricInfo(
            description="F1 score.",
            citation=_CITATION,
            inputs_description="predictions and references, lists of the same length.",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(
        self,
        predictions: Any,
        references: Any,
        labels: Any = None,
        pos_label: int = 1,
        average: Any = "binary",
        sample_weight: Any = None,
    ) -> dict[str, Any]:
        options = {"labels": labels, "pos_label": pos_label, "average": average, "sample_weight": sample_weight}
        score = f1_score(references, predictions, **options)
        return {"f1": float(score) if getattr(score, "size", 1) == 1 else score}
