"""Every op x backend x instruction set x dtype x case against the fp64 reference, with derived tolerances, and bitwise
across batch sizes, places in the batch and thread counts. All of it comes from the op pages; nothing is added here.

One test is one op, case and dtype: the fp64 reference is computed once and every backend is held against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gptfast import ops
from gptfast.kernels import reason_missing
from gptfast.ops.spec import Case, Op, double, map_tensors, outputs, tolerance, written


def conformance() -> list[Any]:
    return [
        pytest.param(
            *(op, case, dtype),
            id=f"{op.name}-{case.name}-{str(dtype).removeprefix('torch.')}",
            marks=[pytest.mark.slow] if "big" in case.tags else [],
        )
        for op in ops.pages().values()
        for case in op.cases()
        for dtype in op.dtypes
    ]


def kernels() -> Iterator[str]:
    """Each backend that has kernels on this machine by name; for the CPU, with each of its instruction sets in use."""
    if reason_missing("cpu") is not None:
        return
    from gptfast import _cpu

    before = _cpu.isa()
    try:
        for isa in _cpu.isas():
            _cpu.use_isa(isa)
            yield f"cpu ({isa})"
    finally:
        _cpu.use_isa(before)


def call(op: Op, arguments: dict[str, Any], backend: str, threads: int = 2) -> list[Tensor]:
    """The outputs and the mutated arguments, computed on copies."""
    mine = arguments | map_tensors(Tensor.clone, {k: arguments[k] for k in op.mutates if k in arguments})
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = outputs(op.function(**mine, backend=backend))
    finally:
        torch.set_num_threads(before)
    return result + written(op, mine)


def expected(op: Op, arguments: dict[str, Any]) -> list[tuple[Tensor, float | None]]:
    """Of each output: the value, and the largest error that a kernel may make (None where it must be equal)."""
    if op.exact:
        return [(w, None) for w in _of(op, op.reference, arguments)]
    exact = _of(op, op.reference, double(arguments))
    plain = _of(op, op.plain or op.baseline or op.reference, arguments)
    assert len(exact) == len(plain)
    return [(e, tolerance(p, e) if p.is_floating_point() else None) for e, p in zip(exact, plain)]


def _of(op: Op, function: Any, arguments: dict[str, Any]) -> list[Tensor]:
    mine = map_tensors(Tensor.clone, arguments)
    return outputs(function(**mine)) + written(op, mine)


def check(got: list[Tensor], wanted: list[tuple[Tensor, float | None]], name: str) -> None:
    assert len(got) == len(wanted), name
    for g, (exact, limit) in zip(got, wanted):
        assert g.shape == exact.shape, name
        if limit is None:
            assert torch.equal(g, exact), f"{name}: not equal"
            continue
        finite = exact.isfinite()
        assert _same(g.double()[~finite], exact[~finite].double()), f"{name}: infinities and NaN differ"
        error = (g.double() - exact)[finite].abs()
        assert not error.isnan().any(), f"{name}: NaN"
        worst = error.max().item() if error.numel() else 0.0
        assert worst <= limit, f"{name}: max |error| {worst:.3g} > {limit:.3g}"


def check_rows(op: Op, arguments: dict[str, Any], whole: list[Tensor], backend: str, name: str) -> None:
    """Bitwise: one thread or two, alone or in a batch, wherever in the batch."""
    one = call(op, arguments, backend, threads=1)
    assert all(_same(a, b) for a, b in zip(one, whole)), f"{name}: one thread and two differ"
    if op.take is None or arguments.get("dropout_p"):  # a dropout mask depends on the place
        return
    rows = op.batch(arguments)
    if rows == 0:
        return
    for b in {0, rows // 2, rows - 1}:
        alone = call(op, op.take(arguments, b), backend)
        assert all(_same(w[b : b + 1], row) for w, row in zip(whole, alone)), f"{name}: row {b} differs alone"


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(nan=1e9), b.nan_to_num(nan=1e9))


@pytest.mark.parametrize(("op", "case", "dtype"), conformance())
def test_every_backend_means_the_same(op: Op, case: Case, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    wanted = expected(op, arguments)
    check(call(op, arguments, "reference"), wanted, "reference")
    served = ops.explain(op.function, **arguments)
    for name in kernels():
        backend = name.partition(" ")[0]
        if backend in served.passed_over:  # its kernel says that it doesn't take such a call; the reference serves it
            continue
        got = call(op, arguments, backend)
        check(got, wanted, name)
        check_rows(op, arguments, got, backend, name)


@pytest.mark.skipif(reason_missing("cpu") is not None, reason="the CPU kernels are not built")
@pytest.mark.parametrize("op", [op for op in ops.pages().values() if op.kernels], ids=lambda op: op.name)
def test_the_kernels_serve_most_cases(op: Op) -> None:
    """No op passes above because its kernel declines everything."""
    for dtype in op.dtypes:
        served = [ops.explain(op.function, **case.arguments(dtype)).backend == "cpu" for case in op.cases()]
        assert sum(served) > len(served) / 2, f"{op.name}, {dtype}: {sum(served)} of {len(served)} cases"
