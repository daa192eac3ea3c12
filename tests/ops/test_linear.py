"""What is special about linear: int8 activations against their own meaning, error bounds, bits across row counts."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast import ops
from gptfast.kernels import reason_missing
from gptfast.ops import dispatch
from gptfast.ops.linear import reference, round_activations
from gptfast.ops.spec import tolerance
from gptfast.quantize import PackedWeight, QuantizedWeight

KINDS = ("q8_0", "q4_0", "q4_1")
needs_cpu = pytest.mark.skipif(reason_missing("cpu") is not None, reason="the CPU extension is not built")


def isas() -> list[str]:
    if reason_missing("cpu") is not None:
        return []
    from gptfast import _cpu

    return _cpu.isas()


@pytest.fixture(params=isas())
def isa(request: pytest.FixtureRequest):
    from gptfast import _cpu

    before = _cpu.isa()
    _cpu.use_isa(request.param)
    yield request.param
    _cpu.use_isa(before)


def problem(M: int, N: int, K: int, kind: str, seed: int = 0) -> tuple[Tensor, QuantizedWeight]:
    g = torch.Generator().manual_seed(seed)
    weight = QuantizedWeight.quantize(torch.randn(N, K, generator=g) + 0.1, kind)
    return torch.randn(M, K, generator=g), weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("M", [1, 5, 8, 33])
def test_int8_is_exact_on_rounded_activations(isa: str, kind: str, M: int) -> None:
    """Far below the rounding of x: at most twice the error of PyTorch's fp32 product on the rounded values."""
    x, weight = problem(M, 50, 576, kind)
    got = ops.linear(x, weight, activations="int8", backend="cpu")
    exact = reference(x.double(), weight, activations="int8")
    plain = F.linear(round_activations(x), weight.dequantize())
    assert (got.double() - exact).abs().max() <= tolerance(plain, exact)


@needs_cpu
@pytest.mark.parametrize("kind", KINDS)
def test_int8_keeps_the_bound_that_the_page_states(kind: str) -> None:
    x, weight = problem(40, 200, 576, kind)
    values = weight.dequantize().double()
    exact = F.linear(x.double(), values)
    error = (ops.linear(x, weight, activations="int8") - exact).abs()
    scale = x.unflatten(-1, (-1, 32)).abs().amax(-1).double() / 127
    bound = F.linear(scale / 2, values.abs().unflatten(-1, (-1, 32)).sum(-1))
    assert (error <= bound * (1 + 1e-5)).all()
    rms = (error.square().mean() / exact.square().mean()).sqrt()
    assert 0.001 < rms < 0.0075, "normal x: uniform rounding errors of scale / sqrt(12) give 0.6%"


@pytest.mark.parametrize("kind", KINDS)
def test_int8_at_the_ends_of_the_range(isa: str, kind: str) -> None:
    """Every whole number at its largest: 16-bit sums would show an overflow, and -128 a wrong sign."""
    raw_q = {"q8_0": [-128, 127], "q4_0": [0, 255], "q4_1": [0, 255]}[kind]
    blocks = []
    for q in raw_q:
        scales = torch.tensor([1.0] * (2 if kind == "q4_1" else 1), dtype=torch.float16).view(torch.uint8)
        quants = torch.full((32 if kind == "q8_0" else 16,), q, dtype=torch.int16).to(torch.uint8)
        blocks.append(torch.cat((scales, quants)).repeat(2))
    weight = QuantizedWeight.from_blocks(torch.cat(blocks), kind, (2, 64))
    x = torch.cat((torch.full((12, 64), 127.0), torch.full((12, 64), -127.0)))
    got = ops.linear(x, weight, activations="int8", backend="cpu")
    assert torch.equal(got, reference(x.double(), weight).float())  # whole numbers below 2^24: no rounding anywhere


@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_zero_tiny_and_unusable_values(isa: str, activations: str) -> None:
    x, weight = problem(4, 20, 96, "q4_1")
    x[0] = 0
    x[1, :32] = 1e-40
    x[2, 40] = float("inf")
    x[3, 95] = float("nan")
    got = ops.linear(x, weight, activations=activations, backend="cpu")
    assert (got[0] == 0).all()
    assert got[1].isfinite().all()
    assert not got[2].isfinite().any()
    assert got[3].isnan().all()


