"""The element formats of GGUF files that gptfast computes with: their layout, and conversion from and to fp32.

A quantised format stores each 32 consecutive values of a row as one little-endian block with an fp16 scale d:

    Q8_0  34 bytes: d, q int8[32]             value = d * q
    Q4_0  18 bytes: d, nibbles uint8[16]      value = d * (q - 8)
    Q4_1  20 bytes: d, m (fp16), nibbles      value = d * q + m

where the low nibble of byte j is value j of the block and the high nibble is value j + 16. Products and sums are each
rounded to fp32. `quantize` has the meaning of ggml's reference quantisers (`quantize_row_*_ref`).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_BLOCKS = 1 << 14  # blocks converted at a time, so that intermediate values stay in the cache


class Format(NamedTuple):
    """How a tensor's values are stored. A row's length is a multiple of `elements`."""

    name: str
    code: int  # ggml's number of the type
    elements: int  # values in a block
    nbytes: int  # bytes of a block
    dtype: torch.dtype | None  # of a plain format; None for a quantised one


FORMATS = {
    f.name: f
    for f in (
        Format("F32", 0, 1, 4, torch.float32),
        Format("F16", 1, 1, 2, torch.float16),
        Format("BF16", 30, 1, 2, torch.bfloat16),
        Format("Q4_0", 2, 32, 18, None),
        Format("Q4_1", 3, 32, 20, None),
        Format("Q8_0", 8, 32, 34, None),
    )
}


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f"expected one of the tensor types {', '.join(FORMATS)}, got {name}")
    return FORMATS[name]


def nbytes(type: str, shape: Sequence[int]) -> int:
    """The stored size of a tensor in bytes. Raises ValueError where a row is not whole blocks."""
    f = _format(type)
    if f.elements > 1 and (len(shape) == 0 or shape[-1] % f.elements):
        raise ValueError(f"expected rows of a multiple of {f.elements} values for {type}, got shape {tuple(shape)}")
    return prod(shape) // f.elements * f.nbytes


def _half(bytes: Tensor) -> Tensor:
    """(n, 2) uint8 -> (n, 1) fp32."""
    return bytes.contiguous().view(torch.float16).float()


def _nibbles(bytes: Tensor) -> Tensor:
    """(n, 16) uint8 -> (n, 32) uint8."""
    return torch.cat((bytes & 15, bytes >> 4), dim=1)


def _dequantize_blocks(blocks: Tensor, type: str) -> Tensor:
    """(n, bytes of a block) uint8 -> (n, 32) fp32."""
    d = _half(blocks[:, :2])
    if type == "Q8_0":
        return blocks[:, 2:].view(torch.int8).float().mul_(d)
    if type == "Q4_0":
        return _nibbles(blocks[:, 2:]).float().sub_(8).mul_(d)
    return _nibbles(blocks[:, 4:]).float().mul_(d).add_(_half(blocks[:, 2:4]))


def dequantize(raw: Tensor, type: str, shape: Sequence[int]) -> Tensor:
    """The values of a stored tensor.

    Args:
        raw: (bytes,) uint8, contiguous: the stored blocks, row after row.
        type: a name in `FORMATS`.
        shape: the tensor's shape in PyTorch's order (the last dimension is the contiguous one).

    Returns:
        A new fp32 tensor of `shape` on the same device.

    Raises:
        ValueError: unknown type, rows that are not whole blocks, or a number of bytes that does not fit the shape.
    """
    f, expected = _format(type), nbytes(type, shape)
    if raw.dtype != torch.uint8 or raw.numel() != expected:
        raise ValueError(
            f"expected {expected} bytes (uint8) for {type} of shape {tuple(shape)}, got {raw.numel()} of {raw.dtype}"
        )
    if f.dtype is not None:
        raw = raw.reshape(-1)
        aligned = raw if raw.data_ptr() % f.nbytes == 0 and raw.storage_offset() % f.nbytes == 0 else raw.clone()
        return aligned.view(f.dtype).to(torch.float32, copy=True).reshape(tuple(shape))
    blocks = raw.reshape(-1, f.nbytes)
    out = torch.empty(blocks.shape[0], f.elements, device=raw.device)
    for source, target in zip(blocks.split(CHUNK_BLOCKS), out.split(CHUNK_BLOCKS)):
        target.copy_(_dequantize_blocks(source, type))
    return out.reshape(tuple(shape))


def unpermuted(rows: Tensor, heads: int) -> Tensor:
    """Rows (N, ...) that GGUF files store for interleaved rotation, put in half-split order: pair (2i, 2i + 1) of each
    head becomes (i, i + D/2). Whole rows move, so stored blocks may stand for them."""
    order = torch.arange(rows.shape[0]).view(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return rows.index_select(0, order)  # copies whole rows


def permuted(rows: Tensor, heads: int) -> Tensor:
    """The inverse of unpermuted."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _round_half_away(x: Tensor) -> Tensor:
    """C's roundf, exactly: torch.round goes to even, and adding 0.5 rounds 0.49999997 up."""
    magnitude = x.abs()
    floor = magnitude.floor()
    return torch.copysign(floor + (2 * (magnitude - floor)).floor(), x)


