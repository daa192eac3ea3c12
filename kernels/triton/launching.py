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
from triton.tools.tensor_descriptor import TensorDescriptor

knobs: Any = getattr(triton, "knobs")  # noqa: B009  (pyright knows no such attribute)
# Triton's own answer, for an argument of a type that isn't foreseen here.
specialised: Any = getattr(libtriton, "native_specialize_impl", None)

KEPT = 4096  # compiled kernels of one plan; shapes that are constants of a kernel may change from call to call


class Plan:
    """How a kernel is started with arguments of one set of names: `rest` are those by name, in the kernel's order."""

    def __init__(self, kernel: Any, positional: int, named: Sequence[str]) -> None:
        self.kernel = kernel
        self.rest: list[str] = []
        self.options: list[str] = []
        self.sorts: dict[tuple[type, ...], Sort] = {}
        # What isn't the JIT's own (interpreted, tuned) is Triton's to start; so is all on AMD's GPUs, where it looks at
        # the sizes of tensors too.
        self.known = type(kernel) is triton.JITFunction and specialised is not None and torch.version.hip is None
        if self.known:
            names = [p.name for p in kernel.params]
            self.rest = names[positional:]
            self.options = [name for name in named if name not in names]
            self.known = set(self.rest) <= set(named)


class Sort:
    """The calls of a plan whose arguments have the same types, and what was compiled for them."""

    def __init__(self, plan: Plan, types: tuple[type, ...]) -> None:
        of = list(zip(plan.kernel.params, types))
        self.constants = [i for i, (p, _) in enumerate(of) if p.is_constexpr]
        given = [(i, p, t) for i, (p, t) in enumerate(of) if not p.is_constexpr]
        self.tensors = [i for i, _, t in given if issubclass(t, Tensor)]
        self.integers = [i for i, _, t in given if t is int]
        self.specialised = [i for i, p, t in given if t is int and not p.do_not_specialize]
        self.descriptors = [i for i, _, t in given if t is TensorDescriptor]
        plain = (int, float, bool, type(None), TensorDescriptor)
        self.others = [i for i, _, t in given if t not in plain and not issubclass(t, Tensor)]
        self.compiled: dict[Any, tuple[Any, ...]] = {}

    def key(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """All that Triton compiles a kernel anew for, besides the types, options and device: of constants the value, of
        tensors dtype and alignment, of integers whether they are 1 or multiples of 16 and how wide they are."""
        key = [values[i] for i in self.constants]
        for i in self.tensors:
            key += values[i].dtype, values[i].data_ptr() & 15 == 0
        key += [2 if (x := values[i]) == 1 else x & 15 == 0 for i in self.specialised]
        for i in self.integers:
            if not -(1 << 31) <= (x := values[i]) < 1 << 31:
                key += i, x < 1 << 63
        for i in self.descriptors:
            key += values[i].base.dtype, tuple(values[i].block_shape)
        for i in self.others:
            key.append(specialised(BaseBackend, values[i], False, True, True))
        return tuple(key)


_plans: dict[Any, Plan] = {}


def start(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    """kernel[grid](*arguments, **named)."""
    of = (id(kernel), len(arguments), *named)  # the plan holds the kernel: its id is nobody else's
    plan = _plans.get(of)
    if plan is None:
        plan = _plans[of] = Plan(kernel, len(arguments), list(named))
    if not plan.known or kernel.pre_run_hooks or _hooked():
        kernel[grid](*arguments, **named)
        return
    values = (*arguments, *[named[name] for name in plan.rest])
    types = tuple(map(type, values))
    sort = plan.sorts.get(types)
    if sort is None:
        sort = plan.sorts[types] = Sort(plan, types)
    device = driver.active.get_current_device()
    key = (device, *[named[name] for name in plan.options], *sort.key(values))
    found = sort.compiled.get(key)
    if found is None:
        compiled = kernel[grid](*arguments, **named)
        if isinstance(compiled, CompiledKernel):
            if len(sort.compiled) >= KEPT:
                sort.compiled.clear()
            sort.compiled[key] = compiled.run, compiled.function, compiled.packed_metadata, compiled
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
