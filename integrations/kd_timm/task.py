"""DistillationTask: a distiller inside timm's own train.py, for those who keep their copy of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from timm.loss import JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import group_parameters
from timm.task import TrainingTask, resolve_classification_loss
from timm.utils import unwrap_model
from torch import Tensor, nn

from kd_plugins import Batch, Distiller, DistillError, Net, Nets, View, create_distiller
from kd_plugins.authors import check_made
from kd_plugins.binding import schedule, set_up
from kd_plugins.catalog.about import refusals
from kd_plugins.distiller import Turn
from kd_timm import build
from kd_timm.network import TimmNetwork, image_batch
from kd_timm.teachers import Teacher, as_teacher, check_classes, check_classifies, connected, create_teacher

_DISTANCE = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)
_SOFTMAX = (nn.CrossEntropyLoss, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy)


class _Trainable(nn.Module):
    """Student and distiller as one module, whose forward is all that DistributedDataParallel has to see.

    Args:
        student: The student.
        distiller: The method; its own parts train with the student.
    """

    def __init__(self, student: nn.Module, distiller: Distiller) -> None:
        super().__init__()
        self.student = student
        self.distiller = distiller

    def forward(self, turns: Iterator[Turn]) -> Turn:
        """The only turn of a step."""
        return next(turns)

    def no_weight_decay(self) -> set[str]:
        """The student's own list, which timm's optimizer factory asks for."""
        names: set[str] = getattr(self.student, "no_weight_decay", set)()
        return {f"student.{name}" for name in names}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Layers of the student for layer decay; the distiller's parts count as its last layer."""
        student: Any = self.student
        layers = group_parameters(student, student.group_matcher(coarse=coarse), reverse=True)
        last = max(layers.values(), default=0)
        return lambda name: layers.get(name.removeprefix("student."), last) if name.startswith("student.") else last


