"""What is special about the MLP activations: accuracy in the tails, NaN and infinity, views, errors at the door."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gptfast.ops import bias_gelu, geglu, swiglu
from gptfast.ops.mlp import bias_gelu_reference, swiglu_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ULP = 2.0**-23


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    return ((got.double() - exact) / exact).abs().nan_to_num(nan=0.0)


def test_silu_keeps_the_accuracy_of_exp(isa: str) -> None:
    """g / (1 + exp(-g)): 2 ulp for exp (what vec.h claims), a half each for the sum, the quotient and the product."""
    gate = torch.linspace(-87, 20, 1_000_003)
    error = relative_error(
        swiglu(gate, torch.ones_like(gate), backend="cpu"), swiglu_reference(gate.double(), gate.double() * 0 + 1)
    )
    assert error.max() <= 3.5 * ULP


def test_gelu_tanh_keeps_the_accuracy_of_exp2(isa: str) -> None:
    """x / (1 + 2^w): 1 ulp for exp2 (what vec.h claims), a half each for the sum and the quotient; and w, rounded five
    times (x^2, both constants, fma, product; one more without an fma), moves 2^w by ln(2) |w| as much."""
    x = torch.linspace(-5.5, 12, 1_000_003)
    exact = bias_gelu_reference(x.double())
    w = (2 * math.log2(math.e) * math.sqrt(2 / math.pi) * (x.double() + 0.044715 * x.double() ** 3)).abs()
    error = relative_error(bias_gelu(x, backend="cpu"), exact)
    # tanh cancels in the fp64 reference itself where x < 0: 2^-53 / (1 - tanh)
    own = 2.0**-52 * (1 + torch.where(x < 0, (w * math.log(2)).exp(), 0.0))
    assert (error <= 2 * ULP + 6 * 0.5 * ULP * math.log(2) * w + own).all()


def test_gelu_erf_keeps_its_tail(isa: str) -> None:
    """Relative to x * Phi(x) = x erfc(-x / sqrt(2)) / 2: 2 ulp for exp, whose argument's roundings weigh x^2 / 2, 2 for
    the polynomial and its argument, a half each for 3 products and 1 - q."""
    x = torch.linspace(-12.5, 12.5, 1_000_003)
    exact = x.double() * torch.special.erfc(-x.double() * math.sqrt(0.5)) / 2
    error = relative_error(bias_gelu(x, approximate="none", backend="cpu"), exact)
    assert (error <= (2 + 2 + 4 * 0.5 + x.double().square() / 2) * ULP).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_once(dtype: torch.dtype, isa: str) -> None:
    """The shorter polynomial's 2^-18, and 2^-24 of an exponent below 2^5 as often as it is rounded, are nothing beside
    half a unit in the last place: every value there is."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = x[(x > -5) & (x < 12)]
    wide, info = x.double(), torch.finfo(dtype)
    for got, exact in (
        (swiglu(x, torch.ones_like(x), backend="cpu"), swiglu_reference(wide, torch.ones_like(wide))),
        (bias_gelu(x, backend="cpu"), bias_gelu_reference(wide)),
        (bias_gelu(x, approximate="none", backend="cpu"), bias_gelu_reference(wide, approximate="none")),
    ):
        ulp = info.eps * (2.0 ** exact.abs().log2().floor()).clamp(min=info.smallest_normal)
        assert ((got.double() - exact).abs() <= 0.5 * ulp + 2.0**-16 * exact.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_nan_and_infinity_are_those_of_the_formula(dtype: torch.dtype, approximate: str, isa: str) -> None:
    huge = torch.finfo(dtype).max
    x = torch.tensor(
        [float("nan"), float("inf"), -float("inf"), huge, -huge, 0.0, -0.0, -200.0, 100.0] * 3, dtype=dtype
    )
    wide = x.double()
    for got, wanted in (
        (bias_gelu(x, approximate=approximate, backend="cpu"), torch.nn.functional.gelu(wide, approximate=approximate)),
        (swiglu(x, torch.ones_like(x), backend="cpu"), torch.nn.functional.silu(wide)),
        (geglu(x, -torch.ones_like(x), approximate=approximate, backend="cpu"),
         -torch.nn.functional.gelu(wide, approximate=approximate)),
    ):  # fmt: skip
        assert torch.equal(got.nan_to_num(nan=7.0), wanted.to(dtype).nan_to_num(nan=7.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [swiglu, geglu])
def test_halves_of_one_tensor_give_the_bits_of_two(op: Any, dtype: torch.dtype, isa: str) -> None:
    torch.manual_seed(0)
    fused = torch.randn(3, 4, 2 * 97, dtype=dtype)
    gate, up = fused.chunk(2, -1)
    wanted = op(gate.contiguous(), up.contiguous(), backend="cpu")
    assert torch.equal(op(gate, up, backend="cpu"), wanted)
    assert torch.equal(op(gate.transpose(0, 1), up.transpose(0, 1), backend="cpu"), wanted.transpose(0, 1))
    assert torch.equal(op(gate, up.contiguous(), backend="cpu"), wanted)


def test_x_plus_bias_is_not_rounded(isa: str) -> None:
    """256 + 1 is no bfloat16: gelu of the sum is 257, which rounds to even, and with a bias of 3 it is 259 -> 260."""
    x = torch.full((1, 2), 256.0, dtype=torch.bfloat16)
    got = bias_gelu(x, torch.tensor([1.0, 3.0], dtype=torch.bfloat16), backend="cpu")
    assert got.tolist() == [[256.0, 260.0]]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x: bias_gelu(x, torch.zeros(7)), r"bias_gelu: expected bias \(8,\) of x's dtype, got \(7,\) float32"),
        (lambda x: bias_gelu(x, torch.zeros(8).half()), r"expected bias \(8,\) of x's dtype, got \(8,\) float16"),
        (lambda x: bias_gelu(x, approximate="erf"), r"expected approximate to be 'none' or 'tanh', got 'erf'"),
        (lambda x: bias_gelu(x.long()), r"bias_gelu: expected x \(..., C\) of floats, got \(2, 8\) int64"),
        (lambda x: swiglu(x, x[:1]), r"swiglu: expected up like gate \(2, 8\) float32, got \(1, 8\) float32"),
        (lambda x: swiglu(x, x.half()), r"swiglu: expected up like gate \(2, 8\) float32, got \(2, 8\) float16"),
        (lambda x: geglu(x, x[:, :4]), r"geglu: expected up like gate \(2, 8\) float32, got \(2, 4\) float32"),
        (lambda x: geglu(x, x, approximate="no"), r"geglu: expected approximate to be 'none' or 'tanh', got 'no'"),
        (lambda x: geglu(x.long(), x), r"geglu: expected gate \(..., C\) of floats, got \(2, 8\) int64"),
    ],
)
def test_a_wrong_argument_is_one_sentence(call: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call(torch.zeros(2, 8))


@pytest.mark.parametrize("bits", [0x7FFF, 0xFFFF, 0x7FC0, 0xFF81, 0x7F81])
@pytest.mark.parametrize("column", [0, 1, 70, 129])
def test_every_nan_stays_one_in_bf16(bits: int, column: int, isa: str) -> None:
    """Rounding by an addition could make zero or infinity of some."""
    x, other = torch.randn(2, 130).bfloat16(), torch.randn(2, 130).bfloat16()
    x[0, column] = other[1, column] = torch.tensor(bits, dtype=torch.int64).to(torch.int16).view(torch.bfloat16)
    where = x.isnan() | other.isnan()
    for op in (swiglu, geglu):
        assert torch.equal(op(x, other, backend="cpu").isnan(), where)
    for approximate in ("tanh", "none"):
        assert torch.equal(bias_gelu(x, approximate=approximate, backend="cpu").isnan(), x.isnan())
        y = bias_gelu(x, other[1], approximate=approximate, backend="cpu")
        assert torch.equal(y.isnan(), x.isnan() | other[1].isnan())
