"""The losses as pure functions: tensors in, a tensor out; no state and no modules.

Differences are computed in float32 whatever the inputs and the autocast (float64 stays float64). `reduction="mean"` is
the mean over the examples of the batch, `"sum"` their sum, `"none"` one value for each example `[B]`. A ValueError says
what is wrong with the inputs.

What the `__all__` of a module in this folder names is here too, so a new loss is a new file and nothing else.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

__all__ = []

for _name in (info.name for info in iter_modules(__path__) if not info.name.startswith("_")):
    _module = import_module(f"{__name__}.{_name}")
    # A function takes the place of the module of its name.
    globals().update({name: getattr(_module, name) for name in _module.__all__})
    __all__ += _module.__all__

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
