"""What attention and attention_kvcache say of arguments that don't fit: one sentence, expected and got."""

from __future__ import annotations

import torch
from torch import Tensor

from gptfast.ops.dispatch import require, require_numbers, shape, unreadable


def check_heads(op: str, q: Tensor, k: Tensor) -> None:
    H, Hk, D = q.shape[-2], k.shape[-2], q.shape[-1]
    require(
        D > 0 and Hk > 0 and H % Hk == 0,
        lambda: f"{op}: expected D > 0 and query heads a multiple of the KV heads, got D = {D}, {H} and {Hk} heads",
    )


def check_terms(
    op: str,
    q: Tensor,
    B: int,
    window: tuple[int, int],
    softcap: float,
    slopes: Tensor | None,
    sinks: Tensor | None,
) -> None:
    H = q.shape[-2]
    require(
        len(window) == 2 and min(window) >= -1,
        lambda: f"{op}: expected window (left, right), each >= -1, got {window}",
    )
    require(softcap >= 0, lambda: f"{op}: expected softcap >= 0, got {softcap}")
    require(
        slopes is None or (slopes.shape in ((H,), (B, H)) and slopes.is_floating_point()),
        lambda: f"{op}: expected alibi_slopes ({H},) or ({B}, {H}) of floats, got {shape(slopes)}",
    )
    require(
        sinks is None or (sinks.shape == (H,) and sinks.is_floating_point()),
        lambda: f"{op}: expected sinks ({H},) of floats, got {shape(sinks)}",
    )


def check_varlen(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor | None, contents: bool = True) -> int:
    """The number of sequences. `contents`: whether the edges can be read."""
    if cu_k is None:
        raise ValueError("attention: expected cu_seqlens_k with cu_seqlens_q, got None")
    for name, cu, total in (("cu_seqlens_q", cu_q, q.shape[0]), ("cu_seqlens_k", cu_k, k.shape[0])):
        if cu.dtype != torch.int32 or cu.dim() != 1 or not len(cu) == len(cu_q) >= 1:
            raise ValueError(f"attention: expected {name} (N + 1,) int32, N the same for both, got {shape(cu)}")
        edges = cu.tolist() if contents else [0, total]
        if edges[0] != 0 or edges[-1] != total or edges != sorted(edges):
            raise ValueError(f"attention: expected {name} rising from 0 to {total}, got {edges[:8]}")
    return len(cu_q) - 1


