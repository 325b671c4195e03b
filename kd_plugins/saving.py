"""What a run leaves for one that goes on: written as a state, and taken up to the last bit."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kd_plugins import states
from kd_plugins.authors import parts
from kd_plugins.catalog.registry import config_of
from kd_plugins.distiller import Distiller
from kd_plugins.errors import DistillError
from kd_plugins.finite import Watch, check_weights
from kd_plugins.groups import Grouped
from kd_plugins.host import world
from kd_plugins.reading.attention import BaseAttentionTaps
from kd_plugins.reading.nets import Nets

_logger = logging.getLogger(__name__)


class Saving(Grouped):
    """How a `Run` is saved and loaded."""

    # Whether `save` and `load` keep the student and its optimizer as well, which no host does in a bare loop.
    keeps_student = True

    def __init__(self, distiller: Distiller, optimizer: Any, nets: Nets | None, max_grad_norm: float | None) -> None:
        super().__init__(distiller, optimizer, nets, max_grad_norm)
        self.watch = Watch()
        # What the next log is the mean of: a sum and a count by loss term.
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self.initial: dict[str, Tensor] | None = None
        if self.nets is not None and any(stage.fresh_student for stage in distiller.stages()):
            self.initial = {k: v.detach().cpu().clone() for k, v in self.nets.student.module.state_dict().items()}

    def save(self, folder: str | Path, *others: Any) -> None:
        """Writes what a resumed run needs: weights as safetensors, the rest as JSON and tensors.

        In a bare loop that is the student, its optimizer and torch's random state as well, as the newest state of the
        run (`kd_plugins.states`); the one before it is kept. Every process calls it. Under a host it is files beside
        those of the host's checkpoint.

        Args:
            folder: Of the run.
            others: What else belongs to the state and has `save(folder)`, such as `kd_accelerate.streams.Streams`.
        """
        if not self.keeps_student:
            with states.writing(folder):
                self._write(Path(folder))
            return
        if self.watch.stops:
            check_weights(self._networks(), "nothing was written, the state before is good; lower the learning rate.")
        new = states.slots(folder)[0] if world()[0] else states.open_state(folder)
        self._wait()
        with states.writing(new):
            self._write(new)
            for other in others if not world()[0] else ():
                other.save(new)
        self._wait()
        if not world()[0]:
            states.close_state(folder)
        self._wait()

    def _wait(self) -> None:
        if world()[1] > 1:
            dist.barrier()

    def _write(self, folder: Path) -> None:
        from safetensors.torch import save_file

        rank = world()[0]
        folder.mkdir(parents=True, exist_ok=True)
        streams = {
            f"{name}|{key}": value
            for name, part in parts(self.distiller).items()
            for key, value in part.host.state().items()
        }
        sums = {term: torch.tensor([float(s), n], dtype=torch.float64) for term, (s, n) in self._sums.items()}
        streams |= {f"|{term}": pair for term, pair in sums.items()}
        save_file(_plain(streams), folder / f"distiller_random_{rank}.safetensors")
        if self.keeps_student:
            cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
            torch.save({"cpu": torch.get_rng_state(), "cuda": cuda}, folder / f"random_{rank}.pt")
        if rank:
            return
        progress = self.distiller.progress
        state = {
            **config_of(self.distiller),
            "progress": {"step": progress.step, "epoch": progress.epoch, "stage": progress.stage},
            "stages": progress.table.to_json() if progress.table else None,
            "attention": [taps.modes for taps in self._taps()],
        }
        states.write_json(folder / "distiller.json", state)
        save_file(_plain(self.distiller.state_dict()), folder / "distiller.safetensors")
        optimizers = {group.name: group.optimizer.state_dict() for group in self}
        torch.save({"optimizers": optimizers, "scalers": self.scaler_states()}, folder / "distiller_optimizers.pt")
        for name, module in self._networks().items():
            save_file(_plain(module.state_dict()), folder / f"{name}.safetensors")
        if self.keeps_student:
            torch.save(self.plain_optimizer.state_dict(), folder / "optimizer.pt")
        if self.initial is not None:
            save_file(_plain(self.initial), folder / "initial_student.safetensors")

    def load(self, folder: str | Path, *others: Any) -> bool:
        """Takes up what `save` wrote; returns whether the stages of the run have changed (the saved ones are kept).

        In a bare loop that is the newest state that is whole; a warning tells of one that is not.

        Args:
            folder: Of the run.
            others: What `save` was given, with `load(folder)`.

        Raises:
            DistillError: The folder holds no distiller, or another one; no state is whole; the method is not set up.
        """
        if not self.distiller.ready:
            raise DistillError(
                f"{self.distiller.name} has no parts to load before it is set up: bind(..., batch=one batch) first."
            )
        found, rank = self._found(Path(folder)), world()[0]
        with states.taking_up(found):
            return self._load(found, rank, *others)

    def _load(self, folder: Path, rank: int, *others: Any) -> bool:
        from safetensors.torch import load_file

        state = self.load_weights(folder)
        saved = torch.load(folder / "distiller_optimizers.pt", map_location="cpu", weights_only=True)
        for group in self:
            group.optimizer.load_state_dict(saved["optimizers"][group.name])
        self.load_scaler_states(saved["scalers"])
        if self.keeps_student:
            optimizer = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
            self.plain_optimizer.load_state_dict(optimizer)
        if self.initial is not None:
            self.initial = load_file(folder / "initial_student.safetensors")
        for taps, modes in zip(self._taps(), state.get("attention", ()), strict=False):
            taps.keep(modes)
        file = folder / f"distiller_random_{rank}.safetensors"
        streams = load_file(file) if file.is_file() else {}
        for name, part in parts(self.distiller).items():
            own = {key.partition("|")[2]: value for key, value in streams.items() if key.partition("|")[0] == name}
            part.host.load(own)
        device = next((p.device for group in self.plain_optimizer.param_groups for p in group["params"]), None)
        sums = {key[1:]: value for key, value in streams.items() if key.startswith("|")}
        self._sums = {term: (pair[0].float().to(device), int(pair[1])) for term, pair in sums.items()}
        progress = self.distiller.progress
        changed = bool(progress.table and state["stages"] and progress.table.restore(state["stages"]))
        progress.stage = state["progress"]["stage"]
        progress.at(state["progress"]["step"], state["progress"]["epoch"])
        if self.keeps_student:
            random = torch.load(folder / f"random_{rank}.pt", weights_only=True)
            torch.set_rng_state(random["cpu"])
            if random["cuda"]:
                torch.cuda.set_rng_state_all(random["cuda"])
        for other in others:
            other.load(folder)
        return changed

    def load_weights(self, folder: Path) -> dict[str, Any]:
        """Takes up the weights of a state alone, those of the method's parts and of the networks; returns its JSON."""
        from safetensors.torch import load_file

        if not (folder / "distiller.json").is_file():
            raise DistillError(
                f"Expected distiller.json in the checkpoint {folder}, which was written by a run without a distiller or"
                " with save_only_model: resume from another one, or start anew."
            )
        state: dict[str, Any] = states.read_json(folder / "distiller.json")
        config = config_of(self.distiller)
        name = config["distiller"]
        if state["distiller"] != name:
            raise DistillError(
                f"The checkpoint {folder} was written with the distiller {state['distiller']!r}, this run has"
                f" {name!r}: resume with the distiller that the run was started with."
            )
        before, now = state["options"], config["options"]
        options = {k: (before.get(k), now.get(k)) for k in sorted({*before, *now}) if before.get(k) != now.get(k)}
        words = ", ".join(f"{option}={now} in place of {before}" for option, (before, now) in options.items())
        try:
            self.distiller.load_state_dict(load_file(folder / "distiller.safetensors"))
        except RuntimeError as error:
            raise DistillError(
                f"The checkpoint {folder} does not fit the distiller of this run, which has"
                f" {words or 'the same options'}: resume with what the run was started with. ({error})"
            ) from error
        if options:
            _logger.warning(
                "Resumed %s with other options, %s: what it had made before (a codebook, searched weights) stays.",
                *(name, words),
            )
        for name, module in self._networks().items():
            module.load_state_dict(load_file(folder / f"{name}.safetensors"))
        return state

    def _found(self, folder: Path) -> Path:
        """The newest whole state of a bare loop; a host finds its own."""
        if not self.keeps_student:
            return folder
        found = states.newest(states.slots(folder), _logger.warning)
        if found is None:
            raise DistillError(
                f"{folder} holds no whole state to continue from: name the folder of a run, or start anew."
            )
        return found

    def scaler_states(self) -> dict[str, Any]:
        """States of the groups' gradient scalers, for a checkpoint."""
        return {}

    def load_scaler_states(self, states: Mapping[str, Any]) -> None:
        """Takes up what `scaler_states` gave."""

    def _networks(self) -> dict[str, nn.Module]:
        if self.nets is None:
            if self.keeps_student:
                raise DistillError("Saving a run needs the networks: make_optimizers(distiller, optimizer, nets).")
            return {}
        return {name: m for name, m in self.nets.trained.items() if name != "student" or self.keeps_student}

    def _taps(self) -> list[BaseAttentionTaps]:
        """How the attention of the networks that train is read."""
        found = [net.network.attention for net in self.nets.peers] if self.nets is not None else []
        return [taps for taps in found if taps is not None]


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: contiguous, sharing no memory."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
