"""Triton's interpreter made faithful: the numbers of a GPU (numerics.py), and memory watched (memory.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def faithful() -> Iterator[None]:
    """Within it interpreted kernels round as a GPU does and are watched. For processes with TRITON_INTERPRET=1."""
    from triton.runtime import interpreter

    from tests.interpreter import memory, numerics

    class Builder(memory.Memory, numerics.Numerics, interpreter.InterpreterBuilder):
        """The interpreter's builder, mended."""

    module: Any = interpreter
    before = module.interpreter_builder.__class__, module.ReduceOps, module.ScanOps, module.GridExecutor
    module.interpreter_builder.__class__ = Builder
    module.ReduceOps, module.ScanOps, module.GridExecutor = numerics.Reduce, numerics.Scan, memory.Executor
    try:
        yield
    finally:
        module.interpreter_builder.__class__, module.ReduceOps, module.ScanOps, module.GridExecutor = before
