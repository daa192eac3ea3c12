"""Which backends are here and, for each that isn't, the reason as a sentence.

The kernels live in kernels/<backend> at the top of the repository and are installed as gptfast.kernels.<backend>.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

BACKENDS = ("cpu", "triton", "cuda")
TRITON = (3, 6)  # the oldest version that the kernels are tested with

_checkout = Path(__file__).parents[2] / "kernels"
if (_checkout / "cpu" / "bindings.cpp").exists():  # running from a checkout: the kernels are where they are written
    __path__.append(str(_checkout))


@cache
def reason_missing(backend: str) -> str | None:
    """None if the backend can be used, else why not and what mends it."""
    if backend == "cpu":
        try:
            importlib.import_module("gptfast._cpu")
        except ImportError as error:
            return (
                f"the C++ extension gptfast._cpu is not built ({error}); install CMake and a C++20 compiler "
                "(Debian: apt install g++ cmake) and reinstall gptfast-kernels"
            )
        return None
    if backend == "triton":
        return _without_triton()
    return f"this version of gptfast has no {backend} kernels yet"


def interpreted() -> bool:
    """Whether Triton's kernels are interpreted in this process: slowly, on the CPU, to be tested. Triton reads the
    variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def compile_only() -> None:
    """From now on this process records and compiles Triton's kernels, for any machine, and runs none."""
    global _compiling
    _compiling = True
    reason_missing.cache_clear()


_compiling = False


def _without_triton() -> str | None:
    """Why Triton's kernels can't run here."""
    try:
        triton: Any = importlib.import_module("triton")
        version = tuple(int(n) for n in triton.__version__.split(".")[:2])
    except Exception as error:  # it has native parts, and what goes wrong in them has many types
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return "Triton isn't installed; pip install triton (a PyTorch built for GPUs on Linux brings its own)"
        return f"Triton is installed, but can't be imported ({error}); reinstall it"
    if version < TRITON:
        return f"Triton {triton.__version__} is too old: these kernels are for {TRITON[0]}.{TRITON[1]} and later"
    if _compiling or interpreted() or torch.cuda.is_available():
        return None
    return (
        "Triton is here but no GPU: PyTorch sees no CUDA or ROCm device, or was built without them; only tests want "
        "TRITON_INTERPRET=1, set before Python starts, which runs the kernels on the CPU a thousand times slower"
    )


@dataclass(frozen=True)
class Kernel:
    """One op of one backend."""

    function: Callable[..., Any]
    supports: Callable[..., str | None]  # None, or the reason why it can't serve such a call
    prepare: Callable[..., Callable[..., Any]] | None = None  # the function for all calls with such arguments


@cache
def find(backend: str, page: str, function: str) -> Kernel | str:
    """`function` of the module gptfast.kernels.<backend>.<page>, or the reason why there is none.

    A module that serves several ops has supports_<function> for each; one that serves a single op, just supports.
    prepare_<function>, where there is one, is for dispatch.prepared.
    """
    if (reason := reason_missing(backend)) is not None:
        return reason
    name = f"gptfast.kernels.{backend}.{page}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return f"the {backend} backend has no kernel for {page}"
    if not hasattr(module, function):
        return f"the {backend} backend has no kernel for {page}.{function}"
    supports = getattr(module, f"supports_{function}", None) or module.supports
    return Kernel(getattr(module, function), supports, getattr(module, f"prepare_{function}", None))
