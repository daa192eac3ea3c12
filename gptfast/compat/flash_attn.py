"""flash-attn's functions (version 2: names, order of arguments, layouts, meaning) over our ops, on any backend of ours.

    from gptfast.compat.flash_attn import flash_attn_func      # was: from flash_attn import flash_attn_func

q (B, Sq, H, D), k and v (B, Sk, Hk, D), H a multiple of Hk; fp32 too. Causality and windows are aligned bottom-right; a
query without a key gives 0. Dropout draws its seed from PyTorch's generator. `deterministic`, `num_splits` and the
longest lengths of varlen calls are taken and change nothing: results never depend on such things here.

With return_attn_probs: (out, softmax_lse, S_dmask). softmax_lse is fp32, natural, (B, H, Sq), or (H, T) for varlen.
S_dmask is empty without dropout and for varlen; with it, the probabilities (B, H, Sq, Sk) before dropout, negative
where they were dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptfast import ops
from gptfast.ops.attention import visible
from gptfast.ops.philox import dropout_keep

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """out (B, Sq, H, D), or (out, softmax_lse, S_dmask)."""
    terms = _terms(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    if not return_attn_probs:
        return ops.attention(q, k, v, **terms)
    out, lse = ops.attention(q, k, v, return_lse=True, **terms)
    return out, lse, _signed_probabilities(q, k, lse, terms) if dropout_p else q.new_empty(0)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """The same of qkv (B, S, 3, H, D)."""
    rest: Any = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    q, k, v = qkv.unbind(2)
    return flash_attn_func(q, k, v, *rest)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """The same of q (B, Sq, H, D) and kv (B, Sk, 2, Hk, D)."""
    rest: Any = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    k, v = kv.unbind(2)
    return flash_attn_func(q, k, v, *rest)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """q (T, H, D), k and v (Tk, Hk, D), sequences end to end by cu_seqlens (N + 1) int32 -> out (T, H, D).

    block_table (N, n) int32: k and v are then pages (pages, page, Hk, D), slot t of sequence i in page
    block_table[i, t // page], and cu_seqlens_k says how long each sequence is.
    """
    if block_table is not None:
        at = _paged_slots(block_table, k.shape[1], cu_seqlens_k)
        k, v = (t.flatten(0, 1)[at] for t in (k, v))
    terms = _terms(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    edges = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    if not return_attn_probs:
        return ops.attention(q, k, v, **edges, **terms)
    return *ops.attention(q, k, v, return_lse=True, **edges, **terms), q.new_empty(0)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """The same of qkv (T, 3, H, D)."""
    rest: Any = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *rest)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """The same of q (T, H, D) and kv (Tk, 2, Hk, D)."""
    rest: Any = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *rest)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """q (B, Sq, H, D) against caches (B', Smax, Hk, D) or (pages, page, Hk, D), to which k and v (B, Sq, Hk, D) are
    appended in place -> out, or (out, softmax_lse).

    cache_seqlens: tokens in the cache before the call; None = the whole cache is full. cache_batch_idx: the
    caches' row for each row of q; None = their first B rows. With rotary_cos and rotary_sin (positions, R / 2) the new
    keys turn by their positions, and so do the queries where there is causality or a window; else all queries stand at
    cache_seqlens. Raises ValueError for rotary tables without k, and for a k of another length than q.
    """
    B, Sq = q.shape[:2]
    if (rotary_cos is not None or rotary_sin is not None) and k is None:
        raise ValueError("flash_attn_with_kvcache: expected k and v with rotary_cos and rotary_sin, got None")
    if k is not None and k.shape[1] != Sq:
        raise ValueError(f"flash_attn_with_kvcache: expected k of q's length {Sq}, got {k.shape[1]}")
    if cache_batch_idx is None and block_table is None:
        k_cache, v_cache = k_cache[:B], v_cache[:B]  # a cache may have rows to spare
    if cache_seqlens is None:
        cache_seqlens = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if not isinstance(cache_seqlens, Tensor):
        cache_seqlens = torch.full((B,), cache_seqlens, dtype=torch.int32, device=q.device)
    turn: dict[str, Any] = {"interleaved": rotary_interleaved}
    cos, sin = (None if t is None else t.float() for t in (rotary_cos, rotary_sin))
    if cos is not None and sin is not None and k is not None and not causal and tuple(window_size) == (-1, -1):
        at = cache_seqlens.long()[:, None]
        there = at + torch.arange(Sq, device=q.device)
        q, _ = ops.rope(q, k, cos[at].expand(-1, Sq, -1), sin[at].expand(-1, Sq, -1), **turn)
        _, k = ops.rope(q, k, cos[there], sin[there], **turn)
        cos = sin = None
    terms: dict[str, Any] = dict(k=k, v=v, cos=cos, sin=sin, block_table=block_table, causal=causal, **turn)
    terms |= dict(scale=softmax_scale, window=tuple(window_size), softcap=softcap, alibi_slopes=alibi_slopes)
    terms |= dict(cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad, return_lse=return_softmax_lse)
    return ops.attention_kvcache(q, k_cache, v_cache, cache_seqlens, **terms)


def _terms(
    dropout_p: float, scale: float | None, causal: bool, window: tuple[int, int], softcap: float, slopes: Tensor | None
) -> dict[str, Any]:
    """As ops.attention takes them."""
    terms: dict[str, Any] = dict(causal=causal, scale=scale, window=tuple(window), softcap=softcap)
    if slopes is not None:
        terms["alibi_slopes"] = slopes
    if dropout_p:
        terms |= {"dropout_p": dropout_p, "seed": int(torch.randint(2**62, ()))}
    return terms


def _paged_slots(block_table: Tensor, page: int, cu_seqlens: Tensor) -> Tensor:
    """Where each token of all sequences lies among the slots of all pages, (T) int64."""
    lengths = cu_seqlens.diff().tolist()
    slots = [torch.arange(n, device=block_table.device) for n in lengths]
    return torch.cat([block_table[i].long()[t // page] * page + t % page for i, t in enumerate(slots)])


def _signed_probabilities(q: Tensor, k: Tensor, lse: Tensor, terms: dict[str, Any]) -> Tensor:
    """exp(scores - lse) (B, H, Sq, Sk), negative where dropout took them."""
    (B, Sq, H, D), Sk = q.shape, k.shape[1]
    scale, softcap, slopes = terms["scale"], terms["softcap"], terms.get("alibi_slopes")
    keys = k.float().repeat_interleave(H // k.shape[2], 2)
    s = torch.einsum("bqhd,bkhd->bhqk", q.float(), keys) * (D**-0.5 if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if slopes is not None:
        distance = torch.arange(Sk, device=q.device) - torch.arange(Sq, device=q.device)[:, None] - (Sk - Sq)
        s = s - slopes.float().view(-1, H, 1, 1) * distance.abs()
    s = s.masked_fill(~visible(Sq, Sk, terms["causal"], terms["window"], q.device), -torch.inf)
    p = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return torch.where(dropout_keep((B, H, Sq, Sk), terms["dropout_p"], terms["seed"], 0, q.device), p, -p).to(q.dtype)