FLOATS = ("float32", "bfloat16", "float16")
WEIGHTS = (*FLOATS, *(f"packed-{dtype}" for dtype in FLOATS), *KINDS)


@needs_cpu
@pytest.mark.parametrize(
    ("kind", "activations"), [*((kind, "exact") for kind in WEIGHTS), *((kind, "int8") for kind in KINDS)]
)
@pytest.mark.parametrize("K", [96, 1312])
def test_bits_do_not_depend_on_the_number_of_rows(isa: str, kind: str, activations: str, K: int) -> None:
    """Every way through the kernels: one row, few, streamed, blocked; the row count crosses each tile's height."""
    if kind in KINDS:
        x, weight = problem(70, 77, K, kind)
    else:
        x, weight = torch.randn(70, K), torch.randn(77, K).to(getattr(torch, kind.removeprefix("packed-")))
        weight = PackedWeight.pack(weight) if kind.startswith("packed") else weight
    whole = ops.linear(x, weight, activations=activations, backend="cpu")
    for M in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 20, 29, 32, 48, 49, 61):
        assert torch.equal(ops.linear(x[-M:], weight, activations=activations, backend="cpu"), whole[-M:]), M


@needs_cpu
def test_many_rows_span_several_blocks() -> None:
    x, weight = torch.randn(1300, 100), torch.randn(50, 100)
    packed = PackedWeight.pack(weight)
    for w, activations in (
        (weight, "exact"),
        (packed, "exact"),
        *((problem(1, 50, 96, "q4_1")[1], a) for a in ("exact", "int8")),
    ):
        rows = x[:, : w.shape[1]]
        whole = ops.linear(rows, w, activations=activations, backend="cpu")
        for b in (0, 255, 256, 599, 1299):
            assert torch.equal(ops.linear(rows[b : b + 1], w, activations=activations, backend="cpu"), whole[b : b + 1])


@needs_cpu
def test_strides_shapes_and_bias_dtypes() -> None:
    storage = torch.randn(6, 200)
    weight = torch.randn(24, 128)[:, ::2]
    x = storage[:, 32:96]
    plain = ops.linear(x.contiguous(), weight.contiguous(), backend="cpu")
    assert torch.equal(ops.linear(x, weight, backend="cpu"), plain)
    assert torch.equal(ops.linear(x, torch.cat((weight, weight), 1)[:, :64], backend="cpu"), plain)
    assert torch.equal(ops.linear(x.reshape(2, 3, 64), weight, backend="cpu"), plain.view(2, 3, 24))
    assert torch.equal(ops.linear(x[0], weight, backend="cpu"), plain[0])
    bias = torch.randn(24)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        got = ops.linear(x, weight, bias.to(dtype), backend="cpu" if dtype != torch.float64 else None)
        assert torch.allclose(got, plain + bias.to(dtype).float(), atol=1e-5)
    assert ops.linear(torch.empty(0, 64), weight).shape == (0, 24)


def test_wrong_arguments_are_told_what_was_expected() -> None:
    x, weight = torch.randn(2, 64), torch.randn(3, 64)
    with pytest.raises(ValueError, match=r"expected x \(\.\.\., 64\).*got \(2, 63\)"):
        ops.linear(x[:, :63], weight)
    with pytest.raises(ValueError, match=r"expected bias \(3,\).*got \(2,\)"):
        ops.linear(x, weight, torch.zeros(2))
    with pytest.raises(ValueError, match="expected activations 'exact' for a float weight, got 'int8'"):
        ops.linear(x, weight, activations="int8")
    with pytest.raises(ValueError, match="expected activations 'exact' for a float weight, got 'int8'"):
        ops.linear(x, PackedWeight.pack(weight), activations="int8")
    with pytest.raises(ValueError, match="expected weight"):
        ops.linear(x, weight.int())
    with pytest.raises(ValueError, match="K a multiple of 32"):
        QuantizedWeight.quantize(torch.randn(3, 100), "q4_0")


def test_the_reference_is_differentiable() -> None:
    x, weight = problem(3, 5, 64, "q4_1")
    x.requires_grad_()
    ops.linear(x, weight).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, weight.dequantize().sum(0).expand(3, -1), atol=1e-4)