def check_kvcache(
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
    window: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    causal: bool,
    scale: float | None,
    interleaved: bool,
    return_lse: bool,
    activations: str,
) -> None:
    """Raises where shapes or dtypes don't fit together."""
    op, dtype = "attention_kvcache", q.dtype
    require_numbers(op, causal=causal, scale=scale, window=window, softcap=softcap, interleaved=interleaved)
    require_numbers(op, return_lse=return_lse)
    require(q.dim() == 4 and q.is_floating_point(), lambda: f"{op}: expected q (B, Sq, H, D) of floats, got {shape(q)}")
    B, Sq, _H, D = q.shape
    require(
        k_cache.dim() == 4 and k_cache.shape[-1] == D and (k_cache.is_floating_point() or k_cache.dtype == torch.int8),
        lambda: f"{op}: expected k_cache (B, Smax, Hk, {D}) of floats or int8, got {shape(k_cache)}",
    )
    require(
        v_cache.shape == k_cache.shape and v_cache.dtype == k_cache.dtype,
        lambda: f"{op}: expected v_cache like k_cache {shape(k_cache)}, got {shape(v_cache)}",
    )
    for name, scales in (("k_scale", k_scale), ("v_scale", v_scale)):
        if k_cache.dtype == torch.int8:
            if scales is None or scales.shape != k_cache.shape[:3] or scales.dtype != torch.float32:
                wanted = f"{name} {tuple(k_cache.shape[:3])} float32 with int8 caches"
                raise ValueError(f"{op}: expected {wanted}, got {shape(scales)}")
        elif scales is not None:
            raise ValueError(f"{op}: expected no {name} with caches of {shape(k_cache)}, got {shape(scales)}")
    allowed = ("exact",) if k_cache.dtype == torch.int8 else ("exact", "rounded")
    require(
        activations in allowed,
        lambda: (
            f"{op}: expected activations {' or '.join(map(repr, allowed))} with caches of {shape(k_cache)}, "
            f"got {activations!r}"
        ),
    )
    check_heads(op, q, k_cache)
    check_terms(op, q, B, window, softcap, alibi_slopes, sinks)
    require((k is None) == (v is None), f"{op}: expected k and v, or neither, got one of them")
    if k is not None and v is not None:
        wanted = (B, Sq, *k_cache.shape[2:])
        require(
            k.shape == v.shape == wanted and k.dtype == v.dtype == dtype,
            lambda: f"{op}: expected k and v {wanted} {dtype}, got {shape(k)} and {shape(v)}",
        )
    for name, t in (("lengths", lengths), ("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
        if t is not None and (t.shape != (B,) or t.dtype != torch.int32):
            raise ValueError(f"{op}: expected {name} ({B},) int32, got {shape(t)}")
    if (table := block_table) is not None:
        if table.dim() != 2 or table.shape[0] != B or table.dtype != torch.int32:
            raise ValueError(f"{op}: expected block_table ({B}, n) int32, got {shape(table)}")
        require(cache_batch_idx is None, f"{op}: expected block_table or cache_batch_idx, got both")
    elif cache_batch_idx is None and k_cache.shape[0] != B:
        raise ValueError(f"{op}: expected a cache of {B} rows, like q, got {shape(k_cache)}")
    require((cos is None) == (sin is None), f"{op}: expected cos and sin, or neither, got one of them")
    if cos is not None and sin is not None:
        fits = cos.dim() == 2 and cos.shape == sin.shape and 2 * cos.shape[1] <= D
        require(
            fits and cos.dtype == sin.dtype and cos.dtype in (torch.float32, torch.float64),
            lambda: (
                f"{op}: expected cos and sin (positions, at most {D // 2}) float32, got {shape(cos)} and {shape(sin)}"
            ),
        )


def check_lengths(
    q: Tensor, cache: Tensor, lengths: Tensor, k: Tensor | None, table: Tensor | None, cos: Tensor | None,
    rows: Tensor | None, pads: Tensor | None
) -> None:  # fmt: skip
    """Raises where a sequence doesn't fit its cache, or its pages, row or positions are not there. Nothing while a CUDA
    graph is captured."""
    if unreadable(lengths):
        return
    op, Sq, before = "attention_kvcache", q.shape[1], lengths.tolist()
    new, least = 0 if k is None else Sq, min(before) if before else 0
    longest = (max(before) if before else 0) + new
    room = cache.shape[1] * (1 if table is None else table.shape[1])
    if least < 0 or longest > room:
        raise ValueError(f"{op}: expected lengths 0 to {room - new} ({room} slots, {new} new tokens), got {before[:8]}")
    if table is not None:
        used = torch.arange(table.shape[1], device=table.device) * cache.shape[1] < (lengths + new)[:, None]
        bad = table[used & ((table < 0) | (table >= cache.shape[0]))]
        require(
            bad.numel() == 0,
            lambda: f"{op}: expected pages 0 to {cache.shape[0] - 1} in block_table, got {bad[0].item()}",
        )
    if rows is not None:
        index = rows.tolist()
        if not all(0 <= i < cache.shape[0] for i in index) or (new and len(set(index)) < len(index)):
            raise ValueError(f"{op}: expected cache_batch_idx 0 to {cache.shape[0] - 1}, each once, got {index[:8]}")
    if pads is not None and not all(0 <= p <= n for p, n in zip(pads.tolist(), before)):
        raise ValueError(f"{op}: expected cache_leftpad 0 to lengths {before[:8]}, got {pads.tolist()[:8]}")
    if cos is not None:
        if cos.shape[0] < longest:
            wanted = f"(at least {longest}, at most {q.shape[3] // 2}) float32"
            raise ValueError(f"{op}: expected cos and sin {wanted}, got {shape(cos)}")
        if k is None and before and least < Sq:
            raise ValueError(f"{op}: expected lengths of at least Sq = {Sq} to rotate q without k, got {least}")
