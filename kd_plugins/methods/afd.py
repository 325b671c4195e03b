"""Feature-map-level Online Adversarial Knowledge Distillation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_plugins import functional as KF
from kd_plugins.catalog.options import OptimSpec
from kd_plugins.catalog.paper import Paper
from kd_plugins.distiller import Distiller, Terms, Turn
from kd_plugins.errors import DistillError
from kd_plugins.methods.kd import soft_labels
from kd_plugins.reading.nets import Net, Nets
from kd_plugins.reading.view import Batch, Needs, Reads, View

__all__ = ["AFD", "Discriminator", "sources", "transfer_layer"]

_logger = logging.getLogger("kd_plugins.afd")


class Discriminator(nn.Sequential):
    """Judges feature maps: `[B, C, H, W]` to scores `[B, K]`, before sigmoid or softmax.

    Convolution, strided convolution, 1x1 convolution, mean over the positions. Each example is normalised on its own
    (group normalisation), so that real and fake maps, processes, and batches of one are all treated alike.

    Args:
        channels: C.
        hidden: Channels between the convolutions.
        outputs: K.
    """

    def __init__(self, channels: int, hidden: int, outputs: int = 1) -> None:
        super().__init__(
            nn.Conv2d(channels, hidden, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(hidden, hidden, 3, stride=2, padding=1, bias=False),
            nn.GroupNorm(1, hidden),
            nn.LeakyReLU(0.2),
            nn.Conv2d(hidden, outputs, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )


def transfer_layer(channels: int, width: int) -> nn.Module:
    """Maps `[B, channels, H, W]` to `[B, width, H, W]`: 1x1 convolution, batch norm, ReLU; nothing where they agree."""
    if channels == width:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


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
    kind = "online"
    tasks = ("classification", "multilabel")
    teachers = "or peers"
    peers = True

    def __init__(
        self,
        *,
        layer: str | int = -1,
        peer_layers: tuple[str | int, ...] | None = None,
        teacher_layer: str | int | None = None,
        temperature: float = 3.0,
        logit_weight: float = 1.0,
        logit_only: bool = False,
        adversarial_only: bool = False,
        feature_loss: Literal["adversarial", "l1"] = "adversarial",
        topology: Literal["cycle", "all"] = "cycle",
        discriminators: Literal["each", "one"] = "each",
        hidden: int = 64,
    ) -> None:
        super().__init__()
        if temperature <= 0 or hidden < 1:
            raise DistillError(f"Expected temperature and hidden above 0, got {temperature} and {hidden}.")
        if logit_weight <= 0:
            raise DistillError(f"Expected logit_weight above 0, got {logit_weight}: adversarial_only drops that term.")
        if logit_only and adversarial_only:
            raise DistillError("logit_only and adversarial_only leave nothing to distil: take one of them.")
        if logit_only and (feature_loss != "adversarial" or discriminators != "each"):
            raise DistillError("logit_only has no feature loss: leave feature_loss and discriminators out.")
        if feature_loss == "l1" and discriminators != "each":
            raise DistillError("feature_loss=l1 has no discriminators: leave discriminators out.")
        self.layer = layer
        self.peer_layers = peer_layers
        self.teacher_layer = layer if teacher_layer is None else teacher_layer
        self.temperature, self.logit_weight = temperature, logit_weight
        self.reads_logits, self.reads_features = not adversarial_only, not logit_only
        self.adversarial, self.topology = feature_loss == "adversarial" and not logit_only, topology
        self.each, self.hidden = discriminators == "each", hidden
        self.online = True
        self.transfers, self.discriminators = nn.ModuleList(), nn.ModuleList()

    # Networks

    def needs(self) -> Needs:
        if not self.reads_features:
            return Needs()
        return Needs(
            Reads(features=(self.layer,)),
            Reads(False) if self.online else Reads(self.reads_logits, features=(self.teacher_layer,)),
            peers=tuple(Reads(features=(layer,)) for layer in self.peer_layers or ()),
        )

    def setup(self, nets: Nets, batch: Batch) -> None:
        self._check(nets)
        views = self._views(nets, batch)
        if self.reads_logits and len({view.logits.shape for view in views}) > 1:
            shapes = [list(view.logits.shape) for view in views]
            raise DistillError(f"afd compares logits of the same classes, got the shapes {shapes} from the networks.")
        if not self.reads_features:
            return
        widths = []
        for net, view, layer in zip(self._networks(nets), views, self._layers(len(views)), strict=True):
            net.network.check_map(self.name, layer, view.features[layer])
            widths.append(view.features[layer].shape[1])
        # Nothing would train a transfer layer of a frozen teacher.
        width = max(widths) if self.online else widths[-1]
        self.transfers.extend(transfer_layer(w, width) for w in widths[: len(nets.peers)])
        if not self.adversarial:
            return
        if self.each:
            self.discriminators.extend(Discriminator(width, self.hidden) for _ in nets.peers)
        else:
            self.discriminators.append(Discriminator(width, self.hidden, len(views)))

    def _check(self, nets: Nets) -> None:
        """Refuses options and networks that do not go together."""
        self.online = len(nets.peers) > 1
        if self.peer_layers is not None and len(self.peer_layers) != len(nets.peers) - 1:
            raise DistillError(
                f"Expected one of peer_layers for each of {len(nets.peers) - 1} peers, got {list(self.peer_layers)}."
            )
        if self.config["teacher_layer"] is not None and self.online:
            raise DistillError("teacher_layer is for the offline form, which has a teacher and no peers: leave it out.")
        for k, peer in enumerate(nets.peers[1:], 1):
            for j, other in enumerate(nets.peers[:k]):
                same = _same(peer.module, other.module)
                if same == 1:
                    raise DistillError(
                        f"{_name(j)} and {_name(k)} have the same architecture and weights and would stay the same:"
                        " initialise them differently."
                    )
                if same > 0.5:
                    _logger.warning(
                        "%s and %s start with the same weights but for %.1f %%: networks that are alike have little to"
                        " teach each other.",
                        *(_name(j), _name(k), 100 * (1 - same)),
                    )

    def _views(self, nets: Nets, batch: Batch) -> list[View]:
        """One forward of every network: the trained ones, then the teacher of the offline form."""
        return [network(batch) for network in self._networks(nets)]

    def _networks(self, nets: Nets) -> Sequence[Net]:
        return nets.peers if self.online else (nets.student, nets.teacher)

    def _layers(self, networks: int) -> list[str | int]:
        others = self.peer_layers or (self.layer,) * (networks - 1)
        return [self.layer, *(others if self.online else (self.teacher_layer,))]

    # Groups

    def extras(self) -> dict[str, nn.Module]:
        groups: dict[str, nn.Module] = {"features": self.transfers} if self.reads_features else {}
        return groups | ({"discriminator": self.discriminators} if self.adversarial else {})

    def shared(self, nets: Nets) -> dict[str, list[nn.Parameter]]:
        # The gradient of the feature loss ends at the map: the layers above get none.
        networks = nets.peers if self.reads_features else ()
        moved = [p for network in networks for p in network.module.parameters() if p.requires_grad]
        return {"features": moved} if moved else {}

    def optimizers(self) -> dict[str, OptimSpec]:
        """Adam at 2e-5 along the student's learning-rate curve, for the features and for the discriminators.

        Both are our defaults.
        """
        return dict.fromkeys(self.extras(), OptimSpec("Adam", 2e-5, schedule="student"))

    # A step

    def turns(self, nets: Nets, batch: Batch) -> Iterator[Turn]:
        views = self._views(nets, batch)
        trained = range(len(nets.peers))
        learned = [sources(k, len(views), self.topology) for k in trained]
        turn: dict[str, Terms] = {}
        if self.reads_features:
            maps = self._maps(views)
            if self.adversarial:
                yield {"discriminator": self._judge([m.detach() for m in maps], learned)}
            turn["features"] = {_name(k): self._feature_loss(maps, k, learned[k]) for k in trained}
        for k in reversed(trained):
            terms = {"task": batch.task_loss(views[k])}
            if self.reads_logits:
                terms["logits"] = self.logit_weight * _mean(
                    [soft_labels(views[k], views[j], batch, self.temperature) for j in learned[k]]
                )
            turn[_name(k)] = terms
        yield turn

    def _maps(self, views: Sequence[View]) -> list[Tensor]:
        """The maps of all networks in one shape `[B, C, H, W]`."""
        maps = [view.features[layer] for view, layer in zip(views, self._layers(len(views)), strict=True)]
        size = min(m.shape[2] for m in maps), min(m.shape[3] for m in maps)
        pooled = [m if m.shape[2:] == size else F.adaptive_avg_pool2d(m, size) for m in maps]
        transferred = [layer(m) for layer, m in zip(self.transfers, pooled, strict=False)]
        return transferred + pooled[len(transferred) :]

    def _judge(self, maps: Sequence[Tensor], learned: Sequence[Sequence[int]]) -> Terms:
        """The discriminators' losses; real are the maps that a network learns from, fake its own."""
        if not self.each:
            (discriminator,) = self.discriminators
            return {"which": torch.stack([KF.lsgan_classes(discriminator(m), k) for k, m in enumerate(maps)]).sum()}
        terms: Terms = {}
        for k, discriminator in enumerate(self.discriminators):
            real = torch.cat([_probability(discriminator(maps[j])) for j in learned[k]])
            terms[_name(k)] = KF.lsgan_discriminator(real, _probability(discriminator(maps[k])))
        return terms

    def _feature_loss(self, maps: Sequence[Tensor], k: int, learned: Sequence[int]) -> Tensor:
        """What network k pays for maps that differ from those that it learns from."""
        if not self.adversarial:
            return _mean([KF.feature_l1(maps[k], maps[j].detach()) for j in learned])
        if self.each:
            return KF.lsgan_generator(_probability(self.discriminators[k](maps[k])))
        return KF.lsgan_generator(self.discriminators[0](maps[k]).float().softmax(1)[:, list(learned)])


def _name(network: int) -> str:
    """The group of a network."""
    return f"peer{network}" if network else "student"


def _mean(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms)).mean()


def _probability(scores: Tensor) -> Tensor:
    # In half precision the sigmoid rounds to 0 and 1, where it has no slope.
    return scores.float().sigmoid()


def _same(a: nn.Module, b: nn.Module) -> float:
    """The share of two networks' weights that are equal; 0 for different architectures."""
    ours, theirs = list(a.parameters()), list(b.parameters())
    if [p.shape for p in ours] != [q.shape for q in theirs]:
        return 0.0
    pairs = zip(ours, theirs, strict=True)
    # Vectors start as constants in every network.
    weights = [(p.numel(), p.device == q.device and torch.equal(p, q)) for p, q in pairs if p.dim() > 1]
    if not weights:
        return float(all(torch.equal(p, q.to(p.device)) for p, q in zip(ours, theirs, strict=True)))
    return sum(n for n, equal in weights if equal) / sum(n for n, _ in weights)
