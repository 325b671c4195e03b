"""kd-timm-train: timm's training recipe on Accelerate, alone or with knowledge distillation."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate.utils import broadcast_object_list
from timm.utils import distribute_bn, setup_default_logging

from kd_accelerate.command import Stopped, run_command, signals
from kd_plugins import DistillError
from kd_plugins.evaluation import Doubts, dirichlet_offset
from kd_plugins.states import slots, taking_up, write_json, writing
from kd_timm.arguments import parse_args
from kd_timm.checkpoint import epoch_row, load_weights, rank
from kd_timm.engine import train_one_epoch
from kd_timm.evaluation import evaluate, judge, listed
from kd_timm.layers import list_layers
from kd_timm.parts import Parts, softmax
from kd_timm.recording import Recorder
from kd_timm.resume import load_checkpoint, load_state, save_state

SAVE_SECONDS = 60.0
"""Seconds from which on an epoch writes the state before its evaluation too, or without one."""


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
    return run_command("kd-timm-train", lambda: print(list_layers(args)) if args.list_layers else Session(args).fit())


class Session(Parts):
    """One run from its arguments to its results."""

    def fit(self) -> dict[str, Any]:
        """Trains to the end, or to an interrupt, and evaluates the best student.

        Returns:
            What `results.json` holds: best metric and epoch, the final evaluation, time and size.
        """
        first, place = self._start()
        # The epoch after the last one of this session.
        self.last = self.args.stop_epoch or self.epochs
        self.saved, self.earlier = time.monotonic(), True
        self.reporter.line(f"Output in {self.folder}")
        self.recorder = Recorder(self, first, begun=bool(place))
        try:
            for epoch in range(first, self.last):
                self._epoch(epoch, place if epoch == first else {})
            results = self._finish()
        except KeyboardInterrupt as stop:
            self.reporter.end()
            self.recorder.record.finish({}, status="interrupted")
            says = "no state had been saved, so there is nothing to continue."
            if slots(self.folder)[1].is_dir():
                says = f"continue where the state was saved last, with --resume {self.folder}"
            self._tell()
            if isinstance(stop, Stopped):
                stop.says = says
                raise
            self.reporter.line(f"Interrupted: {says}")
            return {}
        finally:
            for tracker in self.accelerator.trackers:
                tracker.finish()
        self.accelerator.wait_for_everyone()
        return results

    def _start(self) -> tuple[int, Mapping[str, Any]]:
        """Takes up what `--resume` names; returns the epoch to begin with, and the place in it."""
        args, start, exact = self.args, 0, False
        place: Mapping[str, Any] = {}
        if self.state is not None:
            with taking_up(self.state):
                start, place, exact = load_state(self, self.state)
        elif self.checkpoint:
            start = load_checkpoint(self, self.checkpoint)
            self.summary.read()
        if args.start_epoch is not None:
            start, place, exact = args.start_epoch, {}, False
        # Epochs that are trained again take the place of those before.
        self.summary.rows = [row for row in self.summary.rows if int(row["epoch"]) < start]
        self.checkpoints.kept = [kept for kept in self.checkpoints.kept if kept[1] < start]
        # The plateau schedule alone is no function of the epoch.
        done = start - self.stage_start
        if self.scheduler is not None and (start > 0 or place) and not exact and args.sched != "plateau":
            if args.sched_on_updates:
                within = place["sums"][0] if "sums" in place else self.updates_per_epoch if place else 0
                self.scheduler.step_update(done * self.updates_per_epoch + within)
            else:
                self.scheduler.step(done)
        return start, place

    def _train_epoch(self, epoch: int, place: Mapping[str, Any]) -> Mapping[str, float]:
        """Trains an epoch, or what is left of it, and returns its means; a state is written where it took long."""
        args, length = self.args, self.updates_per_epoch
        first_update, averaged = (epoch - self.stage_start) * length, (epoch - self.student_start) * length
        training = train_one_epoch(
            self, epoch, first_update=first_update, averaged=averaged, place=place, save=self._save
        )
        self._forget_earlier()
        if self.processes > 1 and args.dist_bn in ("broadcast", "reduce"):
            self.reporter.line("Distributing BatchNorm running means and vars")
            # The processes cannot exchange what --model-ema-force-cpu keeps from their devices.
            for model in filter(None, (self.student, None if args.model_ema_force_cpu else self.ema)):
                distribute_bn(model, self.processes, args.dist_bn == "reduce")
            if self.distillation is not None:
                self.distillation.player.average_buffers()
        stops = signals.agreed(self.accelerator)
        self.safe = stops or broadcast_object_list([time.monotonic() - self.saved >= SAVE_SECONDS])[0]
        if self.safe:
            self._save(epoch, {"trained": training})
        if stops:
            signals.check()
        return training

    def _epoch(self, epoch: int, place: Mapping[str, Any]) -> None:
        if not place:
            self.enter_stage()
        self.safe = "trained" in place
        with signals.hold():
            training = place["trained"] if self.safe else self._train_epoch(epoch, place)
            # An evaluation of what is saved may be left at once.
            signals.held = not self.safe
            saved = self._conclude(epoch, training)
            if signals.agreed(self.accelerator):
                if not saved:
                    self._save(epoch + 1)
                signals.check()

    def _conclude(self, epoch: int, training: Mapping[str, float]) -> bool:
        """Evaluates an epoch where its turn is, and writes it down; returns whether the state was written."""
        args = self.args
        done, rate = epoch - self.stage_start, self.rate
        if (epoch + 1) % args.val_interval and epoch + 1 not in (self.epochs, self.last, *args.save_epochs):
            self.reporter.line("Skipping eval and checkpointing ")
            if self.primary:
                self.recorder.epoch(epoch, epoch_row(training, {}, rate))
            if self.scheduler is not None:
                self.scheduler.step(done + 1, None)
            return False
        evaluation = self._evaluate()
        metric = epoch if self.metric == "epoch" else (evaluation or training)[self.metric]
        evaluation |= self.peers.evaluate(self, self.evaluated, epoch)
        if self.scheduler is not None:
            # That of the plateau follows a measure.
            self.scheduler.step(done + 1, training["loss"] if self.metric == "epoch" else metric)
        if self.primary:
            row = epoch_row(training, evaluation, rate)
            self.accelerator.log(self.summary.add(epoch, row), step=epoch)
            self.recorder.epoch(epoch, row)
            self.checkpoints.save(self.evaluated, epoch, metric)
            if args.checkpoint_format == "both" and self.saver is not None:
                self.saver.save_checkpoint(epoch, metric)
            elif (metric, epoch) in self.checkpoints.kept:
                self.reporter.line(self.checkpoints.told())
        self.told.append({"epoch": epoch, "train": training} | ({"validation": evaluation} if evaluation else {}))
        self._save(epoch + 1)
        if epoch + 1 in args.save_epochs and self.primary:
            milestone = self.folder / f"milestone-{epoch + 1}"
            with writing(milestone):
                shutil.copytree(self.folder / "state", milestone, dirs_exist_ok=True)
            self.reporter.line(f"Saved milestone checkpoint {milestone}")
        return True

    def _save(self, epoch: int, place: Mapping[str, Any] | None = None) -> None:
        self._forget_earlier()
        if place is not None:
            self.check_weights(epoch)
        save_state(self, epoch, place or {})
        self.saved = time.monotonic()

    def _forget_earlier(self) -> None:
        """Removes of an earlier run of this folder what would be taken for this one's: states, results, best epochs."""
        if self.primary and self.earlier:
            (self.folder / "results.json").unlink(missing_ok=True)
            if self.state is not None:
                self.checkpoints.forget_later()
            # A run that goes on needs its states until there is a new one.
            for slot in slots(self.folder) if self.state is None else ():
                shutil.rmtree(slot, ignore_errors=True)
            # The epochs before a checkpoint of timm's are this run's.
            for file in self.folder.glob("checkpoint-*.safetensors") if self.state is self.checkpoint is None else ():
                file.unlink()
        self.earlier = False

    def _evaluate(self) -> dict[str, float]:
        """Evaluates the student, through the compiled model where there is one, and its moving average.

        Returns:
            The metrics of what is exported; where that is the average, the student's own under `raw_...` as well.
        """
        if self.data.evaluation is None:
            return {}
        wrapped = self.task is None and self.distillation is None
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=True) if wrapped else self.student
        raw = evaluate(self, model, label="Test")
        if self.evaluated is self.student:
            return raw
        return evaluate(self, self.evaluated, label="Test (EMA)") | {f"raw_{key}": value for key, value in raw.items()}

    def _finish(self) -> dict[str, Any]:
        args = self.args
        results: dict[str, Any] = {"model": args.model, "epochs": self.last}
        found: dict[str, Doubts] = {}
        best = broadcast_object_list([self.checkpoints.best])[0]
        if best is None:
            raise DistillError(f"--epochs {self.epochs} leaves nothing to train: raise it.")
        results |= {"metric": self.metric, "best_metric": best[0], "best_epoch": best[1]}
        exported = self.folder / "model_best.safetensors"
        if self.data.evaluation is not None:
            if args.best_on_eval:
                results["last_evaluation"] = evaluate(self, self.evaluated)
                self.reporter.line(f"last epoch  {listed(results['last_evaluation'])}")
            load_weights(self.evaluated, exported)
            others = [] if self.distillation is None else self.distillation.asked()
            distiller = None if self.distillation is None else self.distillation.distiller
            offset = dirichlet_offset(distiller, args.num_classes)
            if args.task == "multilabel":
                results["evaluation"] = evaluate(self, self.evaluated)
            else:
                results["evaluation"], uncertain, found = judge(self, self.evaluated, others, offset)
                # With --loss bce each class has a sigmoid of its own, and the classes no distribution but a Dirichlet
                # student's, who does not learn by that loss.
                results |= {"uncertainty": uncertain} if softmax(args) or offset is not None else {}
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
        self.reporter.line(f"*** Best metric: {best[0]} (epoch {best[1]})")
        self.reporter.line(f"{exported}  {listed(results.get('evaluation', {}))}")
        self._tell()
        return results

    def _tell(self) -> None:
        """Prints the best ten epochs of the session, the best one last, as those expect who read timm's output."""
        if not self.primary:
            return

        def place(row: Mapping[str, Any]) -> tuple[float, float]:
            metrics = {"epoch": row["epoch"]} | row.get("validation", row["train"])
            return rank((metrics[self.metric], -row["epoch"]), self.checkpoints.decreasing)

        print(f"--result\n{json.dumps(sorted(self.told, key=place)[:10][::-1], indent=4)}")


if __name__ == "__main__":
    raise SystemExit(main())
