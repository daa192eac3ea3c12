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

q, k, v, bias and sinks get gradients, those through lse among them: attention_gradients.py. The CPU's kernels make all
of them, Triton's those of q, k and v: where bias or sinks want one there, the reference serves the call.

dropout_p drops probabilities after the normalisation, scaled by 1 / (1 - p); lse doesn't see it. Elements are counted
row-major in (B, H, Sq, Sk), sequence after sequence where they lie end to end.

attention_kvcache: k_cache, v_cache (B', Smax, Hk, D), row b of the batch in row b of the cache (cache_batch_idx[b]
where given), or pages (pages, page, Hk, D) with block_table (B, n) int32, slot t in page block_table[b, t // page]
(-1 = no page). lengths (B,) int32 = tokens in the cache before the call. k, v (B, Sq, Hk, D) are written in place at
slots lengths .. lengths + Sq, and the queries are those last Sq positions; without k and v, lengths is the total. It
never changes, and what would not fit raises before anything is written: except while a CUDA graph is captured, when
nobody looks at what is on the GPU. Replayed, lengths count as 0 at least and as the cache's slots at most, and what
lies beyond is not written; block_table and cache_batch_idx must then be right. With cos, sin (positions, R / 2) fp32, R
<= D, q and the new k are rotated first, by their absolute position: pairs (i, i + R/2), or (2i, 2i + 1) if interleaved,
to (x1 cos - x2 sin, x2 cos + x1 sin), rounded to the storage dtype. cache_leftpad (B,) int32: the first slots to leave
out; key 0 is the slot after them.

The caches may be of another float dtype than q, k and v: k and v are rounded to it, to nearest even, as they are
written, and all queries of the call see what was written. fp16 holds values up to 65,504 with 11 bits, bf16 all with 8.
activations="rounded", with caches of floats: q is rounded to their dtype too, so that matrix instructions of 16-bit
numbers may be used, on P also; what comes out is q's dtype still. Error: that of attention in the caches' dtype.

They may be int8 too, with k_scale and v_scale fp32, shaped like them without D and written beside them: the D values x
of a head at a position are kept as scale = max |x| / 127 and round(x * (127 / max |x|)), computed in fp32, and count as
one times the other, rounded to fp32. max |x| < 2^-120 counts as 0; values that aren't finite make the scale NaN. Unlike
the rest, this costs something that can be measured: benchmarks/quality.py.

Everything is computed in fp32 (fp64 for fp64) and rounded once; lse is fp32. A row's result depends on that row alone,
not on the batch. On the CPU keys are taken in chunks of 128 counted from the first key, and the chunks' (maximum, sum,
output) are merged in order, so it doesn't depend on the number of threads either, or on whether the row came in a
prefill or one token at a time. Where a machine multiplies pairs of bfloat16 (GPTFAST_CPU_ISA=avx512bf16), q, k and v
of it, in a cache too, are used as they are, two dims or two keys at a time, and P is rounded to bfloat16 for its
product with V, though not for z; numbers that are subnormal count as zero there. Triton's kernels differ in two things:
a prefill carries one running maximum through blocks of keys where decode merges chunks of 256, so the two agree within
the tolerance only, each bitwise in itself; and with 16-bit inputs P and dS are rounded to that dtype for their
products. Scores beyond 2^27 may overflow there.

