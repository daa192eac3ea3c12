"""Attention, dense and with a KV cache: softmax(Q K^T scale + terms) V without ever storing Sq x Sk.

    s(i, j) = scale * q(i) . k(j)                             j: keys of the KV head h // (H / Hk)
    s = softcap * tanh(s / softcap)                           where softcap > 0
    s = s - slope(h) * |i + Sk - Sq - j| + bias(i, j)         ALiBi; bias
    s = -inf      unless mask(i, j), and j <= i + Sk - Sq if causal, and the window's left and right hold
    out(i) = sum_j e^s(i, j) v(j) / z,   lse(i) = ln z,   z = sum_j e^s(i, j) + e^sink(h)

q (B, Sq, H, D), k and v (B, Sk, Hk, D), H a multiple of Hk, float32, bfloat16 or float16 (float64 on the reference).
Causality and the window are aligned bottom-right: the last query sees the last key. window = (left, right) keeps keys
i + Sk - Sq - left .. i + Sk - Sq + right, inclusive; -1 is open. mask: bool, True = attend; bias: float32 or q's dtype;
both broadcast to (B, H, Sq, Sk). alibi_slopes (H) or (B, H); sinks (H): a logit that takes mass and gives none. scale
is 1 / sqrt(D) unless given. A row that may attend to nothing gives 0 and LSE -inf (its sink, if there is one).

With cu_seqlens_q and cu_seqlens_k (int32, (N + 1), from 0) q is (Tq, H, D), k and v (Tk, Hk, D): N sequences end to
end, each attending to itself; lse is then (H, Tq). mask and bias don't apply to those.

dropout_p drops probabilities after the normalisation, scaled by 1 / (1 - p); lse doesn't see it. Elements are counted
row-major in (B, H, Sq, Sk), sequence after sequence where they lie end to end.

attention_kvcache: k_cache, v_cache (B', Smax, Hk, D), row b of the batch in row b of the cache (cache_batch_idx[b]
where given), or pages (pages, page, Hk, D) with block_table (B, n) int32, slot t in page block_table[b, t // page]
(-1 = no page). lengths (B,) int32 = tokens in the cache before the call. k, v (B, Sq, Hk, D) are written in place at
slots lengths .. lengths + Sq, and the queries are those last Sq positions; without k and v, lengths is the total. It
never changes, and what would not fit raises before anything is written. With cos, sin (positions, R / 2) fp32, R <= D,
q and the new k are rotated first, by their absolute position: pairs (i, i + R/2), or (2i, 2i + 1) if interleaved, to
(x1 cos - x2 sin, x2 cos + x1 sin), rounded to the storage dtype. cache_leftpad (B,) int32: the first slots to leave
out; key 0 is the slot after them.

The caches may be of another float dtype than q, k and v: these are rounded to it, to nearest even, as they are written,
and all queries of the call see what was written. fp16 holds values up to 65,504 with 11 bits, bf16 all with 8.

Everything is computed in fp32 (fp64 for fp64) and rounded once; lse is fp32. Keys are taken in chunks of 128 counted
from the first key, and the chunks' (maximum, sum, output) are merged in order, so a row's result depends on that row
alone: not on the batch, the number of threads, or whether it came in a prefill or one token at a time. Values at masked
places must be finite. Dao: FlashAttention-2 (arXiv:2307.08691); Press et al.: ALiBi (arXiv:2108.12409); Xiao et al.:
attention sinks (arXiv:2309.17453); the softcap is Gemma 2's (arXiv:2408.00118).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gptfast.ops import attention_cases, dispatch
from gptfast.ops.dispatch import require, shape
from gptfast.ops.philox import dropout_keep
from gptfast.ops.spec import Cost, Op, nbytes

CHUNK = 128  # keys; kernels merge chunks in order
Result = Any  # Tensor, or (Tensor, Tensor) with return_lse


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    stream: int = 0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
) -> Result:
    """The meaning of attention, in plain PyTorch."""
    terms: dict[str, Any] = dict(causal=causal, scale=scale, window=window, softcap=softcap, sinks=sinks)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        keep = None
        if dropout_p:
            keep = dropout_keep((q.shape[0], q.shape[2], q.shape[1], k.shape[1]), dropout_p, seed, stream, q.device)
        out, lse = _attend(q, k, v, **terms, slopes=alibi_slopes, mask=mask, bias=bias, dropout_p=dropout_p, keep=keep)
        return (out, lse) if return_lse else out
    edges_q, edges_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    sizes = [q.shape[1] * (q1 - q0) * (k1 - k0) for q0, q1, k0, k1 in _spans(edges_q, edges_k)]
    kept = dropout_keep((sum(sizes),), dropout_p, seed, stream, q.device).split(sizes) if dropout_p else None
    outs, lses = [q.new_zeros(0, *q.shape[1:])], [q.new_zeros(q.shape[1], 0, dtype=_wide(q))]
    for n, (q0, q1, k0, k1) in enumerate(_spans(edges_q, edges_k)):
        keep = None if kept is None else kept[n].view(1, q.shape[1], q1 - q0, k1 - k0)
        slopes = alibi_slopes[n] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        out, lse = _attend(*(t[None] for t in (q[q0:q1], k[k0:k1], v[k0:k1])), **terms, slopes=slopes,
                           dropout_p=dropout_p, keep=keep)  # fmt: skip
        outs.append(out[0])
        lses.append(lse[0])
    return (torch.cat(outs), torch.cat(lses, -1)) if return_lse else torch.cat(outs)


def _spans(edges_q: list[int], edges_k: list[int]) -> list[tuple[int, int, int, int]]:
    return list(zip(edges_q, edges_q[1:], edges_k, edges_k[1:]))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def visible(q_len: int, k_len: int, causal: bool, window: tuple[int, int], device: torch.device | str) -> Tensor:
    """Which keys each query may attend to by causality and window: bool (q_len, k_len)."""
    distance = torch.arange(k_len, device=device) - torch.arange(q_len, device=device)[:, None] - (k_len - q_len)
    keep = torch.ones_like(distance, dtype=torch.bool)
    right = 0 if causal and window[1] != 0 else window[1]
    if window[0] >= 0:
        keep &= distance >= -window[0]
    return keep if right < 0 else keep & (distance <= right)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float | None,
    window: tuple[int, int],
    softcap: float,
    slopes: Tensor | None,
    sinks: Tensor | None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out (B, Sq, H, D) and lse (B, H, Sq) of a batch of sequences of one length."""
    wide, (B, Sq, H, D), (Sk, Hk) = _wide(q), q.shape, k.shape[1:3]
    grouped = q.to(wide).reshape(B, Sq, Hk, H // Hk, D)
    s = torch.einsum("bqhgd,bkhd->bhgqk", grouped, k.to(wide)).reshape(B, H, Sq, Sk)
    s = s * (1 / math.sqrt(D) if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if slopes is not None:
        distance = torch.arange(Sk, device=q.device) - torch.arange(Sq, device=q.device)[:, None] - (Sk - Sq)
        s = s - slopes.to(wide).view(-1, H, 1, 1) * distance.abs()
    if bias is not None:
        s = s + bias.to(wide)
    seen = visible(Sq, Sk, causal, window, q.device)
    s = s.masked_fill(~(seen if mask is None else seen & mask), -math.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.to(wide).view(1, H, 1, 1).expand(B, H, Sq, 1)], -1)
    lse = torch.logsumexp(s, -1) if s.shape[-1] else s.new_full((B, H, Sq), -math.inf)
    p = torch.exp(s[..., :Sk] - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    if keep is not None:
        p = torch.where(keep, p / (1 - dropout_p), 0.0)
    out = torch.einsum("bhgqk,bkhd->bqhgd", p.view(B, Hk, H // Hk, Sq, Sk), v.to(wide))
    return out.reshape(B, Sq, H, D).to(q.dtype), lse


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    stream: int = 0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """out like q, or (out, lse) with return_lse. Formula, shapes and dtypes: the top of this page.

    Raises ValueError for shapes and dtypes that don't fit; BackendError where `backend` can't serve the call.
    """
    varlen = cu_seqlens_q is not None
    dims, form = (3, "(T, H, D)") if varlen else (4, "(B, S, H, D)")
    require(
        q.dim() == dims and q.is_floating_point(), lambda: f"attention: expected q {form} of floats, got {shape(q)}"
    )
    alike = k.dim() == dims and k.dtype == q.dtype and k.shape[-1] == q.shape[-1]
    require(
        alike and (varlen or k.shape[0] == q.shape[0]),
        lambda: f"attention: expected k {form} with q's batch, head dimension and dtype {shape(q)}, got {shape(k)}",
    )
    require(
        v.shape == k.shape and v.dtype == q.dtype,
        lambda: f"attention: expected v like k {shape(k)}, got {shape(v)}",
    )
    _check_heads("attention", q, k)
    B = q.shape[0]
    if cu_seqlens_q is not None:
        B = _check_varlen(q, k, cu_seqlens_q, cu_seqlens_k)
        require(mask is None and bias is None, "attention: expected no mask and no bias with cu_seqlens_q, got one")
    require(varlen or cu_seqlens_k is None, "attention: expected cu_seqlens_q with cu_seqlens_k, got None")
    _check_terms("attention", q, B, window, softcap, alibi_slopes, sinks)
    require(0 <= dropout_p < 1, lambda: f"attention: expected 0 <= dropout_p < 1, got {dropout_p}")
    if mask is not None or bias is not None:
        full = (B, q.shape[2], q.shape[1], k.shape[1])
        for name, t, kinds in (("mask", mask, (torch.bool,)), ("bias", bias, (torch.float32, q.dtype))):
            require(
                t is None or (t.dtype in kinds and _broadcasts(t, full)),
                lambda: f"attention: expected {name} {kinds[-1]} broadcasting to {full}, got {shape(t)}",  # noqa: B023
            )
    return dispatch.run(
        *("attention.attention", backend, reference, q),
        **dict(q=q, k=k, v=v, causal=causal, scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes),
        **dict(sinks=sinks, mask=mask, bias=bias, dropout_p=dropout_p, seed=seed, stream=stream),
        **dict(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, return_lse=return_lse),
    )


def _broadcasts(t: Tensor, full: tuple[int, ...]) -> bool:
    return t.dim() <= 4 and all(n in (1, m) for n, m in zip(reversed(t.shape), reversed(full)))


def _check_heads(op: str, q: Tensor, k: Tensor) -> None:
    H, Hk, D = q.shape[-2], k.shape[-2], q.shape[-1]
    require(
        D > 0 and Hk > 0 and H % Hk == 0,
        lambda: f"{op}: expected D > 0 and query heads a multiple of the KV heads, got D = {D}, {H} and {Hk} heads",
    )


def _check_terms(
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


def _check_varlen(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor | None) -> int:
    """The number of sequences."""
    if cu_k is None:
        raise ValueError("attention: expected cu_seqlens_k with cu_seqlens_q, got None")
    for name, cu, total in (("cu_seqlens_q", cu_q, q.shape[0]), ("cu_seqlens_k", cu_k, k.shape[0])):
        if cu.dtype != torch.int32 or cu.dim() != 1 or not len(cu) == len(cu_q) >= 1:
            raise ValueError(f"attention: expected {name} (N + 1,) int32, N the same for both, got {shape(cu)}")
        edges = cu.tolist()
        if edges[0] != 0 or edges[-1] != total or edges != sorted(edges):
            raise ValueError(f"attention: expected {name} rising from 0 to {total}, got {edges[:8]}")
    return len(cu_q) - 1


def cost(q: Tensor, k: Tensor, v: Tensor, **terms: Any) -> Cost:
    cu_q, cu_k = terms.get("cu_seqlens_q"), terms.get("cu_seqlens_k")
    if cu_q is not None and cu_k is not None:
        lengths = [(q1 - q0, k1 - k0) for q0, q1, k0, k1 in _spans(cu_q.tolist(), cu_k.tolist())]
    else:
        lengths = [(q.shape[1], k.shape[1])] * q.shape[0]
    pairs = sum(_pairs(*n, terms.get("causal", False), terms.get("window", (-1, -1))) for n in lengths)
    moved = nbytes(q, q, k, v, terms.get("bias"), terms.get("mask"))
    return Cost(flops=4 * q.shape[-1] * q.shape[-2] * pairs, bytes=moved)


def _pairs(q_len: int, k_len: int, causal: bool, window: tuple[int, int]) -> int:
    """How many (query, key) pairs attend."""
    here = torch.arange(q_len) + (k_len - q_len)
    right = 0 if causal and window[1] != 0 else window[1]
    low = (here - window[0]).clamp(min=0) if window[0] >= 0 else torch.zeros_like(here)
    high = (here + right + 1).clamp(max=k_len) if right >= 0 else torch.full_like(here, k_len)
    return int((high - low).clamp(min=0).sum())


def reference_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    block_table: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    return_lse: bool = False,
) -> Result:
    """The meaning of attention_kvcache, in plain PyTorch."""
    Sq, page, outs, lses = q.shape[1], k_cache.shape[1], [], []
    for b, length in enumerate(lengths.tolist()):
        total = length if k is None else length + Sq
        slot = torch.arange(total, device=q.device)
        if block_table is not None:
            row, slot = block_table[b].long()[slot // page], slot % page
        else:
            row = slot * 0 + (b if cache_batch_idx is None else cache_batch_idx[b])
        turn = (cos[total - Sq : total], sin[total - Sq : total]) if cos is not None and sin is not None else None
        mine = _rotate(q[b], turn, interleaved)
        if k is not None and v is not None:
            k_cache[row[length:], slot[length:]] = _rotate(k[b], turn, interleaved).to(k_cache.dtype)
            v_cache[row[length:], slot[length:]] = v[b].to(v_cache.dtype)
        first = 0 if cache_leftpad is None else int(cache_leftpad[b])
        keys, values = k_cache[row[first:], slot[first:]], v_cache[row[first:], slot[first:]]
        slopes = alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        out, lse = _attend(*(t[None] for t in (mine, keys, values)), causal=causal, scale=scale, window=window,
                           softcap=softcap, slopes=slopes, sinks=sinks)  # fmt: skip
        outs.append(out)
        lses.append(lse)
    out = torch.cat(outs) if outs else torch.empty_like(q)
    lse = torch.cat(lses) if lses else q.new_zeros(0, q.shape[2], Sq, dtype=_wide(q))
    return (out, lse) if return_lse else out


def _rotate(x: Tensor, turn: tuple[Tensor, Tensor] | None, interleaved: bool) -> Tensor:
    """x (S, H, D) rotated by cos, sin (S, R / 2) and rounded to its own dtype."""
    if turn is None:
        return x
    cos, sin = (t.to(_wide(x))[:, None] for t in turn)
    half, wide = cos.shape[-1], x.to(_wide(x))
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    )
    x1, x2, out = wide[..., first], wide[..., second], wide.clone()
    out[..., first], out[..., second] = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    return out.to(x.dtype)


def attention_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    block_table: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """out like q (B, Sq, H, D), or (out, lse (B, H, Sq)); with k, v they are written to the caches first, in place.

    Shapes and dtypes: the top of this page. Raises ValueError for what doesn't fit, before anything is written;
    BackendError where `backend` can't serve the call.
    """
    arguments: dict[str, Any] = {
        "q": q, "k_cache": k_cache, "v_cache": v_cache, "lengths": lengths, "k": k, "v": v, "block_table": block_table,
        "causal": causal, "scale": scale, "window": tuple(window), "softcap": softcap, "alibi_slopes": alibi_slopes,
        "sinks": sinks, "cos": cos, "sin": sin, "interleaved": interleaved, "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad, "return_lse": return_lse,
    }  # fmt: skip
    page = "attention.attention_kvcache"
    function = dispatch.prepared(page, backend, reference_kvcache, q, arguments, _check_kvcache)
    _check_lengths(q, k_cache, lengths, k, block_table, cos, cache_batch_idx, cache_leftpad)
    return function(**arguments)


def _check_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    k: Tensor | None,
    v: Tensor | None,
    block_table: Tensor | None,
    window: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    **_: Any,
) -> None:
    """Raises where shapes or dtypes don't fit together."""
    op, dtype = "attention_kvcache", q.dtype
    require(q.dim() == 4 and q.is_floating_point(), lambda: f"{op}: expected q (B, Sq, H, D) of floats, got {shape(q)}")
    B, Sq, _H, D = q.shape
    require(
        k_cache.dim() == 4 and k_cache.shape[-1] == D and k_cache.is_floating_point(),
        lambda: f"{op}: expected k_cache (B, Smax, Hk, {D}) of floats, got {shape(k_cache)}",
    )
    require(
        v_cache.shape == k_cache.shape and v_cache.dtype == k_cache.dtype,
        lambda: f"{op}: expected v_cache like k_cache {shape(k_cache)}, got {shape(v_cache)}",
    )
    _check_heads(op, q, k_cache)
    _check_terms(op, q, B, window, softcap, alibi_slopes, sinks)
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


def _check_lengths(
    q: Tensor, cache: Tensor, lengths: Tensor, k: Tensor | None, table: Tensor | None, cos: Tensor | None,
    rows: Tensor | None, pads: Tensor | None
) -> None:  # fmt: skip
    """Raises where a sequence doesn't fit its cache, or its pages, row or positions are not there."""
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


def cost_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, **terms: Any) -> Cost:
    k, causal, window = terms.get("k"), terms.get("causal", True), terms.get("window", (-1, -1))
    totals = [n if k is None else n + q.shape[1] for n in lengths.tolist()]
    pairs = sum(_pairs(q.shape[1], n, causal, window) for n in totals)
    keys = sum(min(n, q.shape[1] + window[0]) if window[0] >= 0 else n for n in totals)
    row = k_cache.shape[2] * k_cache.shape[3] * k_cache.element_size()
    return Cost(flops=4 * q.shape[-1] * q.shape[2] * pairs, bytes=nbytes(q, q, k, terms.get("v")) + 2 * keys * row)


OPS = [
    Op("attention", attention, reference, cost, attention_cases.cases, attention_cases.baseline,
       take=attention_cases.take, batch=attention_cases.batch),
    Op("attention_kvcache", attention_kvcache, reference_kvcache, cost_kvcache, attention_cases.cases_kvcache,
       attention_cases.baseline_kvcache, mutates=("k_cache", "v_cache"), take=attention_cases.take_kvcache,
       batch=attention_cases.batch_kvcache),
]  # fmt: skip
