"""The block formats against the gguf package's own quantisers, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf import dequantize as gguf_dequantize
from gguf.quants import quantize as gguf_quantize

from gptfast.formats.blocks import FORMATS, dequantize, nbytes, quantize

QUANTISED = [name for name, f in FORMATS.items() if f.dtype is None]


def values(*shape: int) -> torch.Tensor:
    """Normal values with rows that are zero, constant, tied in magnitude, negative only, tiny and large."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    x[0] = 0
    x[1] = -0.75
    x[2] = torch.where(torch.arange(shape[-1]) % 2 == 0, 1.5, -1.5)
    x[3] = -x[3].abs()
    x[4] *= 1e-6
    x[5] *= 1e4
    x[6] = torch.arange(shape[-1]) * 0.5  # halves: ties of the rounding
    return x


@pytest.mark.parametrize("name", FORMATS)
def test_both_ways_equal_the_gguf_package(name: str) -> None:
    x = values(13, 96)
    code = GGMLQuantizationType[name]
    theirs = gguf_quantize(x.numpy(), code)
    raw = quantize(x, name)
    assert raw.numel() == nbytes(name, x.shape)
    np.testing.assert_array_equal(raw.numpy(), theirs.reshape(-1).view(np.uint8))
    np.testing.assert_array_equal(dequantize(raw, name, x.shape).numpy(), gguf_dequantize(theirs, code).reshape(13, 96))


@pytest.mark.parametrize("name", QUANTISED)
def test_any_bytes_dequantize_as_the_gguf_package_does(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    n = FORMATS[name].nbytes * 64
    raw = torch.randint(0, 256, (n,), generator=generator, dtype=torch.uint8)
    with np.errstate(all="ignore"):
        theirs = gguf_dequantize(raw.numpy().reshape(16, -1), GGMLQuantizationType[name])
    np.testing.assert_array_equal(dequantize(raw, name, (16, 128)).numpy(), theirs)


@pytest.mark.parametrize("name", FORMATS)
def test_unaligned_bytes_and_many_chunks(name: str) -> None:
    x = values(70, 16384)
    raw = quantize(x, name)
    shifted = torch.cat((torch.zeros(1, dtype=torch.uint8), raw))[1:]
    expected = torch.cat([dequantize(r, name, (16384,)) for r in raw.reshape(70, -1)]).reshape(70, -1)
    assert dequantize(shifted, name, x.shape).equal(expected)


def test_values_below_the_smallest_scale_become_zero() -> None:
    for name in QUANTISED:
        assert dequantize(quantize(torch.full((32,), 1e-44), name), name, (32,)).abs().max() == 0


def test_refusals_say_what_was_expected() -> None:
    with pytest.raises(ValueError, match="expected rows of a multiple of 32 values for Q4_0, got shape"):
        quantize(torch.zeros(2, 33), "Q4_0")
    with pytest.raises(ValueError, match=r"expected one of the tensor types F32, .*, got Q2_K"):
        quantize(torch.zeros(2, 32), "Q2_K")
    with pytest.raises(ValueError, match=r"expected 68 bytes \(uint8\) for Q8_0 of shape \(2, 32\), got 67"):
        dequantize(torch.zeros(67, dtype=torch.uint8), "Q8_0", (2, 32))
    with pytest.raises(ValueError, match="expected finite values to quantise to Q8_0"):
        quantize(torch.full((32,), float("nan")), "Q8_0")
    with pytest.raises(ValueError, match="scale fits fp16"):
        quantize(torch.full((32,), 1e30), "Q8_0")


def test_fitted_blocks_are_nearer_than_those_of_the_range() -> None:
    torch.manual_seed(0)
    x = torch.randn(96, 64) * torch.logspace(-6, 2, 96)[:, None]
    x[:3] = torch.tensor([[0.0], [7.5], [-3.0]])  # constant blocks
    errors = [
        (dequantize(quantize(x, "Q4_1", fit=fit), "Q4_1", x.shape) - x).view(-1, 32).square().sum(1)
        for fit in (False, True)
    ]
    assert (errors[1] <= errors[0]).all()
    assert (errors[1][6:].sum() / errors[0][6:].sum()).item() < 0.92  # 0.87 for normal values
    on_grid = dequantize(quantize(x, "Q4_1"), "Q4_1", x.shape)
    assert torch.equal(quantize(on_grid, "Q8_0", fit=True), quantize(on_grid, "Q8_0"))
