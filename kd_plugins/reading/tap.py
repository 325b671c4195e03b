"""Reading, and replacing, what passes between the modules of a network, by module path."""

from __future__ import annotations

import fnmatch
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from kd_plugins.errors import DistillError, did_you_mean

Replacement: TypeAlias = Tensor | Callable[[Tensor], Tensor]
"""What stands in place of a module's output, or makes it of the output."""


class Reached(BaseException):
    """Raised inside a forward once everything wanted has been read; caught by whoever started the forward.

    A BaseException, so that no `except Exception` in a network can swallow it.
    """


class Seen(Mapping[str, Tensor]):
    """Activations captured in one forward, by module path."""

    def __init__(self, network: str, wanted: Collection[str], remedy: Callable[[str], str]) -> None:
        self._network = network
        self._wanted = tuple(wanted)
        self._remedy = remedy
        # With the version counter of each; -1 where it has none.
        self._captured: dict[str, list[tuple[Tensor, int]]] = {key: [] for key in self._wanted}

    def add(self, key: str, value: Tensor, version: int) -> None:
        """Keeps one activation, with the version counter that tells whether somebody overwrites it later."""
        self._captured[key].append((value, version))

    def all(self, key: str) -> list[Tensor]:
        """What every call of a module gave, for modules that are called several times in one forward."""
        if key not in self._captured:
            raise DistillError(f"{key!r} is not tapped; tapped are {list(self._wanted)}.")
        if not self._captured[key]:
            raise DistillError(
                f"Nothing was captured at {key!r} of {self._network}: the module was not called in this forward, or the"
                " network was compiled before it was tapped (hooks that come after the first compiled call are"
                " ignored). Tap a module that runs, before torch.compile."
            )
        if any(version >= 0 and value._version != version for value, version in self._captured[key]):
            raise DistillError(
                f"The activation at {key!r} of {self._network} was modified in place after it was captured, so it"
                f" is no longer that module's output: {self._remedy(key)}, or Tap(..., clone=True)."
            )
        return [value for value, _ in self._captured[key]]

    def __getitem__(self, key: str) -> Tensor:
        values = self.all(key)
        if len(values) != 1:
            raise DistillError(
                f"{key!r} of {self._network} was called {len(values)} times in one forward, so there is no single"
                f" activation: tap a module that is called once, or use .all({key!r})."
            )
        return values[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._wanted)

    def __len__(self) -> int:
        return len(self._wanted)

    def count(self, key: str) -> int:
        """How often a module has been called so far."""
        return len(self._captured[key])


@cache
def _uncompiled_stop() -> Callable[[], None]:
    """Ends a forward; not compiled, or the whole frame that the exception leaves would never be compiled again.

    Made when the first tap is, as it imports the compiler, which takes as long as torch itself.
    """

    def stop() -> None:
        raise Reached

    return torch.compiler.disable(stop)


class Hook:
    """A hook of one network; a copy of the network (an EMA model, a pickle) gets one that does nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What a hook becomes in a copy, which must not write into the original's taps."""

    def __reduce__(self) -> Any:
        return (Hook, ())


class _TapHook(Hook):
    """One hook on one side of one module; it acts only while its tap records."""

    def __init__(self, tap: Tap, key: str) -> None:
        self.tap, self.key = tap, key

    def __call__(self, module: nn.Module, args: tuple[Any, ...], rest: Any) -> Any:
        if self.key.endswith(":in"):
            self.tap._fire(self.key, module, (*args, *rest.values()))
            return None
        return self.tap._fire(self.key, module, rest)


def first_tensor(value: Any) -> Tensor | None:
    """The activation in what a module takes or returns: the tensor, or the first tensor of a tuple or mapping."""
    if isinstance(value, Tensor):
        return value
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((found for found in map(first_tensor, items) if found is not None), None)


def _put(value: Any, new: Replacement) -> Any:
    """`value` with its activation replaced."""
    if isinstance(value, Tensor):
        return new if isinstance(new, Tensor) else new(value)
    if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
        return (_put(value[0], new), *value[1:])
    raise DistillError(f"Expected a module that returns a tensor or a tuple to replace its output, got {type(value)}.")


