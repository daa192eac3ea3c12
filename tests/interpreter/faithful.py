"""Triton's interpreter made faithful: the numbers of a GPU (numerics.py), and memory watched (memory.py). And faster
(quick.py): left to itself it replaces all functions of triton.language anew at each launch and each call of a device
function, which takes longer than what most of them do, and never puts back what it replaced there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any


def patched_once(patch: Callable[[Any], Any], scope: type, session: ExitStack) -> Callable[[Any], Any]:
    """The interpreter's _patch_lang, which replaces everything at the first launch, and puts it back where the session
    ends."""
    import triton.language as tl

    everywhere = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    patched = False

    def patch_lang(fn: Any) -> Any:
        nonlocal patched
        if not patched:
            made = patch(everywhere)
            # Triton 3.6 asks NumPy for the int of an array of one, which NumPy 2.4 no longer gives.
            made.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
            session.callback(made.restore)
            patched = True
        return scope()

    return patch_lang


@contextmanager
def faithful() -> Iterator[None]:
    """Within it interpreted kernels round as a GPU does and are watched. For processes with TRITON_INTERPRET=1."""
    from triton.runtime import interpreter

    from tests.interpreter import memory, numerics, quick

    class Builder(memory.Memory, numerics.Numerics, interpreter.InterpreterBuilder):
        """The interpreter's builder, mended."""

    module: Any = interpreter
    session = ExitStack()
    mended = {
        "ReduceOps": numerics.Reduce,
        "ScanOps": numerics.Scan,
        "GridExecutor": memory.Executor,
        "_patch_lang": patched_once(module._patch_lang, module._LangPatchScope, session),
    }
    before = {name: getattr(module, name) for name in mended}
    builder = module.interpreter_builder.__class__
    module.interpreter_builder.__class__ = Builder
    vars(module).update(mended)
    try:
        with session, quick.quick():
            yield
    finally:
        module.interpreter_builder.__class__ = builder
        vars(module).update(before)