class DistillationTask(TrainingTask):
    """A distiller as a `timm.task.TrainingTask`.

    In timm's train.py it takes the place of `ClassificationTask(model=model, criterion=train_loss_fn, device=device)`:

        task = DistillationTask(model, "nst", "resnet50", criterion=train_loss_fn, device=device)

    The student's and the distiller's parameters are one trainable module, one optimizer and one backward; so methods
    with several turns in a step, stages, held-out streams, peers or optimizers of their own are refused: kd-timm-train
    plays those. Checkpoints hold the bare student, and the distiller's parts as task state.

    Args:
        student_model: The model to train.
        distiller: A distiller, or the name of one.
        teacher_model: A model name of timm, a network, or several of them.
        distiller_args: Options of a distiller that is given by name.
        teacher_checkpoint: Weights of each teacher given by name; none: the published ones.
        criterion: Task loss of scores and targets; created of `criterion_kwargs` when None.
        criterion_kwargs: Arguments of timm's `create_classification_loss`.
        data_config: The loader's data configuration; by default the student's own.
        classes: Names of the student's classes in their order, for teachers that have them in another.
        sample: One batch of normalised images `[B, C, H, W]` for the method to build its parts on; by default noise of
            the configured size.
        total_steps: Updates in the training, for methods that follow its progress.
        device: Where the task runs.
        dtype: Type of the weights.
        verbose: As in timm's tasks.

    Raises:
        DistillError: The method does not fit a single backward, or a teacher does not fit the student.
    """

    def __init__(
        self,
        student_model: nn.Module,
        distiller: Distiller | str,
        teacher_model: str | nn.Module | Sequence[str | nn.Module] | None = None,
        *,
        distiller_args: Mapping[str, Any] | None = None,
        teacher_checkpoint: str | Sequence[str] = (),
        criterion: nn.Module | Callable[..., Tensor] | None = None,
        criterion_kwargs: dict[str, Any] | None = None,
        data_config: Mapping[str, Any] | None = None,
        classes: Sequence[str] | None = None,
        sample: Tensor | None = None,
        total_steps: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        if isinstance(distiller, str):
            distiller = create_distiller(distiller, **(distiller_args or {}))
        elif distiller_args:
            raise DistillError("distiller_args are the options of a distiller given by name: set them on the object.")
        check_made(distiller)
        _check_fit(distiller)
        self.criterion = resolve_classification_loss(criterion, self.device, criterion_kwargs=criterion_kwargs)
        if getattr(student_model, "num_classes", 0) == 1 and isinstance(self.criterion, _SOFTMAX):
            raise DistillError(
                f"The softmax of one class is always 1, so nothing would learn by {type(self.criterion).__name__}: give"
                " a criterion of one logit, or a student with two classes."
            )
        self.config, self.classes = dict(data_config or build.data_config(student_model)), classes
        listed = [teacher_model] if isinstance(teacher_model, (str, nn.Module)) else list(teacher_model or ())
        paths = [teacher_checkpoint] if isinstance(teacher_checkpoint, str) else list(teacher_checkpoint)
        made = [self._teacher(t, paths[i] if i < len(paths) else "", student_model) for i, t in enumerate(listed)]
        # No submodule: a teacher belongs neither in checkpoints nor in the optimizer.
        self._nets = nets = connected(distiller, TimmNetwork(student_model), made)
        if sample is None:
            sample = torch.randn(2, *self.config["input_size"], generator=torch.Generator().manual_seed(0))
        batch = self._batch(
            sample.to(self.device, self.dtype), torch.zeros(len(sample), dtype=torch.long).to(self.device)
        )
        set_up(distiller, nets, batch)
        _check_fit(distiller)  # with the stages and parts that follow the networks
        check_classes(distiller, made)
        distiller.to(device=self.device, dtype=self.dtype)
        if distiller.shared(nets):
            raise DistillError(
                f"{distiller.name} has optimizers of its own, and timm's train.py one: use kd-timm-train."
            )
        if total_steps is not None:
            schedule(distiller, total_steps)
        self.trainable_module: nn.Module = _Trainable(student_model, distiller)
        self._turns: Iterator[Turn] | None = None

    def _teacher(self, teacher: str | nn.Module, path: str, student: Any) -> Teacher:
        classes: Any = getattr(student, "num_classes", None)
        fit: dict[str, Any] = dict(config=self.config, num_classes=classes, classes=self.classes)
        if isinstance(teacher, str):
            made = create_teacher(teacher, path, {}, **fit)
        else:
            made = as_teacher(type(teacher).__name__, teacher, getattr(teacher, "pretrained_cfg", None) or {}, **fit)
        made.module.to(self.device, self.dtype)
        return made

    def _batch(self, inputs: Tensor, target: Tensor) -> Batch:
        classes = getattr(self._nets.student.module, "num_classes", 0)
        return image_batch(
            self.config,
            inputs,
            target,
            classes=classes,
            task="regression" if classes == 1 and isinstance(self.criterion, _DISTANCE) else "classification",
            criterion=lambda view, labels: self.criterion(view.logits, labels),
        )

    @property
    def distiller(self) -> Distiller:
        """The method."""
        return self._unwrapped().distiller

    def _unwrapped(self, ema: bool = False, module: nn.Module | None = None) -> _Trainable:
        trainable: _Trainable = unwrap_model(self.get_trainable_module(ema=ema) if module is None else module)
        return trainable

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        """One step's loss.

        Args:
            input: Normalised images `[B, C, H, W]`.
            target: Labels `[B]` or soft targets `[B, K]`.

        Returns:
            `loss`, `output` (the student's scores, where the method reads them) and every loss term by name.
        """
        nets = self._nets
        scores: list[Tensor] = []
        batch = self._batch(input, target)
        self._turns = self.distiller.turns(Nets(_Noted(nets.student, scores), nets.teachers), batch)
        turn = self.trainable_module(self._turns)
        if list(turn) != ["student"]:
            raise self._turned()
        terms = turn["student"]
        result: dict[str, Any] = {"loss": sum(terms.values()), **terms}
        return result | {"output": scores[0]} if scores else result

    def _turned(self) -> DistillError:
        return DistillError(
            f"{self.distiller.name} plays more than one turn in a step, and timm's train.py has one backward: use"
            " kd-timm-train."
        )

    def update_ema(self, step: int | None = None) -> None:
        """Called by timm's loop after every update: runs what follows the turn, and counts the method's steps."""
        if self._turns is not None and next(self._turns, None) is not None:
            raise self._turned()
        self._turns = None
        progress = self.distiller.progress
        self.distiller.after_update()
        self.distiller.progress.at(progress.step + 1 if step is None else step)
        super().update_ema(step)

    def prepare_distributed(self, device_ids: list[Any] | None = None, **ddp_kwargs: Any) -> DistillationTask:
        """Wraps student and distiller in DistributedDataParallel; the teachers stay as they are."""
        student = self.trainable_module
        self.trainable_module = nn.parallel.DistributedDataParallel(student, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any) -> Any:
        """Compiles the student's forward, in training and in evaluation."""
        network: Any = self._nets.student.network
        self._nets.student.forward = torch.compile(network.staged, backend=backend, mode=mode, **compile_kwargs)
        self.eval_model = torch.compile(network.module, backend=backend, mode=mode, **compile_kwargs)
        return self.eval_model

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The bare student."""
        resolved = super().get_eval_model(module=module, ema=ema)
        inner = unwrap_model(resolved) if resolved is not None else None
        return inner.student if isinstance(inner, _Trainable) else resolved

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """The student's parameters, without the classifier where asked, and the distiller's."""
        trainable = self._unwrapped()
        student = list(trainable.student.parameters())
        return [*(student[:-2] if exclude_head else student), *trainable.distiller.parameters()]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The distiller's parts."""
        if module is None and self.get_trainable_module(ema=ema) is None:
            return {}
        state = self._unwrapped(ema, module).distiller.state_dict()
        return {"distiller": state} if state else {}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Loads the distiller's parts."""
        if state and "distiller" in state:
            self._unwrapped(ema, module).distiller.load_state_dict(state["distiller"], strict=strict)


class _Noted(Net):
    """A network that notes the scores of its forwards."""

    def __init__(self, net: Net, scores: list[Tensor]) -> None:
        vars(self).update(vars(net))
        self.scores = scores

    def __call__(self, batch: Batch, **options: Any) -> View:
        view = super().__call__(batch, **options)
        self.scores += [] if view._logits is None else [view._logits]
        return view


def _check_fit(distiller: Distiller) -> None:
    """Refuses a method that one backward and one optimizer cannot play."""
    check_classifies(distiller, "timm's train.py")
    if reason := refusals(distiller).get("timm-task"):
        raise DistillError(f"{distiller.name} {reason}, which timm's train.py cannot do: use kd-timm-train.")