@needs_cpu
@pytest.mark.parametrize("kind", ["float", "packed", "q8_0"])
def test_weights_of_one_shape_are_prepared_once_and_kept_by_nobody(kind: str) -> None:
    def weight_of() -> Tensor | PackedWeight | QuantizedWeight:
        w = torch.randn(48, 64)
        return w if kind == "float" else PackedWeight.pack(w) if kind == "packed" else QuantizedWeight.quantize(w, kind)

    x, weights = torch.randn(3, 64), [weight_of() for _ in range(3)]
    wanted = [reference(x, w) for w in weights]
    ops.linear(x, weights[0])
    before = len(dispatch._prepared)
    assert all(torch.allclose(ops.linear(x, w), y, atol=1e-5) for w, y in zip(weights, wanted))
    assert len(dispatch._prepared) == before
    gone = weakref.ref(weights[0])
    weights.clear()
    assert gone() is None


@needs_cpu
def test_a_prepared_call_is_chosen_and_checked_again_where_that_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(3, 64), torch.randn(48, 64)
    first = ops.linear(x, weight)
    assert torch.equal(ops.linear(x.clone(), weight), first)
    assert ops.linear(x, weight.requires_grad_()).requires_grad
    weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"expected x \(..., 64\) of floats for weight \(48, 64\), got \(3, 63\)"):
        ops.linear(x[:, 1:], weight)
    monkeypatch.setenv("GPTFAST_BACKEND", "reference")
    assert torch.equal(ops.linear(x, weight), reference(x, weight))
    monkeypatch.delenv("GPTFAST_BACKEND")
    assert torch.equal(ops.linear(x, weight), first)
    with pytest.raises(ValueError, match=r"expected weight .* got list"):
        ops.linear(x, [[1.0]])  # type: ignore[arg-type]


@pytest.mark.parametrize(("rows", "cols"), [(1, 5), (5, 1), (1, 1), (3, 1), (500, 1), (40, 7)])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_one_row_or_column_however_it_lies(rows: int, cols: int, transposed: bool) -> None:
    """A dimension of one may have any stride, and the tensor counts as contiguous."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 8, generator=g).requires_grad_()
    weight = (
        torch.randn(8, cols, generator=g).t() if transposed else torch.randn(cols, 8, generator=g)
    ).requires_grad_()
    bias = torch.zeros(cols, requires_grad=True)
    wide = torch.randn(2 * rows + 3, 2 * cols + 3, generator=g)
    turned = torch.randn(cols + 2, rows, generator=g).t()[:, :cols]
    for dy in (turned, wide[: 2 * rows : 2, : 2 * cols : 2], wide[:rows, :1].expand(rows, cols)):
        found = torch.autograd.grad(ops.linear(x, weight, bias), [x, weight, bias], dy)
        wanted = torch.autograd.grad(F.linear(x, weight, bias), [x, weight, bias], dy)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("kind", "activations"), [("packed", "exact"), ("q8_0", "exact"), ("q8_0", "int8")])
def test_frozen_weights_under_transforms(kind: str, activations: str) -> None:
    """Through the reference; the rounding of activations counts as the identity there too."""
    g = torch.Generator().manual_seed(0)
    values = torch.randn(6, 32, generator=g)
    weight = PackedWeight.pack(values) if kind == "packed" else QuantizedWeight.quantize(values, kind)
    x, tangent = torch.randn(4, 3, 32, generator=g), torch.randn(4, 3, 32, generator=g)

    def run(x: Tensor, backend: str | None = None) -> Tensor:
        return ops.linear(x, weight, activations=activations, backend=backend)

    torch.testing.assert_close(torch.func.vmap(run)(x), run(x))
    both: Any = torch.func.jvp(run, (x,), (tangent,))
    torch.testing.assert_close(both, (run(x), ops.linear(tangent, weight)))
    leaf = x.clone().requires_grad_()
    run(leaf).sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda x: run(x).sum())(x), leaf.grad)
    with pytest.raises(ops.BackendError, match=r"torch\.func"):
        torch.func.vmap(lambda x: run(x, "cpu"))(x)
