"""kd-timm-train: timm's training recipe on Accelerate, alone or with knowledge distillation."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from typing import Any

from accelerate.utils import broadcast_object_list
from timm.utils import distribute_bn, setup_default_logging

from kd_accelerate.command import run_command
from kd_plugins import DistillError
from kd_report.uncertainty import Doubts, dirichlet_offset
from kd_timm.arguments import parse_args
from kd_timm.checkpoint import Summary, load_weights, write_json
from kd_timm.engine import evaluate, train_one_epoch
from kd_timm.layers import list_layers
from kd_timm.parts import Parts
from kd_timm.recording import Recorder
from kd_timm.resume import load_state, save_state
from kd_timm.uncertainty import judge


def main(argv: Sequence[str] | None = None) -> int:
    """The command: parses, trains, and turns what a user can mend into one line on stderr.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        Exit status.
    """
    if not logging.getLogger().handlers:
        setup_default_logging()
    args = parse_args(argv)
    return run_command("kd-timm-train", lambda: print(list_layers(args)) if args.list_layers else train(args))


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Trains as the arguments say.

    Args:
        args: What `parse_args` returned.

    Returns:
        What `results.json` holds: best metric and epoch, the final evaluation, time and size.
    """
    return Session(args).fit()


class Session(Parts):
    """One run from its arguments to its results."""

    def fit(self) -> dict[str, Any]:
        """Trains to the end, or to an interrupt, and evaluates the best student."""
        start = load_state(self) if self.state is not None else 0
        self.summary = Summary(self.folder / "summary.csv", start)
        self.reporter.line(
            f"{self.args.model}: {sum(p.numel() for p in self.student.parameters()):,} parameters,"
            f" {self.epochs} epochs of {self.updates_per_epoch} updates, output in {self.folder}"
        )
        self.recorder = Recorder(self, start)
        try:
            for epoch in range(start, self.epochs):
                self._epoch(epoch)
            results = self._finish()
        except KeyboardInterrupt:
            self.reporter.end()
            self.recorder.interrupted()
            self.reporter.line(f"Interrupted; continue with --resume {self.folder}")
            return {}
        finally:
            for tracker in self.accelerator.trackers:
                tracker.finish()
        self.accelerator.wait_for_everyone()
        return results

    def _epoch(self, epoch: int) -> None:
        args = self.args
        self.enter_stage()
        done = epoch - self.stage_start
        began = time.monotonic()
        training = train_one_epoch(self, epoch, self.reporter, first_update=done * self.updates_per_epoch)
        self.seconds += time.monotonic() - began
        self.updates += self.updates_per_epoch
        rate = self.rate
        if self.processes > 1 and args.dist_bn in ("broadcast", "reduce"):
            for model in filter(None, (self.student, self.ema)):
                distribute_bn(model, self.processes, args.dist_bn == "reduce")
            if self.distillation is not None:
                self.distillation.player.average_buffers()
        if (epoch + 1) % args.val_interval and epoch + 1 != self.epochs:
            if self.primary:
                self.recorder.epoch(epoch, training, {}, rate)
            if self.scheduler is not None:
                self.scheduler.step(done + 1, None)
            return
        evaluation = {} if self.data.evaluation is None else self._evaluate()
        metric = epoch if self.metric == "epoch" else (evaluation or training)[self.metric]
        evaluation |= self.peers.evaluate(self, self.evaluated, epoch)
        if self.scheduler is not None:
            self.scheduler.step(done + 1, metric)
        if self.primary:
            self.accelerator.log(self.summary.add(epoch, training, evaluation, rate), step=epoch)
            self.recorder.epoch(epoch, training, evaluation, rate)
            self.checkpoints.save(self.evaluated, epoch, metric)
        shown = "  ".join(f"{key} {value:.4g}" for key, value in evaluation.items())
        self.reporter.line(f"epoch {epoch}: train loss {training['loss']:.4g}  {shown}")
        save_state(self, epoch + 1)

    def _evaluate(self) -> dict[str, float]:
        """Evaluates what is exported, through the compiled model where there is one."""
        if self.ema is not None:
            return evaluate(self, self.ema.module)
        return evaluate(self, self.accelerator.unwrap_model(self.model, keep_torch_compile=True))

    def _finish(self) -> dict[str, Any]:
        args = self.args
        results: dict[str, Any] = {"model": args.model, "epochs": self.epochs}
        found: dict[str, Doubts] = {}
        best = broadcast_object_list([self.checkpoints.best])[0]
        if best is None:
            raise DistillError(f"--epochs {self.epochs} leaves nothing to train: raise it.")
        results |= {"metric": self.metric, "best_metric": best[0], "best_epoch": best[1]}
        exported = self.folder / "model_best.safetensors"
        if self.data.evaluation is not None:
            if args.best_on_eval:
                results["last_evaluation"] = evaluate(self, self.evaluated)
                last = "  ".join(f"{key} {value:.4g}" for key, value in results["last_evaluation"].items())
                self.reporter.line(f"last epoch  {last}")
            load_weights(self.evaluated, exported)
            others = [] if self.distillation is None else self.distillation.asked()
            distiller = None if self.distillation is None else self.distillation.distiller
            offset = dirichlet_offset(distiller, args.num_classes)
            results["evaluation"], uncertain, found = judge(self, self.evaluated, others, offset)
            # With --bce-loss each class has a sigmoid of its own, and the classes no distribution.
            results |= {} if args.bce_loss else {"uncertainty": uncertain}
        if self.peers.names:
            results["peers"], theirs = self.peers.finish(self, self.evaluated)
            found |= theirs
        results |= {
            "parameters": sum(p.numel() for p in self.student.parameters()),
            "bytes": exported.stat().st_size,
            "seconds_per_step": self.seconds / max(self.updates, 1),
        }
        if self.primary:
            write_json(self.folder / "results.json", results)
            if self.distillation is not None:
                self.distillation.distiller.export(self.folder)
            self.recorder.finish(results, found)
        final = "  ".join(f"{key} {value:.4g}" for key, value in results.get("evaluation", {}).items())
        self.reporter.line(f"best {self.metric} {best[0]:.4g} (epoch {best[1]})  {final}  {exported}")
        return results


if __name__ == "__main__":
    raise SystemExit(main())
