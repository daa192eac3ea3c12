"""The mended interpreter computes what a GPU would; unmended, it doesn't (which each test would notice)."""

from __future__ import annotations

import pytest
import torch

from tests import where

if not where.INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from tests.interpreter import kernels

N = 64


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_product_of_matrices(dtype: torch.dtype) -> None:
    x, y = normal(N, N, dtype=dtype), normal(N, N, dtype=dtype, seed=1)
    z = torch.empty(N, N)
    kernels._dot_kernel[(1,)](x, y, z, N=N, PRECISION="ieee")
    assert torch.allclose(z, x.float() @ y.float(), rtol=1e-5, atol=1e-5)


def test_tf32_has_ten_bits() -> None:
    x, y, z = normal(N, N, dtype=torch.float32), torch.eye(N), torch.empty(N, N)
    kernels._dot_kernel[(1,)](x, y, z, N=N, PRECISION="tf32")
    assert torch.equal(z.view(torch.int32) & 0x1FFF, torch.zeros(N, N, dtype=torch.int32))
    assert 0 < ((z - x) / x).abs().max() <= 2**-11
    kernels._dot_kernel[(1,)](x, y, z, N=N, PRECISION="ieee")
    assert torch.equal(z, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arithmetic_rounds_to_nearest(dtype: torch.dtype) -> None:
    x, y = normal(N, dtype=dtype), normal(N, dtype=dtype, seed=1)
    total, product, fused = (torch.empty(N, dtype=dtype) for _ in range(3))
    largest = torch.empty(1, dtype=dtype)
    kernels._arithmetic_kernel[(1,)](x, y, total, product, fused, largest, N=N)
    assert torch.equal(total, x + y)
    assert torch.equal(product, x * y)
    assert torch.equal(fused, (x.double() * y.double() + x.double()).to(dtype))
    assert largest.item() == x.max().item()


SMALL = [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("source", [torch.float32, torch.float16])
def test_casts_round_to_nearest_even(source: torch.dtype, dtype: torch.dtype) -> None:
    x = torch.cat([normal(1000, dtype=torch.float32) * 8, torch.tensor([1.9999, -1.9999, 1.0625, 1.1875, 0.0, -0.0])])
    x = torch.cat([x, torch.zeros(1024 - len(x))]).to(source)
    y = torch.empty(1024, dtype=dtype)
    kernels._cast_kernel[(1,)](x, y, N=1024)
    assert torch.equal(y.float(), x.to(dtype).float())
    back = torch.empty(1024, dtype=source)
    kernels._cast_kernel[(1,)](y, back, N=1024)
    assert torch.equal(back, y.to(source))


def test_what_fp8_cannot_hold_becomes_its_largest() -> None:
    x, y = torch.tensor([1e6, -1e6]), torch.empty(2, dtype=torch.float8_e4m3fn)
    kernels._cast_kernel[(1,)](x, y, N=2)
    assert y.float().tolist() == [448.0, -448.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reductions_and_scans_by_a_function(dtype: torch.dtype) -> None:
    x = torch.randint(-8, 8, (N,), generator=torch.Generator().manual_seed(3)).to(dtype)
    last, best, sums = (torch.empty(n, dtype=dtype) for n in (1, 1, N))
    place = torch.empty(1, dtype=torch.int32)
    kernels._reduce_kernel[(1,)](x, last, best, place, sums, N=N)
    assert last.item() == x[-1].item()
    assert best.item() == x.max().item()
    assert place.item() == (x == x.max()).nonzero()[0].item()
    assert torch.equal(sums, x.cumsum(0))


def test_numbers_that_are_equal_and_not_the_same() -> None:
    """A number's block is made once (quick.py): of 0.0, -0.0, 0, 1 and 1.5 each its own, in each dtype."""
    import triton

    for dtype in (torch.float32, torch.float16, torch.float32):
        x, y = normal(N, dtype=dtype).abs() + 1, torch.empty(4, N, dtype=dtype)
        x[::2] *= -1
        kernels._numbers_kernel[(1,)](x, y, N=N)
        assert torch.equal(y[:3], torch.zeros(3, N, dtype=dtype))
        assert torch.equal(y[0].signbit(), x < 0) and torch.equal(y[2].signbit(), x < 0)
        if not triton.__version__.startswith("3.6"):  # which makes 0.0 of both
            assert torch.equal(y[1].signbit(), x > 0)
        assert torch.equal(y[3], torch.where(x > 0, x + 1, x + 1.5))
