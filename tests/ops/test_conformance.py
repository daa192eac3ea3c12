"""Every op x backend x instruction set x dtype x case against the fp64 reference, with derived tolerances, and bitwise
across batch sizes, places in the batch and thread counts. All of it comes from the op pages; nothing is added here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gptfast import ops
from gptfast.kernels import reason_missing
from gptfast.ops.spec import Case, Op, double, map_tensors, outputs, tolerance


def backends() -> list[str]:
    names = ["reference"]
    if reason_missing("cpu") is None:
        from gptfast import _cpu

        names += [f"cpu-{isa}" for isa in _cpu.isas()]
    return names


def conformance() -> list[Any]:
    return [
        pytest.param(op, case, dtype, id=f"{op.name}-{case.name}-{str(dtype).removeprefix('torch.')}")
        for op in ops.pages().values()
        for case in op.cases()
        for dtype in op.dtypes
    ]


@pytest.fixture(params=backends())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend's name; for the CPU, with one instruction set chosen."""
    name, _, isa = request.param.partition("-")
    if isa:
        from gptfast import _cpu

        before = _cpu.isa()
        _cpu.use_isa(isa)
        yield name
        _cpu.use_isa(before)
    else:
        yield name


def call(op: Op, arguments: dict[str, Any], backend: str) -> list[torch.Tensor]:
    """The outputs and the mutated arguments, computed on copies."""
    mine = {k: v.clone() if k in op.mutates else v for k, v in arguments.items()}
    result = outputs(op.function(**mine, backend=backend))
    return result + [mine[name] for name in op.mutates]


def unsupported(op: Op, arguments: dict[str, Any], backend: str) -> bool:
    return ops.explain(op.function, **arguments).backend != backend and backend != "reference"


@pytest.mark.parametrize(("op", "case", "dtype"), conformance())
def test_equals_the_reference(op: Op, case: Case, dtype: torch.dtype, backend: str, two_threads: None) -> None:
    arguments = case.arguments(dtype)
    if unsupported(op, arguments, backend):
        pytest.skip(f"the page's kernel declines: {ops.explain(op.function, **arguments)}")
    got = call(op, arguments, backend)
    if op.exact:
        wanted = [(w, w) for w in _reference(op, arguments)]
    else:
        exact = _reference(op, double(arguments))
        own = op.plain or op.baseline or op.reference
        mine = map_tensors(torch.Tensor.clone, arguments)
        plain = outputs(own(**mine)) + [mine[name] for name in op.mutates]
        wanted = list(zip(exact, plain))
    assert len(got) == len(wanted)
    for g, (exact, plain) in zip(got, wanted):
        assert g.shape == exact.shape
        if op.exact or not exact.is_floating_point():
            assert torch.equal(g, exact)
            continue
        assert g.dtype == plain.dtype
        limit = tolerance(plain, exact)
        finite = exact.isfinite()
        assert torch.equal(g.double()[~finite].nan_to_num(nan=1e9), exact[~finite].nan_to_num(nan=1e9))
        error = (g.double() - exact)[finite].abs()
        assert not error.isnan().any()
        worst = error.max().item() if error.numel() else 0.0
        assert worst <= limit, f"max |error| {worst:.3g} > {limit:.3g}"


def _reference(op: Op, arguments: dict[str, Any]) -> list[torch.Tensor]:
    mine = map_tensors(torch.Tensor.clone, arguments)
    return outputs(op.reference(**mine)) + [mine[name] for name in op.mutates]


@pytest.mark.parametrize("backend", backends()[1:], indirect=True)  # PyTorch's own ops promise no such thing
@pytest.mark.parametrize(("op", "case", "dtype"), conformance())
def test_a_row_depends_on_itself_alone(op: Op, case: Case, dtype: torch.dtype, backend: str) -> None:
    """Bitwise: one thread or two, alone or in a batch, wherever in the batch."""
    arguments = case.arguments(dtype)
    if unsupported(op, arguments, backend):
        pytest.skip("the page's kernel declines")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = call(op, arguments, backend)
        torch.set_num_threads(2)
        two = call(op, arguments, backend)
    finally:
        torch.set_num_threads(before)
    assert all(_same(a, b) for a, b in zip(one, two))
    rows = op.batch(arguments)
    if op.take is None or rows == 0:
        return
    for b in {0, rows // 2, rows - 1}:
        alone = call(op, op.take(arguments, b), backend)
        assert all(_same(whole[b : b + 1], row) for whole, row in zip(two, alone)), f"row {b}"


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(nan=1e9), b.nan_to_num(nan=1e9))