Values at masked places must be finite. Dao: FlashAttention-2 (arXiv:2307.08691); Press et al.: ALiBi
(arXiv:2108.12409); Xiao et al.: attention sinks (arXiv:2309.17453); the softcap is Gemma 2's (arXiv:2408.00118).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gptfast.ops import attention_cases, attention_gradients, dispatch, library
from gptfast.ops.attention_checks import check_heads, check_kvcache, check_lengths, check_terms, check_varlen
from gptfast.ops.dispatch import require, shape
from gptfast.ops.philox import dropout_keep
from gptfast.ops.spec import Cost, Op, nbytes, products

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
    seed: Tensor | int = 0,
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
    seed: Tensor | int = 0,
    stream: int = 0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """out like q, or (out, lse) with return_lse. Formula, shapes and dtypes: the top of this page.

    Raises ValueError for shapes and dtypes that don't fit; BackendError where `backend` can't serve the call.
    """
    arguments: dict[str, Any] = {
        "q": q, "k": k, "v": v, "causal": causal, "scale": scale, "window": tuple(window), "softcap": softcap,
        "alibi_slopes": alibi_slopes, "sinks": sinks, "mask": mask, "bias": bias, "dropout_p": dropout_p,
        "seed": seed if dropout_p else 0, "stream": stream if dropout_p else 0,
        "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k,
    }  # fmt: skip
    page = "attention.attention"
    if dropout_p:
        library.check_seed("attention", seed)
    backend, as_op = library.route(page, backend, arguments, _check)
    if as_op:
        out, lse = _registered(
            **arguments | {"seed": library.seed_tensor(seed, q) if dropout_p else None}, backend=backend
        )
        return (out, lse) if return_lse else out
    if dropout_p or cu_seqlens_q is not None:  # what they hold is another each time
        _check(**arguments)
        arguments["seed"] = int(arguments["seed"])
        return dispatch.run(page, backend, reference, q, **arguments, return_lse=return_lse)
    arguments["return_lse"] = return_lse
    return dispatch.prepared(page, backend, reference, q, arguments, _check)(**arguments)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float | None,
    window: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    return_lse: bool = False,
    **_: Any,
) -> None:
    """Raises where arguments don't fit together."""
    dispatch.require_numbers("attention", causal=causal, scale=scale, window=window, softcap=softcap)
    dispatch.require_numbers("attention", dropout_p=dropout_p, return_lse=return_lse)
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
    check_heads("attention", q, k)
    B = q.shape[0]
    if cu_seqlens_q is not None:
        B = check_varlen(q, k, cu_seqlens_q, cu_seqlens_k, contents=not library.traced(cu_seqlens_q))
        require(mask is None and bias is None, "attention: expected no mask and no bias with cu_seqlens_q, got one")
    require(varlen or cu_seqlens_k is None, "attention: expected cu_seqlens_q with cu_seqlens_k, got None")
    check_terms("attention", q, B, window, softcap, alibi_slopes, sinks)
    require(0 <= dropout_p < 1, lambda: f"attention: expected 0 <= dropout_p < 1, got {dropout_p}")
    if mask is not None or bias is not None:
        full = (B, q.shape[2], q.shape[1], k.shape[1])
        for name, t, kinds in (("mask", mask, (torch.bool,)), ("bias", bias, (torch.float32, q.dtype))):
            require(
                t is None or (t.dtype in kinds and _broadcasts(t, full)),
                lambda: f"attention: expected {name} {kinds[-1]} broadcasting to {full}, got {shape(t)}",  # noqa: B023
            )


_registered = attention_gradients.register(reference)


def _broadcasts(t: Tensor, full: tuple[int, ...]) -> bool:
    return t.dim() <= 4 and all(n in (1, m) for n, m in zip(reversed(t.shape), reversed(full)))


def cost(q: Tensor, k: Tensor, v: Tensor, **terms: Any) -> Cost:
    cu_q, cu_k = terms.get("cu_seqlens_q"), terms.get("cu_seqlens_k")
    if cu_q is not None and cu_k is not None:
        lengths = [(q1 - q0, k1 - k0) for q0, q1, k0, k1 in _spans(cu_q.tolist(), cu_k.tolist())]
    else:
        lengths = [(q.shape[1], k.shape[1])] * q.shape[0]
    pairs = sum(_pairs(*n, terms.get("causal", False), terms.get("window", (-1, -1))) for n in lengths)
    moved = nbytes(q, q, k, v, terms.get("bias"), terms.get("mask"))
    return Cost(flops=4 * q.shape[-1] * q.shape[-2] * pairs, bytes=moved, unit=products(q, k, v))


def train_cost(q: Tensor, k: Tensor, v: Tensor, **terms: Any) -> Cost:
    """The backward has five products where the forward has two; it reads five tensors and writes three."""
    forward = cost(q, k, v, **terms)
    moved = forward.bytes + nbytes(q, q, q, q, k, k, v, v)
    return Cost(flops=3.5 * forward.flops, bytes=moved, unit=forward.unit)


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
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
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
    activations: str = "exact",
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
        mine = mine.to(k_cache.dtype).to(q.dtype) if activations == "rounded" else mine
        if k is not None and v is not None:
            new = row[length:], slot[length:]
            _keep(_rotate(k[b], turn, interleaved), k_cache, k_scale, new)
            _keep(v[b], v_cache, v_scale, new)
        first = 0 if cache_leftpad is None else int(cache_leftpad[b])
        seen = row[first:], slot[first:]
        keys, values = _kept(k_cache, k_scale, seen), _kept(v_cache, v_scale, seen)
        slopes = alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        out, lse = _attend(*(t[None] for t in (mine, keys, values)), causal=causal, scale=scale, window=window,
                           softcap=softcap, slopes=slopes, sinks=sinks)  # fmt: skip
        outs.append(out)
        lses.append(lse)
    out = torch.cat(outs) if outs else torch.empty_like(q)
    lse = torch.cat(lses) if lses else q.new_zeros(0, q.shape[2], Sq, dtype=_wide(q))
    return (out, lse) if return_lse else out


