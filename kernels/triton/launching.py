"""Starting a kernel that Triton has compiled before.

Triton's own way, kernel[grid](...), takes some 100 microseconds for a kernel of 40 arguments: it binds them by name,
writes its options out as text and calls hooks that nobody set. Here the compiled kernel is kept under a key that tells
apart all that Triton tells apart, and perhaps more: a kernel kept twice costs no second compilation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import triton
from triton._C import libtriton
from triton.backends.compiler import BaseBackend
from triton.compiler import CompiledKernel
from triton.runtime import driver

knobs: Any = getattr(triton, "knobs")  # noqa: B009  (pyright knows no such attribute)
# Triton's own answer for an argument of a type that this module doesn't know: a tensor's descriptor.
specialised: Any = getattr(libtriton, "native_specialize_impl", None)

SPECIALISED, NOT_SPECIALISED, CONSTANT = range(3)
KEPT = 4096  # compiled kernels of one plan; shapes that are constants of a kernel may change from call to call


class Plan:
    """How one kernel is started with arguments of one set of names: `rest` are those by name, in its own order."""

    def __init__(self, kernel: Any, positional: int, named: Sequence[str]) -> None:
        self.kernel = kernel
        self.compiled: dict[Any, tuple[Any, ...]] = {}
        self.rest: list[str] = []
        self.options: list[str] = []
        self.kinds: list[int] = []
        # What isn't the JIT's own (interpreted, tuned) is Triton's to start; so is all on AMD's GPUs, where Triton looks
        # at the sizes of tensors too.
        self.known = type(kernel) is triton.JITFunction and specialised is not None and torch.version.hip is None
        if self.known:
            names = [p.name for p in kernel.params]
            self.rest = names[positional:]
            self.options = [name for name in named if name not in names]
            self.kinds = [
                CONSTANT if p.is_constexpr else NOT_SPECIALISED if p.do_not_specialize else SPECIALISED
                for p in kernel.params
            ]
            self.known = set(self.rest) <= set(named)


_plans: dict[Any, Plan] = {}


def start(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    """kernel[grid](*arguments, **named)."""
    device = driver.active.get_current_device()
    of = (id(kernel), len(arguments), *named)
    plan = _plans.get(of)
    if plan is None:
        plan = _plans[of] = Plan(kernel, len(arguments), list(named))
    if not plan.known or kernel.pre_run_hooks or _hooked():
        kernel[grid](*arguments, **named)
        return
    values = (*arguments, *[named[name] for name in plan.rest])
    key = key_of(plan, values, [named[name] for name in plan.options], device)
    found = plan.compiled.get(key)
    if found is None:
        compiled = kernel[grid](*arguments, **named)
        if isinstance(compiled, CompiledKernel):
            if len(plan.compiled) >= KEPT:
                plan.compiled.clear()
            plan.compiled[key] = compiled.run, compiled.function, compiled.packed_metadata, compiled
        return
    run, function, metadata, _ = found
    x, y, z = (*grid, 1, 1)[:3]
    run(x, y, z, driver.active.get_current_stream(device), function, metadata, None, None, None, *values)


def _hooked() -> bool:
    """Whether something wants to know of each launch: a profiler. Each is a chain of calls, or a call, or None."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(enter is not None and getattr(enter, "calls", True)) or bool(
        leave is not None and getattr(leave, "calls", True)
    )


def key_of(plan: Plan, values: Sequence[Any], options: Sequence[Any], device: int) -> tuple[Any, ...]:
    """All that Triton compiles a kernel anew for, of a call's arguments and options."""
    key = [device, *options]
    add = key.append
    for x, kind in zip(values, plan.kinds):
        t = type(x)
        if kind == CONSTANT:
            add(t)  # 1 and True are the same key otherwise
            add(x)
        elif t is int:
            # The types are int32, int64 and uint64; of 1 a constant is made, and a multiple of 16 is known as one.
            add(0 if -(1 << 31) <= x < 1 << 31 else 1 if x < 1 << 63 else 2)
            if kind == SPECIALISED:
                add(1 if x == 1 else x % 16 == 0 and 16)
        elif x is None or t is float or t is bool:
            add(t)
        elif isinstance(x, Tensor):
            add(x.dtype)
            add(x.data_ptr() % 16 == 0)
        else:
            add(specialised(BaseBackend, x, False, kind == SPECIALISED, True))
    return tuple(key)
