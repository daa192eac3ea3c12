"""What is special about layer_norm and rms_norm: dropout, views, NaN and infinity, and the errors at the door."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gptfast.ops import layer_norm, rms_norm
from gptfast.ops.philox import dropout_keep
from gptfast.ops.spec import tolerance

NORMS = [layer_norm, rms_norm]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Norm = Callable[..., Any]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 64), (5, 33), (2, 3, 130), (7, 1), (1, 2)])
@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (2**63 - 1, 3), (-5, 2**32 - 1)])
def test_dropout_is_the_reference_bit_for_bit(
    norm: Norm, dtype: torch.dtype, shape: tuple[int, ...], seed: int, stream: int, isa: str
) -> None:
    """The sum that comes back shows the mask and the scale: residual + x / (1 - p), or the residual alone."""
    torch.manual_seed(0)
    x, residual = torch.randn(shape, dtype=dtype) + 2, torch.randn(shape, dtype=dtype)
    weight = torch.randn(shape[-1], dtype=dtype)
    options: dict[str, Any] = dict(residual=residual, dropout_p=0.3, seed=seed, stream=stream)
    y, total = norm(x, weight, **options, backend="cpu")
    wanted_y, wanted_total = norm(x, weight, **options, backend="reference")
    assert torch.equal(total, wanted_total)
    exact, _ = norm(x.double(), weight.double(), **{**options, "residual": residual.double()}, backend="reference")
    assert (y.double() - exact).abs().max() <= tolerance(wanted_y, exact)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_fraction_and_the_mean(p: float) -> None:
    """Of n = 200,000 elements 1 - p are kept and the mean stays, each within 5 standard deviations."""
    n, C = 200_000, 1000
    x = torch.ones(n // C, C)
    _, total = rms_norm(x, torch.ones(C), residual=torch.zeros_like(x), dropout_p=p, seed=11, backend="cpu")
    kept = (total != 0).double().mean().item()
    deviation = (p * (1 - p) / n) ** 0.5
    assert abs(kept - (1 - p)) <= 5 * deviation
    assert abs(total.double().mean().item() - 1) <= 5 * deviation / (1 - p)
    assert torch.equal(total != 0, dropout_keep((n // C, C), p, 11, 0))


@pytest.mark.parametrize("norm", NORMS)
def test_a_dropped_infinity_is_gone(norm: Norm, isa: str) -> None:
    keep = dropout_keep((4, 40), 0.5, 3, 0)
    x = torch.where(keep, torch.randn(4, 40), float("inf"))
    assert norm(x, torch.ones(40), dropout_p=0.5, seed=3, backend="cpu").isfinite().all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_give_the_bits_of_contiguous_tensors(norm: Norm, dtype: torch.dtype, isa: str) -> None:
    torch.manual_seed(0)
    wide, weights = torch.randn(6, 5, 200, dtype=dtype), torch.randn(101, 2, dtype=dtype)
    weight = weights[:, 1]
    for x in (wide[..., 3:104], wide[::2, 1:4, :101], wide[..., :101].transpose(0, 1), wide[..., :1].expand(6, 5, 101)):
        residual = x.flip(0)
        got = norm(x, weight, residual=residual, backend="cpu")
        wanted = norm(x.contiguous(), weight.contiguous(), residual=residual.contiguous(), backend="cpu")
        assert all(torch.equal(a, b) for a, b in zip(got, wanted))
    columns = wide[0].t()  # the last dimension isn't contiguous
    assert torch.equal(norm(columns, weight[:5], backend="cpu"), norm(columns.contiguous(), weight[:5], backend="cpu"))


@pytest.mark.parametrize("norm", NORMS)
def test_a_hook_may_lay_a_saved_tensor_out_anew(norm: Norm, isa: str) -> None:
    torch.manual_seed(0)
    wide, weight, dy = torch.randn(40, 200), torch.randn(70, requires_grad=True), torch.randn(40, 70)

    def gradients() -> tuple[torch.Tensor, ...]:
        x = wide[:, :70].detach().requires_grad_()
        return torch.autograd.grad(norm(x, weight, backend="cpu"), [x, weight], dy)

    wanted = gradients()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.contiguous()):
        got = gradients()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_spread_over_their_row_alone(norm: Norm, value: float, isa: str) -> None:
    x = torch.randn(3, 70)
    x[1, 69] = value
    got, wanted = (norm(x, torch.ones(70), backend=backend) for backend in ("cpu", "reference"))
    assert torch.equal(got.isnan(), wanted.isnan())
    assert got[1].isnan().any()
    assert got[0].isfinite().all()
    assert got[2].isfinite().all()


def test_a_constant_row_is_the_bias(isa: str) -> None:
    """The variance is centred: a row of equal large values has none, and eps alone is divided by."""
    x = torch.full((2, 64), 4096.0)
    assert torch.equal(layer_norm(x, torch.ones(64), torch.full((64,), 0.5), backend="cpu"), torch.full((2, 64), 0.5))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, r"expected x \(..., C\) of floats, got \(2, 8\) int64"),
        ({"x": torch.tensor(1.0)}, r"expected x \(..., C\) of floats, got \(\) float32"),
        ({"weight": torch.zeros(7)}, r"expected weight \(8,\), got \(7,\) float32"),
        ({"residual": torch.zeros(8)}, r"expected residual like x \(2, 8\) float32, got \(8,\) float32"),
        ({"residual": torch.zeros(2, 8).half()}, r"expected residual like x \(2, 8\) float32, got \(2, 8\) float16"),
        ({"dropout_p": 1.0}, r"expected 0 <= dropout_p < 1, got 1.0"),
        ({"eps": torch.tensor(1e-5)}, r"expected eps as a number, got tensor\(1.0000e-05\)"),
    ],
)
def test_a_wrong_argument_is_one_sentence(norm: Norm, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        norm(**{"x": torch.zeros(2, 8), "weight": torch.ones(8), **change})


def test_a_wrong_bias_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"expected bias like weight \(8,\) float32, got \(8,\) float16"):
        layer_norm(torch.zeros(2, 8), torch.ones(8), torch.zeros(8).half())


# The bits of bf16 NaNs that rounding by an addition could turn into zero or infinity, and of fp32 ones.
NANS = [0x7FFF, 0xFFFF, 0x7FC0, 0xFF81, 0x7F81]
WIDE_NANS = [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC0FFFF]


def from_bits(bits: int, dtype: torch.dtype) -> torch.Tensor:
    whole = torch.int16 if dtype == torch.bfloat16 else torch.int32
    return torch.tensor(bits, dtype=torch.int64).to(whole).view(dtype)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bits", NANS)
@pytest.mark.parametrize("column", [0, 1, 70, 129])
def test_every_nan_stays_one_in_bf16(norm: Norm, bits: int, column: int, isa: str) -> None:
    x, residual = torch.randn(3, 130).bfloat16(), torch.randn(3, 130).bfloat16()
    x[0, column] = residual[1, column] = from_bits(bits, torch.bfloat16)
    y, total = norm(x, torch.ones(130).bfloat16(), residual=residual, backend="cpu")
    assert y[:2].isnan().all() and y[2].isfinite().all()
    where = torch.zeros(3, 130, dtype=torch.bool)
    where[:2, column] = True
    assert torch.equal(total.isnan(), where)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bits", WIDE_NANS)
@pytest.mark.parametrize("column", [0, 1, 70, 129])
def test_every_nan_of_a_wider_weight_stays_one(norm: Norm, bits: int, column: int, isa: str) -> None:
    weight = torch.ones(130)
    weight[column] = from_bits(bits, torch.float32)
    y = norm(torch.randn(3, 130).bfloat16(), weight, backend="cpu")
    assert torch.equal(y.isnan(), weight.isnan().expand(3, 130))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("C", [16, 130, 576])
def test_a_wider_weight_meets_its_own_elements(norm: Norm, dropout_p: float, C: int, isa: str) -> None:
    """bf16 rows are held in another order than they lie; a weight that both dtypes can hold gives the same bits."""
    x, weight = torch.randn(5, C).bfloat16(), torch.randn(C).bfloat16()
    bias = {"bias": torch.randn(C).bfloat16()} if norm is layer_norm else {}
    options: dict[str, Any] = dict(residual=torch.randn(5, C).bfloat16(), dropout_p=dropout_p, seed=5, backend="cpu")
    narrow = norm(x, weight, **bias, **options)
    wide = norm(x, weight.float(), **{name: b.float() for name, b in bias.items()}, **options)
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide))


@pytest.mark.parametrize("seed", ["1", 1.5, torch.tensor(1.0), torch.tensor([1, 2])])
@pytest.mark.parametrize("op", [layer_norm, rms_norm])
def test_a_seed_is_one_whole_number(op: Any, seed: Any) -> None:
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match="expected seed as an int or an int64 tensor of one, got"):
        op(x, torch.ones(8), dropout_p=0.5, seed=seed)