def _keep(x: Tensor, cache: Tensor, scale: Tensor | None, at: tuple[Tensor, Tensor]) -> None:
    """x (S, Hk, D) to these rows and slots of a cache."""
    if scale is None:
        cache[at] = x.to(cache.dtype)
        return
    x = x.float()
    most = x.abs().amax(-1)
    usable = (most >= 2.0**-120) & most.isfinite()
    inverse = torch.full_like(most, 127) / most  # 127 / most would be its reciprocal times 127, rounded twice
    whole = (x * inverse[..., None]).round()
    cache[at] = torch.where(usable[..., None], whole, 0).to(torch.int8)
    scale[at] = torch.where(usable, most / 127, torch.where(most < 1, 0.0, torch.nan)).to(scale.dtype)


def _kept(cache: Tensor, scale: Tensor | None, at: tuple[Tensor, Tensor]) -> Tensor:
    """What is at these rows and slots of a cache."""
    return cache[at] if scale is None else cache[at].float() * scale[at].float()[..., None]


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
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
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
    activations: str = "exact",
    backend: str | None = None,
) -> Any:
    """out like q (B, Sq, H, D), or (out, lse (B, H, Sq)); with k, v they are written to the caches first, in place.

    Shapes and dtypes: the top of this page. Raises ValueError for what doesn't fit, before anything is written;
    BackendError where `backend` can't serve the call.
    """
    arguments: dict[str, Any] = {
        "q": q, "k_cache": k_cache, "v_cache": v_cache, "lengths": lengths, "k": k, "v": v,
        "k_scale": k_scale, "v_scale": v_scale, "block_table": block_table,
        "causal": causal, "scale": scale, "window": tuple(window), "softcap": softcap, "alibi_slopes": alibi_slopes,
        "sinks": sinks, "cos": cos, "sin": sin, "interleaved": interleaved, "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad, "return_lse": return_lse, "activations": activations,
    }  # fmt: skip
    page = "attention.attention_kvcache"
    library.untransformed("attention_kvcache", arguments)
    function = dispatch.prepared(page, backend, reference_kvcache, q, arguments, check_kvcache)
    check_lengths(q, k_cache, lengths, k, block_table, cos, cache_batch_idx, cache_leftpad)
    return function(**arguments)


def cost_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, **terms: Any) -> Cost:
    k, causal, window = terms.get("k"), terms.get("causal", True), terms.get("window", (-1, -1))
    totals = [n if k is None else n + q.shape[1] for n in lengths.tolist()]
    pairs = sum(_pairs(q.shape[1], n, causal, window) for n in totals)
    keys = sum(min(n, q.shape[1] + window[0]) if window[0] >= 0 else n for n in totals)
    row = k_cache.shape[2] * (
        k_cache.shape[3] * k_cache.element_size() + (4 if terms.get("k_scale") is not None else 0)
    )
    moved = nbytes(q, q, k, terms.get("v")) + 2 * keys * row
    operands = (k_cache, v_cache) if terms.get("activations") == "rounded" else (q, k_cache, v_cache)
    return Cost(flops=4 * q.shape[-1] * q.shape[2] * pairs, bytes=moved, unit=products(*operands))


OPS = [
    Op("attention", attention, reference, cost, attention_cases.cases, attention_cases.baseline,
       take=attention_cases.take, batch=attention_cases.batch, train_cost=train_cost,
       differentiable=("q", "k", "v", "bias", "sinks")),
    Op("attention_kvcache", attention_kvcache, reference_kvcache, cost_kvcache, attention_cases.cases_kvcache,
       attention_cases.baseline_kvcache, mutates=("k_cache", "v_cache", "k_scale", "v_scale"),
       take=attention_cases.take_kvcache, batch=attention_cases.batch_kvcache),
]  # fmt: skip
