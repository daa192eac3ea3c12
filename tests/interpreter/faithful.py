"""Triton's interpreter made faithful: the numbers of a GPU (numerics.py), and memory watched (memory.py). And faster:
left to itself it replaces all functions of triton.language anew at each call of a device function, which takes longer
than what most of them do, and never puts back what it replaced there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any


def patched_once(patch: Callable[[Any], Any], scope: type) -> Callable[[Any], Any]:
    """The interpreter's _patch_lang, which replaces everything where a launch begins, and then nothing until the launch
    puts it back."""
    import triton.language as tl

    everywhere = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    current: list[Any] = []

    def patch_lang(fn: Any) -> Any:
        if current:
            return scope()
        made = patch(everywhere)
        # Triton 3.6 asks NumPy for the int of an array of one, which NumPy 2.4 no longer gives.
        made.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
        restore = made.restore

        def put_back() -> None:
            current.clear()
            restore()

        made.restore = put_back
        current.append(made)
        return made

    return patch_lang


def looked_up_once(numpy_type: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The interpreter's _get_np_dtype, which makes a table of all types at each call."""
    import triton.language as tl

    known: dict[str, Any] = {}

    def get_np_dtype(dtype: Any) -> Any:
        if type(dtype) is not tl.dtype:  # a pointer's, a block's
            return numpy_type(dtype)
        if (found := known.get(dtype.name)) is None:
            found = known[dtype.name] = numpy_type(dtype)
        return found

    return get_np_dtype


@contextmanager
def faithful() -> Iterator[None]:
    """Within it interpreted kernels round as a GPU does and are watched. For processes with TRITON_INTERPRET=1."""
    from triton.runtime import interpreter

    from tests.interpreter import memory, numerics

    class Builder(memory.Memory, numerics.Numerics, interpreter.InterpreterBuilder):
        """The interpreter's builder, mended."""

    module: Any = interpreter
    mended = {
        "ReduceOps": numerics.Reduce,
        "ScanOps": numerics.Scan,
        "GridExecutor": memory.Executor,
        "_get_np_dtype": looked_up_once(module._get_np_dtype),
        "_patch_lang": patched_once(module._patch_lang, module._LangPatchScope),
    }
    before = {name: getattr(module, name) for name in mended}
    builder = module.interpreter_builder.__class__
    module.interpreter_builder.__class__ = Builder
    vars(module).update(mended)
    try:
        yield
    finally:
        module.interpreter_builder.__class__ = builder
        vars(module).update(before)
