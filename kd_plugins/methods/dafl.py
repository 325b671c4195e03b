"""Data-Free Learning of Student Networks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from kd_plugins import Batch, Distiller, DistillError, Needs, Nets, OptimSpec, Paper, Reads, View
from kd_plugins import functional as KF
from kd_plugins.catalog.values import AtLeastOne, NonNegative, Range, Temperature
from kd_plugins.distiller import Terms, Turn
from kd_plugins.errors import check_built
from kd_plugins.nn.connectors import as_weights
from kd_plugins.nn.generator import Generator
from kd_plugins.nn.patches import pixels, thumbnails
from kd_plugins.picture import Images, Picture

_AUTHORS = "Hanting Chen, Yunhe Wang, Chang Xu, Zhaohui Yang, Chuanjian Liu, Boxin Shi, Chunjing Xu, Chao Xu, Qi Tian"
_SHOWN, _SIDE = 8, 64  # images of a grid, and their longest side in it
_EPOCHS = 200  # grids at most: 20 MB of every state at that side
_EVERY = 50  # updates between two looks at the images, each of which waits for the device
_LOSSES = ("one_hot", "activation", "information")


class DAFL(Distiller):
    """Trains the student without data, on images that a generator makes to please the teacher.

    Chen et al., "Data-Free Learning of Student Networks", ICCV 2019, arXiv 1904.01186: a generator makes images
    `x = G(z)` `[B, C, H, W]` of noise `z ~ N(0, 1)`. With the teacher's logits `y` `[B, K]` and features `f` of them,

    - generator: `one_hot * CE(y, argmax y) - activation * mean |f| + information * sum_k p_k log p_k`, where
      `p = mean_b softmax(y_b)` over the batch of all processes;
    - student: `T^2 * KL(softmax(y / T) || softmax(S(x) / T))`; no gradient of it reaches the generator.

    Both move in every step, by one forward of each network, as in the released code. An epoch is a number of steps. The
    weights of a preset go with its learning rates: the student's, `--opt` and `--lr`, are the page's to tell.

    **Departures** The released code lets gradients through the teacher's weights as well and throws them away.
    Entropies are finite where a class is never predicted.

    Args:
        preset: Whose settings the options below have where they are not given: the released code's for `mnist`,
            `cifar10` and `cifar100`, or `mmrazor`, those of MMRazor on CIFAR-10.
        one_hot: Weight of the teacher's certainty; 0 switches the loss off, and all three off leave the generator as it
            began.
        activation: Weight of the teacher's activation.
        information: Weight of the spread over classes; with a logarithm to the base `log_base`.
        temperature: Softens both networks' logits.
        latent: Length of z.
        width: Channels of the generator; 128 in the released code, with which 512 images take seconds on a CPU.
        layer: Where the teacher's features are read: a module path or a stage number; the classifier's input by
            default. The released LeNet-5 has them a layer lower, `layer=-1`.
        log_base: Of the logarithm in the spread; 10 in the released code, whose weights belong to it.
        inputs: `generated` images, or Gaussian `noise` in their place as a baseline.
    """

    paper = Paper(
        "Data-Free Learning of Student Networks",
        tuple(_AUTHORS.split(", ")),
        "ICCV",
        2019,
        arxiv="1904.01186",
    )
    example = {"width": 8}
    data = False
    accumulation = False
    task_weight = 0.0
    presets: ClassVar[dict[str, dict[str, float]]] = {
        "mnist": dict(one_hot=1, activation=0.1, information=5, temperature=1, latent=100, lr=0.2),
        "cifar10": dict(one_hot=0.05, activation=0.01, information=5, temperature=1, latent=1000, lr=0.02),
        "cifar100": dict(one_hot=0.5, activation=0.1, information=20, temperature=1, latent=1000, lr=0.02),
        "mmrazor": dict(one_hot=0.05, activation=0.01, information=5, temperature=6, latent=1000, lr=1e-3),
    }

    grids: Tensor
    steps: Tensor

    def __init__(
        self,
        *,
        preset: Literal["mnist", "cifar10", "cifar100", "mmrazor"] = "cifar10",
        one_hot: NonNegative | None = None,
        activation: NonNegative | None = None,
        information: NonNegative | None = None,
        temperature: Temperature | None = None,
        latent: AtLeastOne | None = None,
        width: AtLeastOne = 128,
        layer: str | int | None = None,
        log_base: Annotated[float, Range(above=1)] = 10.0,
        inputs: Literal["generated", "noise"] = "generated",
    ) -> None:
        super().__init__()
        self.features: str | int = ""
        self.images: nn.Module = nn.Identity()
        for name, value in self.presets[preset].items():
            if name in self.config and self.config[name] is None:
                setattr(self, name, value)
        self.trained = bool(self.taught_by)

    @property
    def taught_by(self) -> list[str]:
        """The generator's losses that have a weight."""
        return [name for name in _LOSSES if getattr(self, name)] if self.inputs == "generated" else []

    def needs(self) -> Needs:
        reads = Reads(features=(self.features,)) if self.ready and "activation" in self.taught_by else Reads()
        return Needs(teacher=reads)

    def setup(self, nets: Nets, batch: Batch) -> None:
        if len(batch.shape) != 3 or batch.size < 2:
            raise DistillError(
                "dafl makes its images, two or more at a time, and must know how many and of what shape: raise"
                " --batch-size, or in a bare loop give bind(..., batch=Batch.of(size=512, shape=(3, 32, 32))), and the"
                " same batch in every step."
            )
        self.features = nets.teacher.network.classifier() + ":in" if self.layer is None else self.layer
        self.images = Generator(self.latent, batch.shape, self.width).to(nets.device)
        self.images.requires_grad_(self.trained)
        self.register_buffer("grids", torch.zeros(0, dtype=torch.uint8, device=nets.device))
        self.register_buffer("steps", torch.zeros(0, dtype=torch.long, device=nets.device))
        made = batch.with_inputs(as_weights(nets.student.module, torch.zeros(2, *batch.shape, device=nets.device)))
        asked = nets.teacher(made, reads=Reads(features=(self.features,)))
        student, teacher = nets.student(made).logits, asked.logits
        if student.shape != teacher.shape or student.dim() != 2 or student.shape[1] < 2:
            # One score has a softmax that is always 1, and all losses are 0.
            raise DistillError(
                f"dafl needs scores [B, K] of the same K >= 2 classes, got {list(student.shape)} from the student and"
                f" {list(teacher.shape)} from the teacher: use classifiers of the same classes."
            )
        if self.layer is None:
            path = nets.teacher.network.classifier()
            # Flat, as a convolution's are maps of one pixel; sorted, as the classes may be in the student's order.
            scores = nets.teacher.module.get_submodule(path)(asked.features[self.features]).flatten(1)
            made_here = [x.float().sort(-1).values for x in (scores, teacher)]
            if scores.shape != teacher.shape or not torch.allclose(*made_here, rtol=1e-2, atol=1e-3):
                raise DistillError(
                    "dafl reads what the layer that makes the scores gets, and the teacher's last linear layer,"
                    f" {path}, does not make them: name it, such as layer='fc:in'."
                )

    def extras(self) -> dict[str, nn.Module]:
        return {"generator": self.images} if self.trained else {}

    def optimizers(self) -> dict[str, OptimSpec]:
        """Adam for the generator, at the preset's rate throughout."""
        return dict.fromkeys(self.extras(), OptimSpec("Adam", self.presets[self.preset]["lr"]))

    def turns(self, nets: Nets, batch: Batch) -> Iterator[Turn]:
        check_built(self, **dict.fromkeys(self.taught_by, self.trained))
        images = self.generated(batch.size, nets.device, batch.shape)
        asked = batch.with_inputs(images)
        self._check(images)
        self._show(images, batch)
        teacher = nets.teacher(asked, input_grad=self.trained)
        student = nets.student(asked.with_inputs(as_weights(nets.student.module, images.detach())))
        turn = {"student": self.loss(student, teacher, asked)}
        yield {"generator": self.judged(teacher), **turn} if self.taught_by else turn

    def generated(self, count: int, device: torch.device, shape: tuple[int, ...]) -> Tensor:
        """That many images, with their graph."""
        if self.inputs == "noise":
            return self.host.randn(count, *shape, device=device)
        return self.images(self.host.randn(count, self.latent, device=device))

    def judged(self, teacher: View) -> Terms:
        """The generator's terms."""
        loss = {
            "one_hot": lambda: KF.dafl_one_hot(teacher.logits),
            "activation": lambda: KF.dafl_activation(teacher.features[self.features]),
            "information": lambda: KF.dafl_information(teacher.logits, self.log_base, mean=self.host.mean),
        }
        return {name: getattr(self, name) * loss[name]() for name in self.taught_by}

    def loss(self, student: View, teacher: View, batch: Batch) -> Terms:
        return {"kd": KF.kd(student.logits, teacher.logits, self.temperature)}

    def _check(self, images: Tensor) -> None:
        """Ends a training whose generator is dead: where its tanh is saturated in every pixel it gets no gradient."""
        if self.trained and self.progress.step % _EVERY == 0 and (images - images[:1]).abs().max() < 1e-3:
            raise DistillError(
                f"dafl's generator makes one image of every noise at step {self.progress.step}, and gets no gradient to"
                " make others: begin again with a lower rate (generator.lr) or one that falls with the student's"
                f" (generator.schedule=student), or go on from a state written more than {_EVERY} updates ago."
            )

    # What the report shows

    def _show(self, images: Tensor, batch: Batch) -> None:
        """Keeps a grid of images at the end of each epoch, or of as many as are kept; of steps where none are known."""
        table, step = self.progress.table, self.progress.step + 1
        if table is None:
            return
        unit, most = (table.epoch, _EPOCHS) if table.epoch else (1, _SHOWN)
        if step % (unit * -(-table.total // (unit * most))):
            return
        grid = thumbnails(pixels(batch.with_inputs(images[:_SHOWN])).float(), _SIDE).round().byte()
        self.grids = torch.cat([self.grids, grid[None].to(self.grids.device)])
        self.steps = torch.cat([self.steps, self.steps.new_tensor([step])])

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in self._buffers.keys() & {"grids", "steps"}:  # as many as had been shown
            if prefix + name in state:
                setattr(self, name, torch.empty_like(state[prefix + name], device=self.steps.device))
        super()._load_from_state_dict(state, prefix, *args)

    def pictures(self) -> list[Picture]:
        epoch = self.progress.table.epoch if self.progress.table is not None else None
        names = [f"epoch {step / epoch:g}" if epoch else f"step {step}" for step in self.steps.tolist()]
        rows = {name: list(grid) for name, grid in zip(names, self.grids, strict=True)}
        return [Images("Generated images", rows, "What the student learns from.")] if rows else []
