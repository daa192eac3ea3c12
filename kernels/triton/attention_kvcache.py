"""attention_kvcache in at most three launches: new keys and values go to the caches (and q is rotated), each chunk of
CHUNK keys is attended to by a program of its own, and the chunks are merged in order. A tile's rows are all query heads
of a KV head, so that a key is read once for them. Meaning: gptfast/ops/attention.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from gptfast.kernels.triton import arch, cdiv, empty, launch, tiles
from gptfast.kernels.triton.attention_arguments import edges, floats, refuses, strides, with_rows
from gptfast.kernels.triton.attention_scores import LN2, LOG2E, bounds, finish, seen_by_rows, soften, with_terms

SIZES = ["Sq", "H", "G", "left", "right", "scale", "softcap", "splits", "room", "table_stride"]


@triton.jit
def _slot(slot, row, table, PAGE: tl.constexpr, there):
    """(row of the cache, slot in it) of a sequence's slot; `table` are its pages."""
    if table is None:
        return row + slot * 0, slot
    else:
        return tl.load(table + slot // PAGE, mask=there, other=0).to(tl.int64), slot % PAGE


@triton.jit
def _held(lengths, pads, b, new, room):
    """(keys of a sequence, the first slots that are left out), both no more than there is room for: under a CUDA graph
    lengths come from the device and nobody has looked at them."""
    total = tl.minimum(tl.maximum(tl.load(lengths + b), 0) + new, room)
    pad = 0
    if pads is not None:
        pad = tl.minimum(tl.maximum(tl.load(pads + b), 0), total)
    return total - pad, pad


@triton.jit(do_not_specialize=["Sq", "table_stride", "room", "positions"])
def _append_kernel(
    q, turned, k, v, k_cache, v_cache, k_scale, v_scale, cos, sin, lengths, rows, table, Sq, H, Hk, room, positions,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    kc_batch, kc_row, kc_head, vc_batch, vc_row, vc_head, ks_batch, ks_row, ks_head, vs_batch, vs_row, vs_head,
    table_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr, IS_INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens, heads of k, of v, of q): `turned` (B, Sq, H, D) is q rotated."""
    b = tl.program_id(0) // Sq
    t = tl.program_id(0) % Sq
    h = tl.program_id(1)
    batch = b.to(tl.int64)
    length = tl.load(lengths + b)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    kind = 2
    if k is not None:
        kind = tl.where(h < Hk, 0, tl.where(h < 2 * Hk, 1, 2))
        h = tl.where(kind == 0, h, tl.where(kind == 1, h - Hk, h - 2 * Hk))
    position = length + t
    if k is None:
        position -= Sq
    fits = (length >= 0) & (length + t < room)
    position = tl.minimum(tl.maximum(position, 0), positions - 1)
    if kind == 2:
        if turned is not None:
            at = q + batch * q_batch + t.to(tl.int64) * q_row + h * q_head
            x = _turned(at, d, inside, cos, sin, position, HALF, IS_INTERLEAVED)
            tl.store(turned + ((batch * Sq + t) * H + h) * D + d, x.to(turned.dtype.element_ty), mask=inside)
    elif k is not None:
        row = batch
        if rows is not None:
            row = tl.load(rows + b).to(tl.int64)
        own = table
        if table is not None:
            own = table + batch * table_stride
        row, slot = _slot(length + t, row, own, PAGE, fits)
        there = d < tl.where(fits, D, 0)
        if kind == 0:
            at = k + batch * k_batch + t.to(tl.int64) * k_row + h * k_head
            if cos is None:
                x = tl.load(at + d, mask=inside, other=0.0).to(tl.float32)
            else:
                x = (
                    _turned(at, d, inside, cos, sin, position, HALF, IS_INTERLEAVED)
                    .to(k.dtype.element_ty)
                    .to(tl.float32)
                )
            _keep(x, d, there, fits, k_cache, k_scale, row * kc_batch + slot * tl.cast(kc_row, tl.int64) + h * kc_head,
                  row * ks_batch + slot * tl.cast(ks_row, tl.int64) + h * ks_head)  # fmt: skip
        else:
            at = v + batch * v_batch + t.to(tl.int64) * v_row + h * v_head
            x = tl.load(at + d, mask=inside, other=0.0).to(tl.float32)
            _keep(x, d, there, fits, v_cache, v_scale, row * vc_batch + slot * tl.cast(vc_row, tl.int64) + h * vc_head,
                  row * vs_batch + slot * tl.cast(vs_row, tl.int64) + h * vs_head)  # fmt: skip


@triton.jit
def _turned(x, d, inside, cos, sin, position, HALF: tl.constexpr, IS_INTERLEAVED: tl.constexpr):
    """One head rotated, fp32: each dimension with its partner of the pair."""
    rotated = d < 2 * HALF
    if IS_INTERLEAVED:
        pair, partner, first = d // 2, d ^ 1, d % 2 == 0
    else:
        first = d < HALF
        pair, partner = tl.where(first, d, d - HALF), tl.where(first, d + HALF, d - HALF)
    mine = tl.load(x + d, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x + partner, mask=inside & rotated, other=0.0).to(tl.float32)
    at = tl.cast(position, tl.int64) * HALF + pair
    c = tl.load(cos + at, mask=rotated & inside, other=1.0).to(tl.float32)
    s = tl.load(sin + at, mask=rotated & inside, other=0.0).to(tl.float32)
    return tl.where(rotated, tl.where(first, mine * c - other * s, mine * c + other * s), mine)


@triton.jit
def _keep(x, d, inside, fits, cache, scale, at, scale_at):
    """x (D) to its place in a cache; as int8 with its scale."""
    if scale is None:
        tl.store(cache + at + d, x.to(cache.dtype.element_ty), mask=inside)
    else:
        most = tl.max(tl.abs(x), 0)
        most = tl.where(tl.max((x != x).to(tl.int32), 0) > 0, float("nan"), most)
        usable = (most >= 7.52316384526264e-37) & (most < float("inf"))  # 2^-120
        whole = x * tl.div_rn(127.0, tl.where(usable, most, 1.0))
        whole = (whole + 12582912.0) - 12582912.0  # 1.5 * 2^23: to nearest even
        tl.store(cache + at + d, tl.where(usable, whole, 0.0).to(tl.int8), mask=inside)
        unusable = tl.where(most < 1, 0.0, float("nan"))
        tl.store(scale + scale_at, tl.where(usable, tl.div_rn(most, 127.0), unusable), mask=fits)


@triton.jit
def _kept(cache, scale, row, slot, there, batch_stride, row_stride, s_batch, s_row, d,
          D: tl.constexpr, BLOCK_D: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """Keys or values (BLOCK_N, BLOCK_D) of a cache as dtype."""
    at = cache + (row * batch_stride + slot * tl.cast(row_stride, tl.int64))[:, None] + d[None, :]
    if D == BLOCK_D:
        x = tl.load(at, mask=there[:, None], other=0)
    else:
        x = tl.load(at, mask=there[:, None] & (d < D)[None, :], other=0)
    x = x.to(dtype)
    if scale is not None:
        x *= tl.load(scale + (row * s_batch + slot * tl.cast(s_row, tl.int64)), mask=there, other=0.0)[:, None]
    return x


@triton.jit(do_not_specialize=SIZES)
def _chunk_kernel(
    q, k_cache, v_cache, k_scale, v_scale, lengths, rows, pads, table, slopes, sinks, out, lse, sums, levels, weights,
    Sq, H, G, left, right, scale, softcap, splits, new, room, q_batch, q_row, q_head,
    kc_batch, kc_row, kc_head, vc_batch, vc_row, vc_head, ks_batch, ks_row, ks_head, vs_batch, vs_row, vs_head,
    table_stride, slopes_batch,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    PAGE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_TERMS: tl.constexpr,
    USE_SOFTCAP: tl.constexpr, IS_EXACT: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """Grid: (KV heads x batch, blocks of rows, chunks); row r is query r // G under head r % G of the KV head's. sums
    (B, Hk, chunks, rows, D), levels and weights without D. IS_WHOLE: there is one chunk, and its result is out."""
    Hk = H // G
    hk = tl.program_id(0) % Hk
    b = tl.program_id(0) // Hk
    split = tl.program_id(2)
    batch = b.to(tl.int64)
    Sk, pad = _held(lengths, pads, b, new, room)
    if not IS_WHOLE:  # noqa: SIM102
        if split * CHUNK >= Sk:
            return
    shift = Sk - Sq
    R = Sq * G
    r0 = tl.program_id(1) * BLOCK_M
    n = tl.arange(0, BLOCK_M)
    r = r0 + n
    i, h = r // G, hk * G + r % G
    d = tl.arange(0, BLOCK_D)
    at = q + batch * q_batch + (i.to(tl.int64) * q_row + h * q_head)[:, None] + d[None, :]
    tile_q = tl.load(at, mask=(r < R)[:, None] & (d < D)[None, :], other=0.0)
    slope, sink = None, None
    if slopes is not None:
        slope = tl.load(slopes + b * slopes_batch + h, mask=r < R, other=0.0)[:, None]
    if sinks is not None:
        sink = tl.load(sinks + h, mask=r < R, other=0.0).to(tl.float32)
    own = batch
    if rows is not None:
        own = tl.load(rows + b).to(tl.int64)
    pages = table
    if table is not None:
        pages = table + batch * table_stride
    k_cache += hk * kc_head
    v_cache += hk * vc_head
    k_scales, v_scales = k_scale, v_scale
    if k_scale is not None:
        k_scales = k_scale + hk * ks_head
        v_scales = v_scale + hk * vs_head
    to_natural = scale
    if HAS_TERMS:
        to_natural = scale * 0.0 + 1.0
    to_log2 = to_natural * LOG2E
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    m = l - float("inf")
    low, _all_low, _all_high, high = bounds(
        r0 // G, tl.minimum(r0 + BLOCK_M, R) // G, shift, Sk, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    low = tl.maximum(low, split * CHUNK)
    high = tl.minimum(high, (split + 1) * CHUNK)
    for start in range(low, high, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        there = j < Sk
        row, slot = _slot(pad + j, own, pages, PAGE, there)
        keys = _kept(
            k_cache, k_scales, row, slot, there, kc_batch, kc_row, ks_batch, ks_row, d, D, BLOCK_D, tile_q.dtype
        )
        s = tl.dot(tile_q, tl.trans(keys), input_precision="ieee")
        inside = seen_by_rows(i[:, None], j[None, :], shift, Sq, Sk, left, right, HAS_LEFT, HAS_RIGHT)
        if HAS_TERMS:
            s, _ = with_terms(s, i[:, None], j[None, :], shift, inside, scale, softcap, slope, None, USE_SOFTCAP)
        s = tl.where(inside, s, float("-inf"))
        acc, m, l, p = soften(acc, m, l, s, to_log2, True, IS_EXACT)
        values = _kept(
            v_cache, v_scales, row, slot, there, vc_batch, vc_row, vs_batch, vs_row, d, D, BLOCK_D, tile_q.dtype
        )
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision="ieee")
    # Counted from the block's first row: the numbers of the rows would keep registers through the loop.
    mine = n < R - r0
    inside = mine[:, None] & (d < D)[None, :]
    if IS_WHOLE:
        if not IS_EXACT:
            to_natural = scale * 0.0 + LN2
        result, logs = finish(acc, m, l, sink, to_natural)
        to = out + ((batch * Sq + i) * H + h)[:, None] * D + d[None, :]
        tl.store(to, result.to(out.dtype.element_ty), mask=inside)
        if lse is not None:
            tl.store(lse + (batch * H + h) * Sq + i, logs, mask=mine)
    else:
        part = ((batch * Hk + hk) * splits + split) * R + r0
        tl.store(sums + part * D + (n[:, None] * D + d[None, :]), acc, mask=inside)
        tl.store(levels + part + n, m, mask=mine)
        tl.store(weights + part + n, l, mask=mine)


@triton.jit(do_not_specialize=["Sq", "H", "G", "splits", "room"])
def _merge_kernel(
    sums, levels, weights, lengths, pads, sinks, out, lse, Sq, H, G, splits, new, room, to_log2, to_natural,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid: (batch x queries x heads). The chunks BLOCK_S at a time, a number that nothing changes."""
    h = tl.program_id(0) % H
    token = tl.program_id(0) // H
    b, i = token // Sq, token % Sq
    batch = b.to(tl.int64)
    Sk, _pad = _held(lengths, pads, b, new, room)
    used = tl.cdiv(Sk, CHUNK)
    d = tl.arange(0, BLOCK_D)
    R = Sq * G
    part = (batch * (H // G) + h // G) * splits * R + i * G + h % G
    acc = tl.zeros((1, BLOCK_D), tl.float32)
    l = tl.zeros((1,), tl.float32)
    m = l - float("inf")
    for start in range(0, used, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        at = part + s.to(tl.int64) * R
        level = tl.load(levels + at, mask=s < used, other=float("-inf"))
        weight = tl.load(weights + at, mask=s < used, other=0.0)
        # A chunk that a row sees nothing of left zeros.
        tile = tl.load(sums + at[:, None] * D + d[None, :], mask=(s < used)[:, None] & (d < D)[None, :], other=0.0)
        larger = tl.maximum(m, tl.max(level, 0))
        safe = tl.where(larger == float("-inf"), 0.0, larger)
        alpha = tl.exp2((m - safe) * to_log2)
        share = tl.exp2((level - safe) * to_log2)
        l = l * alpha + tl.sum(weight * share, 0)
        acc = acc * alpha[:, None] + tl.sum(tile * share[:, None], 0)[None, :]
        m = larger
    sink = None
    if sinks is not None:
        sink = tl.load(sinks + h).to(tl.float32)
    result, logs = finish(acc, m, l, sink, to_natural)
    at = (batch * Sq + i) * H + h
    tl.store(out + at * D + d[None, :], result.to(out.dtype.element_ty), mask=(d < D)[None, :])
    if lse is not None:
        one = tl.arange(0, 1)
        tl.store(lse + (batch * H + h) * Sq + i + one, logs)


def supports_attention_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, **terms: Any
) -> str | None:
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(-1) != 1:
            return f"the last dimension of {name} must be contiguous, not of stride {cache.stride(-1)}"
    if k_cache.dtype != q.dtype != torch.float32:
        mine, kept = (str(t.dtype).removeprefix("torch.") for t in (q, k_cache))
        return f"it takes caches of another dtype than q's with float32 queries only, not {mine} with {kept}"
    held = (k_cache, v_cache) if k_scale is None or v_scale is None else (k_scale, v_scale)
    return refuses(q, *held, terms)


def attention_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    k: Tensor | None,
    v: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor | None,
    causal: bool,
    scale: float | None,
    window: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    return_lse: bool,
    activations: str,
) -> Tensor | tuple[Tensor, Tensor]:
    q = with_rows(q)
    B, Sq, H, D = q.shape
    Hk, room = k_cache.shape[2], k_cache.shape[1]
    held = k_cache.dtype if activations == "rounded" else q.dtype
    out = empty(q.shape, q.dtype, q)
    lse = empty((B, H, Sq), torch.float32, q) if return_lse else None
    rows, pads, table = (edges(t) for t in (cache_batch_idx, cache_leftpad, block_table))
    lengths = lengths.contiguous()
    page = 1
    if table is not None:
        page, room = room, room * table.shape[1]
    tile = tiles.attention_kvcache(Sq * (H // Hk), D, held, arch(q), k_cache.dtype == torch.int8, table is not None)
    caches = strides(kc=k_cache, vc=v_cache)
    for name, t in (("ks", k_scale), ("vs", v_scale)):
        caches |= {f"{name}_{axis}": 0 if t is None else t.stride(n) for n, axis in enumerate(("batch", "row", "head"))}
    if k is not None or cos is not None:
        turned = None if cos is None else empty(q.shape, held, q)
        k, v = (None if t is None else with_rows(t) for t in (k, v))
        heads = (0 if k is None else 2 * Hk) + (0 if cos is None else H)
        launch(
            *(_append_kernel, (B * Sq, heads), q, turned, k, v, k_cache, v_cache, k_scale, v_scale),
            *(floats(cos), floats(sin), lengths, rows, table, Sq, H, Hk, room, 1 if cos is None else len(cos)),
            **strides(q=q, k=q if k is None else k, v=q if v is None else v),
            **caches,
            D=D,
            BLOCK_D=tile.blocks["BLOCK_D"],
            PAGE=page,
            table_stride=0 if table is None else table.shape[1],
            HALF=0 if cos is None else cos.shape[1],
            IS_INTERLEAVED=interleaved,
            tile=tiles.attention_append(D),
            fp_fusion=False,  # the page rounds each product
        )
        q = q if turned is None else turned
    q = q.to(held)
    chunk = tile.blocks["CHUNK"]
    splits = max(cdiv(room, chunk), 1)
    R = Sq * (H // Hk)
    many = splits > 1
    sums = empty((B, Hk, splits, R, D), torch.float32, q) if many else None
    levels = empty((B, Hk, splits, R), torch.float32, q) if many else None
    weights = empty((B, Hk, splits, R), torch.float32, q) if many else None
    scale = 1 / math.sqrt(D) if scale is None else float(scale)
    right = 0 if causal and window[1] != 0 else window[1]
    terms = softcap > 0 or alibi_slopes is not None or scale <= 0
    new = 0 if k is None else Sq
    sinks = floats(sinks)
    launch(
        *(_chunk_kernel, (B * Hk, cdiv(R, tile.blocks["BLOCK_M"]), splits)),
        *(q, k_cache, v_cache, k_scale, v_scale, lengths, rows, pads, table, floats(alibi_slopes), sinks, out, lse),
        *(sums, levels, weights, Sq, H, H // Hk, window[0], right, scale, float(softcap), splits, new, room),
        **strides(q=q),
        **caches,
        table_stride=0 if table is None else table.shape[1],
        slopes_batch=H if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0,
        D=D,
        PAGE=page,
        HAS_LEFT=window[0] >= 0,
        HAS_RIGHT=right >= 0,
        HAS_TERMS=terms,
        USE_SOFTCAP=softcap > 0,
        IS_EXACT=q.dtype == torch.float32,
        IS_WHOLE=not many,
        tile=tile,
    )
    if many:
        units = (1.0, math.log(2))  # of levels, as soften() leaves them, to powers of two and of e
        if q.dtype == torch.float32:
            natural = 1.0 if terms else scale
            units = (natural / math.log(2), natural)
        launch(
            *(_merge_kernel, (B * Sq * H,), sums, levels, weights, lengths, pads, sinks, out, lse),
            *(Sq, H, H // Hk, splits, new, room, *units),
            D=D,
            BLOCK_D=tile.blocks["BLOCK_D"],
            CHUNK=chunk,
            tile=tiles.attention_merge(D),
        )
    return out if lse is None else (out, lse)
