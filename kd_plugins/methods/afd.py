"""Feature-map-level Online Adversarial Knowledge Distillation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_plugins import Batch, Distiller, DistillError, Needs, Net, Nets, OptimSpec, Paper, Reads, View
from kd_plugins import functional as KF
from kd_plugins.catalog.values import AtLeastOne, Positive, Temperature
from kd_plugins.distiller import Terms, Turn
from kd_plugins.methods.kd import soft_labels
from kd_plugins.nn.connectors import as_weights
from kd_plugins.nn.discriminators import Discriminator, probability, transfer_layer
from kd_plugins.reading.nets import check_unlike, group_name


def sources(network: int, networks: int, topology: str) -> list[int]:
    """The networks that a network learns from.

    >>> [sources(k, 3, "cycle") for k in range(3)], sources(0, 3, "all")
    ([[2], [0], [1]], [1, 2])
    """
    if topology == "cycle":
        return [(network - 1) % networks]
    return [k for k in range(networks) if k != network]


class AFD(Distiller):
    """Trains networks together that learn from each other's logits and, by discriminators, from their feature maps.

    Chung, Park, Kim, Kwak, "Feature-map-level Online Adversarial Knowledge Distillation", ICML 2020, arXiv 2002.01775.
    Network k has features `f_k` `[B, C_k, H, W]` and logits `z_k` `[B, K]`, and learns from network j:

    - logits, by the network's own optimizer: `CE(y, z_k) + T^2 KL(softmax(z_j / T) || softmax(z_k / T))`;
    - features, by an optimizer with a smaller rate (group `features`): `[1 - D_k(T_k(f_k))]^2`, which moves the layers
      below `f_k` and the transfer layer `T_k`;
    - its discriminator (group `discriminator`): `[1 - D_k(T_j(f_j))]^2 + [D_k(T_k(f_k))]^2`, D in [0, 1].

    Two networks are mutual; K networks learn in a cycle, 1 -> 2 -> ... -> K -> 1, the student being the first. With a
    teacher in place of peers the student alone learns, from the frozen teacher. One forward of each network serves all
    losses, and all gradients of the networks are taken before any of them moves; the discriminators move first.

    Departures: no code was released, so the architecture of D, the transfer layers' width (that of the widest network,
    or the teacher's; maps are averaged down to the smallest) and all defaults are ours. D normalises each example on
    its own in place of batches. `topology=all`, `discriminators=one` (`functional.lsgan_classes`) and the updates of
    `feature_loss=l1` are ours.

    Args:
        layer: The student's feature map: a stage number (-1 is the last stage) or a module path; and that of the
            others, where nothing else is said.
        peer_layers: The feature maps of the peers, one for each.
        teacher_layer: The feature map of the teacher in the offline form.
        temperature: Softens the logits; our default.
        logit_weight: Weight of the divergence from the other networks' logits; the equation's by default.
        logit_only: Leave out the features: mutual learning by logits.
        adversarial_only: Leave out the others' logits: the labels, and the features.
        feature_loss: `adversarial`, or `l1`: the distance of the maps, as a baseline, by the same optimizer.
        topology: From whom a network learns: `cycle` from the one before it, `all` from the mean of all others.
        discriminators: `each` network has one, or `one` for all tells which network a map comes from.
        hidden: Channels of a discriminator; our default.
    """

    paper = Paper(
        "Feature-map-level Online Adversarial Knowledge Distillation",
        ("Inseop Chung", "SeongUk Park", "Jangho Kim", "Nojun Kwak"),
        "ICML",
        2020,
        arxiv="2002.01775",
    )
    example = {"hidden": 8}
    tasks = ("classification", "multilabel", "regression")
    teachers = "or peers"
    peers = True

    def __init__(
        self,
        *,
        layer: str | int = -1,
        peer_layers: tuple[str | int, ...] | None = None,
        teacher_layer: str | int | None = None,
        temperature: Temperature = 3.0,
        logit_weight: Positive = 1.0,
        logit_only: bool = False,
        adversarial_only: bool = False,
        feature_loss: Literal["adversarial", "l1"] = "adversarial",
        topology: Literal["cycle", "all"] = "cycle",
        discriminators: Literal["each", "one"] = "each",
        hidden: AtLeastOne = 64,
    ) -> None:
        super().__init__()
        if logit_only and adversarial_only:
            raise DistillError("logit_only and adversarial_only leave nothing to distil: take one of them.")
        if logit_only and feature_loss == "l1":
            raise DistillError("logit_only has no feature loss: leave feature_loss out.")
        if discriminators == "one" and (logit_only or feature_loss == "l1"):
            raise DistillError("logit_only and feature_loss=l1 have no discriminators: leave discriminators out.")
        self.each, self.online = discriminators == "each", True
        self.transfers, self.discriminators = nn.ModuleList(), nn.ModuleList()

    # Networks

    def needs(self) -> Needs:
        if self.logit_only:
            return Needs()
        return Needs(
            Reads(features=(self.layer,)),
            Reads(False) if self.online else Reads(not self.adversarial_only, features=(self._layers(2)[1],)),
            peers=tuple(Reads(features=(layer,)) for layer in self.peer_layers or ()),
        )

    def setup(self, nets: Nets, batch: Batch) -> None:
        self.online, others = len(nets.peers) > 1, len(nets.peers) - 1
        if self.peer_layers is not None and len(self.peer_layers) != others:
            raise DistillError(f"Expected one of peer_layers for each of {others} peers, got {list(self.peer_layers)}.")
        if self.teacher_layer is not None and self.online:
            raise DistillError("teacher_layer is for the offline form, which has a teacher and no peers: leave it out.")
        check_unlike(nets.trained)
        networks = self._networks(nets)
        views = [net(batch) for net in networks]
        shapes = [] if self.adversarial_only else [list(view.logits.shape) for view in views]
        if any(shape != shapes[0] for shape in shapes):
            raise DistillError(f"afd compares logits of the same classes, got the shapes {shapes} from the networks.")
        if self.logit_only:
            return
        widths = []
        for net, view, layer in zip(networks, views, self._layers(len(views)), strict=True):
            net.network.check_map("afd without logit_only=true", layer, view.features[layer])
            widths.append(view.features[layer].shape[1])
        # Nothing would train a transfer layer of a frozen teacher.
        width = max(widths) if self.online else widths[-1]
        self.transfers.extend(transfer_layer(w, width) for w in widths[: len(nets.peers)])
        if self.feature_loss == "adversarial":
            outputs = [1] * len(nets.peers) if self.each else [len(views)]
            self.discriminators.extend(Discriminator(width, self.hidden, n) for n in outputs)

    def _networks(self, nets: Nets) -> Sequence[Net]:
        return nets.peers if self.online else (nets.student, nets.teacher)

    def _layers(self, networks: int) -> list[str | int]:
        """The feature map of each network."""
        if self.online:
            return [self.layer, *(self.peer_layers or (self.layer,) * (networks - 1))]
        return [self.layer, self.layer if self.teacher_layer is None else self.teacher_layer]

    # Groups

    def extras(self) -> dict[str, nn.Module]:
        if self.logit_only:
            return {}
        judges = {"discriminator": self.discriminators} if self.feature_loss == "adversarial" else {}
        return {"features": self.transfers, **judges}

    def shared(self, nets: Nets) -> dict[str, list[nn.Parameter]]:
        # The gradient of the feature loss ends at the map: the layers above get none.
        moved = [p for network in nets.peers for p in network.module.parameters() if p.requires_grad]
        return {} if self.logit_only else {"features": moved}

    def optimizers(self) -> dict[str, OptimSpec]:
        """Adam at 2e-5 along the student's learning-rate curve, for features and discriminators; our default."""
        return dict.fromkeys(self.extras(), OptimSpec("Adam", 2e-5, schedule="student"))

    # A step

    def turns(self, nets: Nets, batch: Batch) -> Iterator[Turn]:
        views = [net(batch) for net in self._networks(nets)]
        trained = range(len(nets.peers))
        learned = [sources(k, len(views), self.topology) for k in trained]
        turn: dict[str, Terms] = {}
        if not self.logit_only:
            maps = self._maps(views)
            if self.feature_loss == "adversarial":
                yield {"discriminator": self._judge([m.detach() for m in maps], learned)}
            turn["features"] = {group_name(k): self._feature_loss(maps, k, learned[k]) for k in trained}
        for k in reversed(trained):
            terms = turn[group_name(k)] = {"task": batch.task_loss(views[k])}
            if not self.adversarial_only:
                pulls = [soft_labels(views[k], views[j], batch, self.temperature) for j in learned[k]]
                terms["logits"] = self.logit_weight * torch.stack(pulls).mean()
        yield turn

    def _maps(self, views: Sequence[View]) -> list[Tensor]:
        """The maps of all networks in one shape `[B, C, H, W]`."""
        maps = [view.features[layer] for view, layer in zip(views, self._layers(len(views)), strict=True)]
        size = min(m.shape[2] for m in maps), min(m.shape[3] for m in maps)
        pooled = [as_weights(self, m if m.shape[2:] == size else F.adaptive_avg_pool2d(m, size)) for m in maps]
        transferred = [layer(m) for layer, m in zip(self.transfers, pooled, strict=False)]
        return transferred + pooled[len(transferred) :]

    def _judge(self, maps: Sequence[Tensor], learned: Sequence[Sequence[int]]) -> Terms:
        """The discriminators' losses; real are the maps that a network learns from, fake its own."""
        if not self.each:
            (discriminator,) = self.discriminators
            return {"which": torch.stack([KF.lsgan_classes(discriminator(m), k) for k, m in enumerate(maps)]).sum()}
        terms: Terms = {}
        for k, discriminator in enumerate(self.discriminators):
            real = torch.cat([probability(discriminator(maps[j])) for j in learned[k]])
            terms[group_name(k)] = KF.lsgan_discriminator(real, probability(discriminator(maps[k])))
        return terms

    def _feature_loss(self, maps: Sequence[Tensor], k: int, learned: Sequence[int]) -> Tensor:
        """What network k pays for maps that differ from those that it learns from."""
        if self.feature_loss == "l1":
            return torch.stack([KF.feature_l1(maps[k], maps[j].detach()) for j in learned]).mean()
        if self.each:
            return KF.lsgan_generator(probability(self.discriminators[k](maps[k])))
        return KF.lsgan_generator(self.discriminators[0](maps[k]).float().softmax(1)[:, list(learned)])
