"""gptfast: fused kernels that make GPT models fast and mean the same thing on every machine."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "Choice",
    "Generation",
    "LanguageModel",
    "backends",
    "explain",
    "load",
    "ops",
    "patch",
    "patched",
    "unpatch",
]

if TYPE_CHECKING:
    from gptfast import ops
    from gptfast.generate import Generation, LanguageModel, load
    from gptfast.ops.dispatch import BackendError, Choice, backends, explain
    from gptfast.patch import patch, patched, unpatch

_LATER = {
    **dict.fromkeys(("BackendError", "Choice", "backends", "explain"), "gptfast.ops.dispatch"),
    **dict.fromkeys(("Generation", "LanguageModel", "load"), "gptfast.generate"),
    **dict.fromkeys(("patch", "patched", "unpatch"), "gptfast.patch"),
}


@contextmanager
def uncollected() -> Iterator[None]:
    """Nobody looks for garbage in cycles meanwhile. A vocabulary's or a module's many objects set that off, a search
    through all that PyTorch has made takes 0.1 s, and there are no cycles to be found."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def __getattr__(name: str) -> Any:
    """Everything is imported when it is first asked for, torch too: the command can prepare the process before that."""
    if name == "ops" or name in _LATER:
        with uncollected():
            module = importlib.import_module(_LATER.get(name, "gptfast.ops"))
        value = globals()[name] = module if name == "ops" else getattr(module, name)
        return value
    raise AttributeError(f"module 'gptfast' has no attribute {name!r}")
