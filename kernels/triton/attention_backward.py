"""attention's backward: dq by blocks of queries, which sums delta by the way, then dk and dv by blocks of keys, over
the query heads of a KV head and their queries in order. Nothing is added up in memory. Formulas:
gptfast/ops/attention_gradients.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from gptfast.kernels.triton import arch, empty, launch, tiles, unsupported
from gptfast.kernels.triton.attention_arguments import (
    described,
    edges,
    floats,
    grid,
    is_plain,
    refuses,
    shared,
    strides,
    with_rows,
)
from gptfast.kernels.triton.attention_scores import (
    LOG2E,
    SIZES,
    bounds,
    keys_at,
    pairs_at,
    place,
    seen,
    tile_at,
    with_terms,
)
from gptfast.kernels.triton.philox import UNSPECIALISED, dropout_arguments, kept


@triton.jit
def _gradient(
    s, dp, i, j, logs, norm, delta, shift, Sq, Sk, left, right, scale, softcap, to_log2, slope, mask_at, bias_at,
    element, seed_low, seed_high, stream_id, drop_below, keep_scale,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_TERMS: tl.constexpr, USE_SOFTCAP: tl.constexpr,
    USE_DROPOUT: tl.constexpr, IS_BY_FOURS: tl.constexpr, IS_EXACT: tl.constexpr, IS_EDGE: tl.constexpr,
):  # fmt: skip
    """(p as dropout leaves it, the gradient of the products s), from the products s = q . k and dp = dout . v. i and j,
    logs, norm and delta broadcast to them, so that keys may be the rows; mask_at and bias_at are addresses."""
    inside = seen(i, j, shift, Sq, Sk, left, right, HAS_LEFT, HAS_RIGHT)
    t = s
    if HAS_TERMS:
        there = inside
        if not IS_EDGE:
            there = i < Sq
        s, t = with_terms(s, i, j, shift, there, scale, softcap, slope, bias_at, USE_SOFTCAP)
    if mask_at is not None:
        inside &= tl.load(mask_at, mask=inside, other=0) != 0
    if IS_EXACT:
        to_natural = scale
        if HAS_TERMS:
            to_natural = 1.0
        p = tl.exp2((s * to_natural - logs) * LOG2E)
    else:
        p = tl.exp2(s * to_log2 - logs * LOG2E)
    if IS_EDGE or mask_at is not None:
        p = tl.where(inside, p, 0.0)
    if norm is not None:
        p *= norm
    dropped = p
    if USE_DROPOUT:
        at = element + i.to(tl.int64) * Sk
        if not IS_BY_FOURS:
            keep = kept(at, j, seed_low, seed_high, stream_id, drop_below, False, 1, 1)
        elif i.shape[1] == 1:
            keep = kept(at, j, seed_low, seed_high, stream_id, drop_below, True, s.shape[0], s.shape[1])
        else:
            # Of keys that are rows: four of one query lie in four rows.
            at, j = tl.trans(at), tl.trans(j)
            keep = tl.trans(kept(at, j, seed_low, seed_high, stream_id, drop_below, True, s.shape[1], s.shape[0]))
        dropped = tl.where(keep, p * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = p * (dp - delta)
    if USE_SOFTCAP:
        ds *= 1.0 - t * t
    return dropped, ds


@triton.jit(do_not_specialize=[*SIZES, "N", *UNSPECIALISED])
def _attention_dq_kernel(
    dout, out, lse, dlse, delta, norm, q, k, v, k_desc, v_desc, dq, mask, bias, slopes, sinks, cu_q, cu_k,
    N, Sq, Sk, H, G, left, right, scale, softcap,
    dout_batch, dout_row, dout_head, out_batch, out_row, out_head, q_batch, q_row, q_head,
    k_batch, k_row, k_head, v_batch, v_row, v_head, slopes_batch, lse_head,
    mask_b, mask_h, mask_i, mask_j, bias_b, bias_h, bias_i, bias_j,
    seed_low, seed_high, stream_id, drop_below, keep_scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_TERMS: tl.constexpr, USE_SOFTCAP: tl.constexpr,
    USE_DROPOUT: tl.constexpr, IS_BY_FOURS: tl.constexpr, IS_EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: (heads x batch, blocks), or (heads, blocks of all sequences)."""
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    h = tl.program_id(0) % H
    b = tl.program_id(0) // H
    start_q, start_k = 0, 0
    element = tl.program_id(0).to(tl.int64) * Sq * Sk
    batch = b.to(tl.int64)
    if cu_q is not None:
        b, block, start_q, start_k, Sq, Sk, pairs = place(block, cu_q, cu_k, N, BLOCK_M, BLOCK_B)
        if b >= N:
            return
        element = pairs * H + tl.cast(h, tl.int64) * Sq * Sk
    first = block * BLOCK_M
    shift = Sk - Sq
    far_q, far_k = tl.cast(start_q, tl.int64), tl.cast(start_k, tl.int64)
    q += batch * q_batch + h * q_head + far_q * q_row
    dout += batch * dout_batch + h * dout_head + far_q * dout_row
    out += batch * out_batch + h * out_head + far_q * out_row
    k += batch * k_batch + (h // G) * k_head + far_k * k_row
    v += batch * v_batch + (h // G) * v_head + far_k * v_row
    logs_at = (batch * H + h) * lse_head + start_q + first
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + b * slopes_batch + h)
    if mask is not None:
        mask += batch * mask_b + h * mask_h
    if bias is not None:
        bias += batch * bias_b + h * bias_h
    row, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)[None, :]
    i = first + row[:, None]
    there = row < Sq - first
    tile_q = tile_at(q, first, Sq, q_row, D, BLOCK_M, BLOCK_D, True)
    tile_dout = tile_at(dout, first, Sq, dout_row, D, BLOCK_M, BLOCK_D, True)
    tile_out = tile_at(out, first, Sq, out_row, D, BLOCK_M, BLOCK_D, True)
    logs = tl.load(lse + logs_at + row, mask=there, other=float("inf"))
    logs = tl.where(logs == float("-inf"), float("inf"), logs)[:, None]  # of rows that see nothing: p is 0
    sums = tl.sum(tile_dout.to(tl.float32) * tile_out.to(tl.float32), 1)
    if dlse is not None:
        sums -= tl.load(dlse + logs_at + row, mask=there, other=0.0)
    tl.store(delta + logs_at + row, sums, mask=there)
    sums = sums[:, None]
    to_log2 = scale * LOG2E
    if HAS_TERMS:
        to_log2 = scale * 0.0 + LOG2E
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    a0, a1, a2, a3 = bounds(
        first, tl.minimum(first + BLOCK_M, Sq) - 1, shift, Sk, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    mine = None
    if norm is not None:
        # lse is rounded, by up to 2^-22 from 4 on, which all of a row's probabilities have in common: their sum tells.
        z = tl.zeros((BLOCK_M,), tl.float32)
        if sinks is not None:
            z += tl.exp2((tl.load(sinks + h).to(tl.float32) - tl.reshape(logs, (BLOCK_M,))) * LOG2E)
        for start in range(a0, a3, BLOCK_N):
            tile_k = tile_at(k, start, Sk, k_row, D, BLOCK_N, BLOCK_D, True)
            s = tl.dot(tile_q, tl.trans(tile_k), input_precision="ieee")
            p, _ = _gradient(
                s, s, i, start + columns, logs, None, sums, shift, Sq, Sk, left, right, scale, softcap, to_log2, slope,
                None if mask is None else pairs_at(mask, first, row[:, None], mask_i, start, columns, mask_j),
                None if bias is None else pairs_at(bias, first, row[:, None], bias_i, start, columns, bias_j),
                element, seed_low, seed_high, stream_id, drop_below, keep_scale,
                HAS_LEFT, HAS_RIGHT, HAS_TERMS, USE_SOFTCAP, False, False, IS_EXACT, True,
            )  # fmt: skip
            z += tl.sum(p, 1)
        z = tl.where(z > 0, 1.0 / z, 0.0)
        tl.store(norm + logs_at + row, z, mask=there)
        mine = z[:, None]
    for part in tl.static_range(3):
        low, high = a1, a2
        if part == 0:
            low, high = a0, a1
        if part == 2:
            low, high = a2, a3
        if HAS_LEFT or part != 0:
            for start in range(low, high, BLOCK_N):
                tile_k = keys_at(k, k_desc, b, start, h // G, Sk, k_row, D, BLOCK_N, BLOCK_D, part != 1)
                tile_v = keys_at(v, v_desc, b, start, h // G, Sk, v_row, D, BLOCK_N, BLOCK_D, part != 1)
                s = tl.dot(tile_q, tl.trans(tile_k), input_precision="ieee")
                dp = tl.dot(tile_dout, tl.trans(tile_v), input_precision="ieee")
                _, ds = _gradient(
                    s, dp, i, start + columns, logs, mine, sums, shift, Sq, Sk, left, right, scale, softcap, to_log2,
                    slope,
                    None if mask is None else pairs_at(mask, first, row[:, None], mask_i, start, columns, mask_j),
                    None if bias is None else pairs_at(bias, first, row[:, None], bias_i, start, columns, bias_j),
                    element, seed_low, seed_high, stream_id, drop_below, keep_scale,
                    HAS_LEFT, HAS_RIGHT, HAS_TERMS, USE_SOFTCAP, USE_DROPOUT, IS_BY_FOURS, IS_EXACT,
                    part != 1,
                )  # fmt: skip
                acc = tl.dot(ds.to(tile_k.dtype), tile_k, acc, input_precision="ieee")
    d = tl.arange(0, BLOCK_D)[None, :]
    whole = (batch * Sq + start_q + first) * H + h
    at = dq + whole * D + (row[:, None] * (H * D) + d)
    tl.store(at, (acc * scale).to(dq.dtype.element_ty), mask=(row < Sq - first)[:, None] & (d < D))


@triton.jit(do_not_specialize=[*SIZES, "N", *UNSPECIALISED])
def _attention_dkdv_kernel(
    dout, lse, delta, norm, q, k, v, q_desc, dout_desc, dk, dv, mask, bias, slopes, cu_q, cu_k, N, Sq, Sk, H, G,
    left, right, scale, softcap, dout_batch, dout_row, dout_head,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    slopes_batch, lse_head, mask_b, mask_h, mask_i, mask_j, bias_b, bias_h, bias_i, bias_j,
    seed_low, seed_high, stream_id, drop_below, keep_scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_TERMS: tl.constexpr, USE_SOFTCAP: tl.constexpr,
    USE_DROPOUT: tl.constexpr, IS_BY_FOURS: tl.constexpr, IS_EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: (KV heads x batch, blocks of keys), or (KV heads, blocks of all sequences). Keys are the rows of all tiles
    of scores. The first keys of a causal call have the most queries and begin first."""
    block = tl.program_id(1)
    Hk = H // G
    hk = tl.program_id(0) % Hk
    b = tl.program_id(0) // Hk
    start_q, start_k = 0, 0
    pairs = b.to(tl.int64) * Sq * Sk
    batch = b.to(tl.int64)
    if cu_q is not None:
        b, block, start_k, start_q, Sk, Sq, pairs = place(block, cu_k, cu_q, N, BLOCK_N, BLOCK_B)
        if b >= N:
            return
    first = block * BLOCK_N
    shift = Sk - Sq
    far_q, far_k = tl.cast(start_q, tl.int64), tl.cast(start_k, tl.int64)
    q += batch * q_batch + far_q * q_row
    dout += batch * dout_batch + far_q * dout_row
    k += batch * k_batch + hk * k_head + far_k * k_row
    v += batch * v_batch + hk * v_head + far_k * v_row
    row, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)[None, :]
    j = first + row[:, None]
    tile_k = tile_at(k, first, Sk, k_row, D, BLOCK_N, BLOCK_D, True)
    tile_v = tile_at(v, first, Sk, v_row, D, BLOCK_N, BLOCK_D, True)
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    to_log2 = scale * LOG2E
    if HAS_TERMS:
        to_log2 = scale * 0.0 + LOG2E
    # Key j is seen by queries j - shift - right to j - shift + left: bounds with queries and keys exchanged.
    a0, a1, a2, a3 = bounds(
        first, tl.minimum(first + BLOCK_N, Sk) - 1, -shift, Sq, right, left, HAS_RIGHT, HAS_LEFT, BLOCK_M
    )
    for h in range(hk * G, (hk + 1) * G):
        q_h = q + tl.cast(h, tl.int64) * q_head
        dout_h = dout + tl.cast(h, tl.int64) * dout_head
        logs_h = lse + (batch * H + h) * lse_head + start_q
        delta_h = delta + (batch * H + h) * lse_head + start_q
        element = pairs * H + tl.cast(h, tl.int64) * Sq * Sk
        norm_h = norm
        if norm is not None:
            norm_h = norm + (batch * H + h) * lse_head + start_q
        slope, mask_h_at, bias_h_at = None, None, None
        if slopes is not None:
            slope = tl.load(slopes + b * slopes_batch + h)
        if mask is not None:
            mask_h_at = mask + batch * mask_b + tl.cast(h, tl.int64) * mask_h
        if bias is not None:
            bias_h_at = bias + batch * bias_b + tl.cast(h, tl.int64) * bias_h
        for part in tl.static_range(3):
            low, high = a1, a2
            if part == 0:
                low, high = a0, a1
            if part == 2:
                low, high = a2, a3
            if part == 1 and not HAS_LEFT:
                high = a3  # queries beyond the last have no probabilities: it is enough to load none
            if (part == 0 and HAS_RIGHT) or part == 1 or (part == 2 and HAS_LEFT):
                for start in range(low, high, BLOCK_M):
                    i = start + tl.arange(0, BLOCK_M)
                    tile_q = keys_at(
                        q_h, q_desc, b, start, h, Sq, q_row, D, BLOCK_M, BLOCK_D, part != 1 or not HAS_LEFT
                    )
                    tile_dout = keys_at(
                        dout_h, dout_desc, b, start, h, Sq, dout_row, D, BLOCK_M, BLOCK_D, part != 1 or not HAS_LEFT
                    )
                    logs = tl.load(logs_h + i, mask=i < Sq, other=float("inf"))
                    logs = tl.where(logs == float("-inf"), float("inf"), logs)[None, :]
                    sums = tl.load(delta_h + i, mask=i < Sq, other=0.0)[None, :]
                    mine = None
                    if norm is not None:
                        mine = tl.load(norm_h + i, mask=i < Sq, other=0.0)[None, :]
                    s = tl.dot(tile_k, tl.trans(tile_q), input_precision="ieee")
                    dp = tl.dot(tile_v, tl.trans(tile_dout), input_precision="ieee")
                    p, ds = _gradient(
                        s, dp, i[None, :], j, logs, mine, sums, shift, Sq, Sk, left, right, scale, softcap, to_log2,
                        slope,
                        None if mask is None else pairs_at(
                            mask_h_at, start, columns, mask_i, first, row[:, None], mask_j),
                        None if bias is None else pairs_at(
                            bias_h_at, start, columns, bias_i, first, row[:, None], bias_j),
                        element, seed_low, seed_high, stream_id, drop_below, keep_scale,
                        HAS_LEFT, HAS_RIGHT, HAS_TERMS, USE_SOFTCAP, USE_DROPOUT, IS_BY_FOURS, IS_EXACT,
                        part != 1,
                    )  # fmt: skip
                    acc_v = tl.dot(p.to(tile_dout.dtype), tile_dout, acc_v, input_precision="ieee")
                    acc_k = tl.dot(ds.to(tile_q.dtype), tile_q, acc_k, input_precision="ieee")
    d = tl.arange(0, BLOCK_D)[None, :]
    whole = ((batch * Sk + start_k + first) * Hk + hk) * D
    at = row[:, None] * (Hk * D) + d
    inside = (row < Sk - first)[:, None] & (d < D)
    tl.store(dk + whole + at, (acc_k * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + whole + at, acc_v.to(dv.dtype.element_ty), mask=inside)


def supports_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, dlse: Tensor | None, wants_bias: bool,
    wants_sinks: bool, **terms: Any,
) -> str | None:  # fmt: skip
    for name, t in (("lse", lse), ("dlse", dlse)):
        if t is not None and t.dtype != torch.float32:
            return f"{name} must be float32, not {str(t.dtype).removeprefix('torch.')}"
    for name, wanted in (("bias", wants_bias), ("sinks", wants_sinks)):
        if wanted and terms.get(name) is not None:
            return f"{name} requires a gradient, and this kernel makes none for it"
    return unsupported(dout, out, backward=True) or refuses(q, k, v, terms, backward=True)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    dlse: Tensor | None,
    causal: bool,
    scale: float | None,
    window: tuple[int, int],
    softcap: float,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    seed: int,
    stream: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    wants_bias: bool,
    wants_sinks: bool,
) -> tuple[Tensor, ...]:
    """The gradients: gptfast/ops/attention_gradients.py."""
    dout, q, k, v, out = (with_rows(t) for t in (dout, q, k, v, out))
    (Sq, H, D), (Sk, Hk) = q.shape[-3:], k.shape[-3:-1]
    dq, dk, dv = (empty(t.shape, t.dtype, t) for t in (q, k, v))
    delta = empty(lse.shape, torch.float32, q)
    norm = empty(lse.shape, torch.float32, q) if q.dtype == torch.float32 else None
    terms = shared(q, k, mask, bias, alibi_slopes, causal, scale, window, softcap, cu_seqlens_q)
    terms |= strides(q=q, k=k, v=v, dout=dout) | dropout_arguments(dropout_p, int(seed), stream)
    terms |= {"lse_head": Sq, "D": D, "USE_DROPOUT": dropout_p > 0}
    terms |= {"IS_BY_FOURS": Sk % 4 == 0 and cu_seqlens_q is None}
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    N = 0 if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    rest = (mask, bias, floats(alibi_slopes), edges(cu_seqlens_q), edges(cu_seqlens_k), N, Sq, Sk, H, H // Hk)
    plain = is_plain(terms, mask, dropout_p)
    reads = mask is not None or bias is not None
    tile = tiles.attention_dq(D, q.dtype, arch(q), plain, reads)
    block = [1, 1, tile.blocks["BLOCK_N"], tile.blocks["BLOCK_D"]]
    launch(
        *(_attention_dq_kernel, grid(q, tile.blocks["BLOCK_M"], cu_seqlens_q)),
        *(
            dout,
            out,
            lse,
            dlse,
            delta,
            norm,
            q,
            k,
            v,
            described(k, block),
            described(v, block),
            dq,
            *rest[:3],
            floats(sinks),
            *rest[3:],
        ),
        **terms,
        **strides(out=out),
        tile=tile,
    )
    tile = tiles.attention_dkdv(D, q.dtype, arch(q), plain, reads, cu_seqlens_q is not None)
    block = [1, 1, tile.blocks["BLOCK_M"], tile.blocks["BLOCK_D"]]
    launch(
        *(_attention_dkdv_kernel, grid(k, tile.blocks["BLOCK_N"], cu_seqlens_k)),
        *(dout, lse, delta, norm, q, k, v, described(q, block), described(dout, block), dk, dv, *rest),
        **terms,
        tile=tile,
    )
    return dq, dk, dv, dout.new_empty(0), dout.new_empty(0)