def module_at(root: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path, or an error with suggestions and the children of the deepest valid prefix."""
    with suppress(AttributeError):
        return root.get_submodule(path)
    known, prefix = dict(root.named_modules(remove_duplicate=False)), path
    while prefix not in known:
        prefix = prefix.rpartition(".")[0]
    children = [name for name, _ in known[prefix].named_children()]
    raise DistillError(
        f"{type(root).__name__} has no module {path!r}.{did_you_mean(path, filter(None, known))}"
        f" Under {repr(prefix) if prefix else 'the network'} there are: {', '.join(children) or 'no modules'}."
    )


@contextmanager
def untraced(*networks: nn.Module) -> Iterator[None]:
    """No gradient, evaluation mode, and no trace in a random stream of torch or Python: for a look at networks."""
    modes = [(m, m.training) for network in networks for m in network.modules()]
    devices = {p.device for network in networks for p in network.parameters()}
    # Torch forks the stream of the CPU itself, and knows none of XLA's.
    devices = {d for d in devices if hasattr(getattr(torch, d.type, None), "get_rng_state")}
    kind, numbers = next((d.type for d in devices), "cuda"), sorted(d.index or 0 for d in devices)
    python = random.getstate()
    try:
        for network in networks:
            network.eval()
        with torch.random.fork_rng(devices=numbers, device_type=kind), torch.no_grad():
            yield
    finally:
        random.setstate(python)
        for module, training in modes:
            module.training = training


class Tap:
    """Reads activations of a network by module path.

    Hooks are installed once for each path and do nothing until a forward is recorded: installing and removing them
    around every step would recompile a compiled network each time.

    Args:
        root: The network, unwrapped (without DDP or torch.compile around it).
        paths: Module paths, globs (`"blocks.*.norm1"`), with `:in` for a module's input (`"layer3:in"`).
        clone: Copy what is captured, for modules whose output is overwritten in place.

    Raises:
        DistillError: A path that is not in the network, with suggestions; nothing captured (not called, or compiled
            before); an activation that was overwritten in place, with the module to tap instead; an activation
            without gradient in a network that is being trained (reentrant activation checkpointing).

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    >>> with Tap(net, ["0", "2:in"]) as seen:
    ...     _ = net(torch.ones(5, 4))
    >>> seen["0"].shape, bool((seen["0"].tanh() == seen["2:in"]).all())
    (torch.Size([5, 3]), True)
    """

    def __init__(self, root: nn.Module, paths: Sequence[str] = (), *, clone: bool = False) -> None:
        self.root = root
        self.clone = clone
        self._handles: dict[str, torch.utils.hooks.RemovableHandle] = {}
        self._seen: Seen | None = None
        self._expected: dict[str, int] = {}
        self._missing = 0
        self._stop = False
        self._end = _uncompiled_stop()
        self._trains = False
        self._cut: frozenset[str] = frozenset()
        self._replace: dict[str, Replacement] = {}
        self._context: Any = None
        self.paths = tuple(key for path in paths for key in self.install(path))

    def expand(self, path: str) -> list[str]:
        """The module paths that a path or glob stands for, in the order of the network."""
        name, _, side = path.partition(":")
        if side not in ("", "in"):
            raise DistillError(f"Expected a module path, or a path with ':in' for its input, got {path!r}.")
        suffix = ":in" if side else ""
        if not any(c in name for c in "*?["):
            module_at(self.root, name)
            return [path]
        depth = name.count(".")
        found = [n for n, _ in self.root.named_modules() if n.count(".") == depth and fnmatch.fnmatch(n, name)]
        if not found:
            raise DistillError(f"No module of {type(self.root).__name__} matches {path!r}.")
        return [n + suffix for n in found]

    def install(self, path: str) -> list[str]:
        """Makes a path readable; does nothing when it is already."""
        keys = [path] if path in self._handles else self.expand(path)
        for key in keys:
            if key not in self._handles:
                module = module_at(self.root, key.removesuffix(":in"))
                hook = _TapHook(self, key)
                self._handles[key] = (
                    module.register_forward_pre_hook(hook, with_kwargs=True)
                    if key.endswith(":in")
                    else module.register_forward_hook(hook)
                )
        return keys

    @contextmanager
    def record(
        self,
        keys: Collection[str],
        *,
        stop: bool = False,
        calls: Mapping[str, int] | None = None,
        replace: Mapping[str, Replacement] | None = None,
        cut: Collection[str] = (),
    ) -> Iterator[Seen]:
        """Captures `keys` in the forward that runs inside.

        Args:
            keys: Installed paths.
            stop: Raise `Reached` as soon as all keys are captured; the caller catches it around the forward.
            calls: How often a key's module must have been called before stopping, where that is not once.
            replace: Tensors to put in place of modules' outputs, or what makes them of these, by path.
            cut: Installed paths through whose output no gradient flows back.
        """
        if self._seen is not None:
            raise DistillError(f"{type(self.root).__name__} is already being recorded: taps do not nest.")
        seen = Seen(type(self.root).__name__, keys, self._remedy)
        self._expected = {key: (calls or {}).get(key, 1) for key in keys}
        self._missing = sum(self._expected.values())
        self._replace = {}
        for path, new in (replace or {}).items():
            if path.endswith(":in"):
                raise DistillError(f"Only a module's output can be replaced, got {path!r}: name the module before it.")
            self._replace.update({key: new for key in self.install(path)})
        self._seen, self._stop, self._cut = seen, stop, frozenset(cut)
        self._trains = torch.is_grad_enabled() and self.root.training
        try:
            yield seen
        finally:
            self._seen, self._replace = None, {}

    def _fire(self, key: str, module: nn.Module, value: Any) -> Any:
        seen = self._seen
        if seen is None:
            return None
        replaced = key in self._replace
        if replaced:
            value = _put(value, self._replace[key])
        expected = self._expected.get(key)
        if expected is not None:
            tensor = first_tensor(value)
            if tensor is None:
                raise DistillError(f"Expected a tensor at {key!r}, got {type(value).__name__}: tap another module.")
            if not replaced:
                self._check_gradient(key, module, tensor)
            if seen.count(key) < expected:
                self._missing -= 1
            if torch.compiler.is_compiling():
                # A graph has no version counters to tell an overwritten activation; a copy in it costs next to nothing.
                seen.add(key, tensor.clone(), -1)
            else:
                kept = tensor.clone() if self.clone else tensor
                seen.add(key, kept, -1 if kept.is_inference() else kept._version)
            if self._stop and self._missing == 0:
                self._end()
        if key in self._cut:
            tensor = first_tensor(value)
            return value if tensor is None else _put(value, tensor.detach())
        return value if replaced else None

    def _check_gradient(self, key: str, module: nn.Module, tensor: Tensor) -> None:
        if not self._trains or tensor.requires_grad or not tensor.is_floating_point():
            return
        if torch.is_grad_enabled():  # an input, or what has no weights below it, may well have no gradient
            trained = not key.endswith(":in") and any(p.requires_grad for p in module.parameters())
        else:  # the forward was started with gradients, and something inside has disabled them
            trained = self._is_trained(key.removesuffix(":in"))
        if trained:
            raise DistillError(
                f"The activation at {key!r} of {type(self.root).__name__} has no gradient although its module is being"
                " trained: reentrant activation checkpointing hides it. Use use_reentrant=False"
                " (gradient_checkpointing_kwargs={'use_reentrant': False})."
            )

    def _is_trained(self, path: str) -> bool:
        """Whether the module at a path is trained; one without parameters is what the module around it is."""
        while True:
            parameters = list(self.root.get_submodule(path).parameters())
            if parameters or not path:
                return any(p.requires_grad for p in parameters)
            path = path.rpartition(".")[0]

    def _remedy(self, key: str) -> str:
        """Where to tap instead when an in-place module overwrites what was captured."""
        parent = key.removesuffix(":in").rpartition(".")[0]
        scope = self.root.get_submodule(parent)
        prefix = parent + "." if parent else ""
        names = [prefix + name for name, m in scope.named_children() if getattr(m, "inplace", False)]
        return f"tap {' or '.join(map(repr, names))} instead" if names else "tap the module that overwrites it instead"

    def close(self) -> None:
        """Removes all hooks."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Seen:
        self._context = self.record(self.paths)
        return self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)
        self.close()
