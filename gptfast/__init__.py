"""gptfast: fused kernels that make GPT models fast and mean the same thing on every machine."""

from __future__ import annotations

import importlib
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


def __getattr__(name: str) -> Any:
    """Everything is imported when it is first asked for, torch too: the command can prepare the process before that."""
    if name == "ops":
        return importlib.import_module("gptfast.ops")
    if name in _LATER:
        value = globals()[name] = getattr(importlib.import_module(_LATER[name]), name)
        return value
    raise AttributeError(f"module 'gptfast' has no attribute {name!r}")
