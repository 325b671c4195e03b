"""The networks that are trained with the student: evaluated with it, and exported under their own names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from timm.models import safe_model_name
from torch import Tensor, nn

from kd_plugins.evaluation import Answers, Doubts
from kd_timm.checkpoint import load_weights, rank, save_weights
from kd_timm.engine import TrainingRun
from kd_timm.evaluation import evaluate, gathered


class Peers:
    """Follows the peers of a run.

    `peer1-NAME.safetensors`, ... hold the weights of each peer's own best epoch, as `timm.create_model` loads them
    (without an evaluation set, of the newest), `peer1-NAME.json` what `config.json` says of the student.

    Args:
        names: Their models.
        modules: The networks, bare.
        folder: Output folder of the run.
        metric: What makes an epoch the best: `"top1"`, `"top5"`, `"loss"`.
    """

    def __init__(self, names: Sequence[str], modules: Sequence[nn.Module], folder: Path, metric: str) -> None:
        self.names, self.modules = list(names), list(modules)
        self.labels = [f"peer{i}-{safe_model_name(name)}" for i, name in enumerate(names, 1)]
        self.folder, self.metric, self.decreasing = folder, metric, metric == "loss"
        self.best: dict[str, list[float]] = {}

    def evaluate(self, run: TrainingRun, student: nn.Module, epoch: int) -> dict[str, float]:
        """Evaluates and saves the peers after an epoch; called on every process.

        Args:
            run: The run.
            student: The student that is evaluated in this epoch.
            epoch: The epoch that ended.

        Returns:
            The metrics of all peers, such as `peer1-resnet8_top1`, and their agreement with the student.
        """
        found: dict[str, float] = {}
        for label, peer in zip(self.labels, self.modules, strict=True):
            metrics = {} if run.data.evaluation is None else evaluate(run, peer, others=[student])
            found |= {f"{label}_{key}": value for key, value in metrics.items()}
            # Without an evaluation set the newest is exported.
            now, before = [metrics.get(self.metric, 0.0), epoch], self.best.get(label)
            if not metrics or before is None or rank(now, self.decreasing) < rank(before, self.decreasing):
                self.best[label] = now
                if run.accelerator.is_main_process:
                    save_weights(peer, self.path(label))
        return found

    def path(self, label: str) -> Path:
        """The file of a peer."""
        return self.folder / f"{label}.safetensors"

    def finish(self, run: TrainingRun, student: nn.Module) -> tuple[list[dict[str, Any]], dict[str, Doubts]]:
        """Evaluates what was exported, beside the exported student, and leaves the peers with these weights.

        Returns:
            Results, and what `peer1`, ... say of each image.
        """
        best, answers = broadcast_object_list([self.best])[0], Answers()
        results: list[dict[str, Any]] = []
        for i, (name, label, peer) in enumerate(zip(self.names, self.labels, self.modules, strict=True), 1):

            def seen(output: Tensor, labels: Tensor, told: list[Tensor], key: str = f"peer{i}") -> None:
                answers.add(key, output, labels, student=told[0])

            load_weights(peer, self.path(label))
            told = None if run.args.task == "multilabel" else seen
            metrics = {} if run.data.evaluation is None else evaluate(run, peer, others=[student], seen=told)
            about = {"model": name, "file": self.path(label).name, "best_epoch": int(best[label][1])}
            results.append(about | metrics | {"parameters": sum(p.numel() for p in peer.parameters())})
        return results, gathered(answers)
