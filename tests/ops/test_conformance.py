"""Every op x backend x instruction set x dtype x case against the fp64 reference, with derived tolerances, and bitwise
across batch sizes, places in the batch, thread counts and runs. All of it comes from the op pages; nothing is added
here.

One test is one op, case and dtype: the fp64 reference is computed once, on the CPU, and every backend of the session
(tests/where.py) is held against it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gptfast import ops
from gptfast.ops.spec import Case, Op, map_tensors, outputs, written
from tests import where
from tests.ops.limits import Limits, of_outputs, same


def conformance() -> list[Any]:
    return [
        pytest.param(
            *(op, case, dtype),
            id=f"{op.name}-{case.name}-{str(dtype).removeprefix('torch.')}",
            marks=[pytest.mark.slow] if "big" in case.tags or where.waits(op, number, dtype) else [],
        )
        for op in ops.pages().values()
        for number, case in enumerate(op.cases())
        if not where.too_large(case)
        for dtype in op.dtypes
    ]


def call(op: Op, arguments: dict[str, Any], backend: str, threads: int = 2) -> list[Tensor]:
    """The outputs and the mutated arguments, computed on copies on this session's device, as tensors of the CPU."""
    arguments = where.here(op, arguments)
    mine = arguments | map_tensors(Tensor.clone, {k: arguments[k] for k in op.mutates if k in arguments})
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = outputs(op.function(**mine, backend=backend))
    finally:
        torch.set_num_threads(before)
    return [t.cpu() for t in result + written(op, mine)]


def check(got: list[Tensor], limits: Limits, name: str) -> None:
    assert len(got) == len(limits.exact), name
    for key, one in enumerate(got):
        limits.check(key, one, name)


def check_rows(op: Op, arguments: dict[str, Any], whole: list[Tensor], backend: str, name: str) -> None:
    """Bitwise: one thread or two, twice on a GPU, alone or in a batch, wherever in the batch."""
    if not where.INTERPRETED:
        again = call(op, arguments, backend, threads=1)
        assert all(same(a, b) for a, b in zip(again, whole)), f"{name}: one thread and two, or two runs, differ"
    if op.take is None or arguments.get("dropout_p"):  # a dropout mask depends on the place
        return
    rows = op.batch(arguments)
    if rows == 0:
        return
    for b in where.some_rows(rows):
        alone = call(op, op.take(arguments, b), backend)
        assert all(same(w[b : b + 1], row) for w, row in zip(whole, alone)), f"{name}: row {b} differs alone"


@pytest.mark.parametrize(("op", "case", "dtype"), conformance())
def test_every_backend_means_the_same(op: Op, case: Case, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    where.skip_unfit(arguments)
    refused = {b: where.refusal(op, where.here(op, arguments), b) for b in where.backends()}
    if not where.on_the_cpu() and all(refused.values()):
        pytest.skip("; ".join(filter(None, refused.values())))
    limits = of_outputs(op, case, dtype, arguments)
    if where.on_the_cpu():  # elsewhere its arithmetic is another PyTorch's
        check(call(op, arguments, "reference"), limits, "reference")
    for name in where.kernels(op.name):
        backend = name.partition(" ")[0]
        if refused[backend]:  # its kernel says that it doesn't take such a call; the reference serves it
            continue
        got = call(op, arguments, backend)
        check(got, limits, name)
        check_rows(op, arguments, got, backend, name)


@pytest.mark.parametrize("backend", where.backends())
@pytest.mark.parametrize("op", ops.pages().values(), ids=lambda op: op.name)
def test_the_kernels_serve_most_cases(op: Op, backend: str) -> None:
    """No op passes above because its kernel declines everything."""
    if backend not in op.kernels:
        pytest.skip(f"{backend} has no kernel for {op.name}")
    for dtype in op.dtypes:
        served = [
            not where.refusal(op, where.here(op, case.unread(dtype)), backend)
            for case in op.cases()
            if not where.too_large(case)
        ]
        assert sum(served) > len(served) / 2, f"{op.name}, {dtype}: {sum(served)} of {len(served)} cases"