def _inverse(d: Tensor) -> Tensor:
    """1 / d, and 0 where d is 0 or so small that the inverse overflows (its fp16 scale is 0 in both cases)."""
    inverse = 1 / d
    return torch.where(inverse.isfinite(), inverse, 0.0)


def _pack_nibbles(q: Tensor) -> Tensor:
    """(n, 32) fp32 whole numbers in 0..15 -> (n, 16) uint8."""
    q = q.to(torch.uint8)
    return q[:, :16] | (q[:, 16:] << 4)


def _quantize_blocks(x: Tensor, type: str) -> Tensor:
    """(n, 32) fp32 -> (n, bytes of a block) uint8."""
    if type == "Q8_0":
        d = x.abs().amax(1, keepdim=True) / 127
        scales, q = (d,), _round_half_away(x * _inverse(d)).to(torch.int8).view(torch.uint8)
    elif type == "Q4_0":  # the value of largest magnitude, the first of equals, becomes -8
        d = x.gather(1, x.abs().argmax(1, keepdim=True)) / -8
        scales, q = (d,), _pack_nibbles((x * _inverse(d) + 8.5).trunc().clamp(0, 15))
    else:
        low, high = x.aminmax(dim=1, keepdim=True)
        d = (high - low) / 15
        scales, q = (d, low), _pack_nibbles(((x - low) * _inverse(d) + 0.5).trunc().clamp(0, 15))
    halves = [s.half() for s in scales]
    if not all(h.isfinite().all() for h in halves):
        raise ValueError(f"expected values whose {type} scale fits fp16 (65504), got values up to {x.abs().max():.3g}")
    return torch.cat([h.view(torch.uint8) for h in halves] + [q], dim=1)


SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of a block's range, as the first guess of its scale


def _fit_q4_1(x: Tensor) -> Tensor:
    """(n, 32) fp32 -> (n, 20) uint8: Q4_1 with the d and m of least squared error among some candidates. Each begins
    with a part of the block's range and is refitted to the values that fall on it: with q fixed, sum((d q + m - x)^2)
    is least at d = cov(q, x) / var(q), m = mean(x) - d mean(q)."""
    low, high = x.aminmax(dim=1, keepdim=True)
    middle, reach, mean = (low + high) / 2, (high - low) / 2, x.mean(1, keepdim=True)
    best = _quantize_blocks(x, "Q4_1")
    least = (_dequantize_blocks(best, "Q4_1") - x).square_().sum(1)
    for shrunk in SHRUNK:
        d, m = reach * (shrunk * 2 / 15), middle - reach * shrunk
        q = ((x - m) * _inverse(d)).round_().clamp_(0, 15)
        q_mean = q.mean(1, keepdim=True)
        spread = (q - q_mean).square_().sum(1, keepdim=True)
        d = torch.where(spread > 0, ((q - q_mean) * (x - mean)).sum(1, keepdim=True) / spread, d).half()
        m = (mean - d.float() * q_mean).half()
        q = ((x - m.float()) * _inverse(d.float())).round_().clamp_(0, 15)
        error = (q * d.float() + m.float() - x).square_().sum(1)
        better = error < least
        made = torch.cat((d.view(torch.uint8), m.view(torch.uint8), _pack_nibbles(q)), dim=1)
        best, least = torch.where(better[:, None], made, best), torch.where(better, error, least)
    return best


def quantize(x: Tensor, type: str, *, fit: bool = False) -> Tensor:
    """The stored form of a tensor: the inverse of `dequantize` up to rounding.

    Args:
        x: any shape whose last dimension is a multiple of the format's block; finite; converted to fp32 on the CPU.
        type: a name in `FORMATS`.
        fit: for Q4_1, look for the scale and the minimum of least squared error, where ggml's reference quantiser takes
            the block's range. About six times the work; the other types are as without.

    Returns:
        (bytes,) uint8.

    Raises:
        ValueError: unknown type, rows that are not whole blocks, or values that the format cannot hold.
    """
    f = _format(type)
    size = nbytes(type, x.shape)
    x = x.detach().to("cpu", torch.float32).contiguous()
    if f.dtype is not None:
        return x.to(f.dtype, copy=True).reshape(-1).view(torch.uint8)
    if not x.isfinite().all():
        raise ValueError(f"expected finite values to quantise to {type}, got NaN or infinity")
    out = torch.empty(size // f.nbytes, f.nbytes, dtype=torch.uint8)
    for source, target in zip(x.reshape(-1, f.elements).split(CHUNK_BLOCKS), out.split(CHUNK_BLOCKS)):
        target.copy_(_fit_q4_1(source) if fit and type == "Q4_1" else _quantize_blocks(source, type))
    return out.reshape(-1)
