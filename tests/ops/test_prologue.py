"""The launch before a linear as its prologue: the bits of the two launches, without the rows between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gptfast import ops
from gptfast.quantize import PackedWeight, QuantizedWeight

BEFORE = {"layer_norm": 1, "rms_norm": 2, "bias_gelu": 3, "swiglu": 4, "geglu": 5}  # Linear::Before of kernels.h


def outputs(op: str, x: Tensor, other: Tensor, weight: Tensor, dropout_p: float) -> tuple[Tensor, Tensor | None]:
    """y of the op and, for a norm, its sum."""
    if op == "bias_gelu":
        return ops.bias_gelu(x, other[0], backend="cpu"), None
    if op in ("swiglu", "geglu"):
        return getattr(ops, op)(x, other, backend="cpu"), None
    bias = (weight,) if op == "layer_norm" else ()
    return getattr(ops, op)(x, weight, *bias, residual=other, dropout_p=dropout_p, seed=3, backend="cpu")


def launch(call: Callable[[], Any]) -> tuple[Any, tuple[str, int, dict[str, Any]]]:
    """What a call of one launch returns, and the launch."""
    from gptfast import _cpu

    launches: list[Any] = []
    _cpu.record(launches)
    try:
        result = call()
    finally:
        _cpu.record(None)
    assert len(launches) == 1
    return result, launches[0]


@pytest.mark.parametrize("op", BEFORE)
@pytest.mark.parametrize("kind", ["int8", "exact", "packed"])
@pytest.mark.parametrize("M", [1, 3, 8, 9, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prologue_gives_the_bits_of_its_launch(isa: str, kind: str, op: str, M: int, dtype: torch.dtype) -> None:
    from gptfast import _cpu

    K, N = 96, 77
    x, other = torch.randn(M, 2 * K).to(dtype)[:, :K], torch.randn(M, K).to(dtype)
    norm_weight = torch.randn(K).to(dtype if M > 1 else torch.float32)
    values, activations = torch.randn(N, K), "int8" if kind == "int8" else "exact"
    weight = PackedWeight.pack(values) if kind == "packed" else QuantizedWeight.quantize(values, "q4_1")
    (y, total), (_, _, source) = launch(lambda: outputs(op, x, other, norm_weight, 0.25 if M == 8 else 0.0))
    expected, (name, _, fields) = launch(lambda: ops.linear(y, weight, activations=activations, backend="cpu"))

    got, again = torch.empty_like(expected), torch.full_like(x.contiguous(), float("nan"))
    mean, rstd = torch.empty(M), torch.empty(M)
    workspace = torch.empty(M * K, dtype=torch.float32)
    source = {**source, "y": 0}
    if total is not None:
        source |= {"sum": again.data_ptr(), "rstd": rstd.data_ptr()}
    if op == "layer_norm":
        source["mean"] = mean.data_ptr()
    for shared in (0, workspace.data_ptr()):
        fused = {
            **fields,
            "y": got.data_ptr(),
            "x": 0,
            "workspace": shared,
            "before": BEFORE[op],
            "source": (op, source),
        }
        for out in (got, again, mean, rstd):
            out.fill_(float("nan"))
        plan = _cpu.Plan([(name, 2, fused)])
        plan.run(2)
        del plan
        assert torch.equal(got, expected)
        if total is not None:
            assert torch.equal(again, total)
            assert rstd.isfinite().all()
        if op == "layer_norm" and total is not None:
            assert (mean - total.float().mean(-1)).abs().max() < 0.02
