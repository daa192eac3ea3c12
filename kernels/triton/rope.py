"""rope: a program turns some heads of one token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from gptfast.kernels.triton import arch, cdiv, empty, launch, tiles, unsupported


@triton.jit
def turned(x1, x2, cos, sin):
    """A pair turned: the products with sin are rounded, those with cos are not."""
    return tl.fma(x1, cos, -(x2 * sin)), tl.fma(x2, cos, x1 * sin)


@triton.jit
def _rope_heads(
    x, out, cos, sin, first, H, D, R, stride_h,
    IS_INTERLEAVED: tl.constexpr, IS_BACK: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """BLOCK_H of a token's heads; R is the number of elements that turn, BLOCK_R >= R / 2."""
    head = first + tl.arange(0, BLOCK_H)[:, None]
    pair = tl.arange(0, BLOCK_R)[None, :]
    half = R // 2
    c = tl.load(cos + pair, mask=pair < half, other=0.0)
    s = tl.load(sin + pair, mask=pair < half, other=0.0)
    if IS_BACK:
        s = -s
    source, target = x + head.to(tl.int64) * stride_h, out + head * D
    inside = (head < H) & (pair < half)
    if IS_INTERLEAVED:
        i = tl.arange(0, 2 * BLOCK_R)[None, :]
        both = (head < H) & (i < R)
        x1, x2 = tl.split(tl.reshape(tl.load(source + i, mask=both, other=0.0).to(tl.float32), (BLOCK_H, BLOCK_R, 2)))
        o1, o2 = turned(x1, x2, c, s)
        tl.store(target + i, tl.reshape(tl.join(o1, o2), (BLOCK_H, 2 * BLOCK_R)).to(out.dtype.element_ty), mask=both)
    else:
        x1 = tl.load(source + pair, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(source + half + pair, mask=inside, other=0.0).to(tl.float32)
        o1, o2 = turned(x1, x2, c, s)
        tl.store(target + pair, o1.to(out.dtype.element_ty), mask=inside)
        tl.store(target + half + pair, o2.to(out.dtype.element_ty), mask=inside)
    if BLOCK_REST > 0:
        i = R + tl.arange(0, BLOCK_REST)[None, :]
        rest = (head < H) & (i < D)
        tl.store(target + i, tl.load(source + i, mask=rest), mask=rest)


@triton.jit(do_not_specialize=["S"])
def _rope_kernel(
    q, k, cos, sin, q_out, k_out, S, H, Hk, D, R,
    q_b, q_s, q_h, k_b, k_s, k_h, table_b, table_s,
    IS_INTERLEAVED: tl.constexpr, IS_BACK: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    b, s = token // S, token % S
    cos += b * table_b + s * table_s
    sin += b * table_b + s * table_s
    first = tl.program_id(1) * BLOCK_H
    of_queries = tl.cdiv(H, BLOCK_H) * BLOCK_H
    if first < of_queries:
        _rope_heads(
            q + b * q_b + s * q_s, q_out + token * H * D, cos, sin, first, H, D, R, q_h,
            IS_INTERLEAVED, IS_BACK, BLOCK_H, BLOCK_R, BLOCK_REST,
        )  # fmt: skip
    else:
        _rope_heads(
            k + b * k_b + s * k_s, k_out + token * Hk * D, cos, sin, first - of_queries, Hk, D, R, k_h,
            IS_INTERLEAVED, IS_BACK, BLOCK_H, BLOCK_R, BLOCK_REST,
        )  # fmt: skip


def supports(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **_: Any) -> str | None:
    if cos.dtype != torch.float32:
        return f"it takes cos and sin in float32, not {str(cos.dtype).removeprefix('torch.')}"
    return unsupported(q, k, backward=True) or unsupported(cos, sin)


def supports_rope_backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, **_: Any) -> str | None:
    return supports(dq, dk, cos, sin)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return _rope(q, k, cos, sin, interleaved, back=False)


def rope_backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """A rotation's gradient is the rotation back."""
    return _rope(dq, dk, cos, sin, interleaved, back=True)


def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> tuple[Tensor, Tensor]:
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    cos, sin = cos.contiguous(), sin.contiguous()
    B, S, H, D = q.shape
    Hk, R = k.shape[2], 2 * cos.shape[-1]
    q_out, k_out = empty(q.shape, q.dtype, q), empty(k.shape, k.dtype, k)
    tile = tiles.rope(max(H, Hk), D, R, arch(q))
    BLOCK_H = tile.blocks["BLOCK_H"]
    launch(
        *(_rope_kernel, (B * S, cdiv(H, BLOCK_H) + cdiv(Hk, BLOCK_H)), q, k, cos, sin, q_out, k_out),
        *(S, H, Hk, D, R, *q.stride()[:3], *k.stride()[:3], cos.stride(0) if cos.dim() == 3 else 0, R // 2),
        IS_INTERLEAVED=interleaved,
        IS_BACK=back,
        tile=tile,
    )
    return q_out, k_out
