"""The cases of the attention page, and what one writes with PyTorch instead."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.ops.spec import Case, Inputs

Result = Any  # Tensor, or (Tensor, Tensor) with return_lse
CACHES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of caches with a dtype of their own


def cases() -> list[Case]:
    def case(B: int, Sq: int, Sk: int, H: int, Hk: int, D: int, *terms: str, tags: str = "", **fixed: Any) -> Case:
        def make(i: Inputs) -> dict[str, Any]:
            q, k, v = i.randn(B, Sq, H, D), i.randn(B, Sk, Hk, D), i.randn(B, Sk, Hk, D)
            makers: dict[str, Any] = {
                "alibi_slopes": lambda: i.rand(H, dtype=torch.float32),
                "sinks": lambda: i.randn(H, dtype=torch.float32),
                "mask": lambda: i.rand(B, 1, Sq, Sk) > 0.4,
                "bias": lambda: i.randn(1, H, Sq, Sk, dtype=torch.float32),
                "key_bias": lambda: i.randn(B, 1, 1, Sk),
                "query_bias": lambda: i.randn(H, Sq, 1),
            }
            names = {"key_bias": "bias", "query_bias": "bias"}
            return {"q": q, "k": k, "v": v, **{names.get(t, t): makers[t]() for t in terms}, **fixed}

        name = f"{B}x{Sq}x{Sk}-h{H}.{Hk}-d{D}" + "".join(f"-{t}" for t in terms)
        name += "".join(f"-{k}" + ("" if v is True else str(v).replace(" ", "")) for k, v in fixed.items())
        return Case(name, make, frozenset(tags.split()))

    def varlen(lengths_q: list[int], lengths_k: list[int], H: int, Hk: int, D: int, **fixed: Any) -> Case:
        def edges(lengths: list[int]) -> Tensor:
            return torch.tensor([sum(lengths[:n]) for n in range(len(lengths) + 1)], dtype=torch.int32)

        def make(i: Inputs) -> dict[str, Any]:
            Tq, Tk = sum(lengths_q), sum(lengths_k)
            return {
                **{"q": i.randn(Tq, H, D), "k": i.randn(Tk, Hk, D), "v": i.randn(Tk, Hk, D)},
                **{"cu_seqlens_q": edges(lengths_q), "cu_seqlens_k": edges(lengths_k), **fixed},
            }

        return Case(f"varlen{len(lengths_q)}-h{H}.{Hk}-d{D}" + "".join(f"-{k}" for k in fixed), make)

    sizes = [case(2, 9, 21, 2, 2, D, causal=True) for D in (1, 8, 40, 80, 96, 100, 128, 192, 256)]
    return [
        *sizes,
        case(2, 65, 65, 4, 2, 64, causal=True, return_lse=True),
        case(1, 300, 300, 6, 2, 64, causal=True),
        case(2, 1, 515, 9, 3, 64, causal=True, return_lse=True),
        case(1, 50, 261, 3, 1, 40, return_lse=True),
        case(1, 130, 37, 2, 1, 16, causal=True, return_lse=True),  # the first 93 rows are empty
        case(2, 70, 200, 4, 2, 32, causal=True, window=(33, -1)),
        case(1, 140, 140, 2, 2, 32, window=(20, 7), return_lse=True),
        case(1, 100, 130, 2, 1, 32, causal=True, softcap=5.0),
        case(1, 100, 130, 4, 2, 32, "alibi_slopes", causal=True),
        case(2, 33, 150, 4, 1, 32, "sinks", causal=True, return_lse=True),
        case(2, 60, 150, 4, 2, 32, "mask", return_lse=True),
        case(1, 60, 150, 4, 2, 32, "bias", scale=0.3),
        case(2, 1, 150, 4, 2, 64, "key_bias", "mask"),
        case(
            2, 40, 170, 4, 2, 24, *("alibi_slopes", "sinks", "mask", "bias"), causal=True, window=(90, 3), softcap=8.0
        ),
        case(2, 7, 0, 2, 1, 16, return_lse=True),
        case(2, 0, 7, 2, 1, 16),
        case(0, 3, 7, 2, 1, 16),
        varlen([3, 0, 130, 60], [5, 4, 130, 200], 4, 2, 32, causal=True, return_lse=True),
        case(1, 24, 40, 2, 1, 16, causal=True, dropout_p=0.3, seed=11, stream=2),
        case(2, 3, 150, 2, 1, 24, "sinks", dropout_p=0.2, seed=2**40 + 7, return_lse=True),
        case(2, 150, 140, 3, 1, 72, "query_bias", window=(60, 20), dropout_p=0.1, seed=-3, stream=1),
        varlen([3, 0, 130, 60], [5, 4, 130, 200], 4, 2, 32, window=(80, -1), dropout_p=0.25, seed=3),
        case(1, 512, 512, 12, 12, 64, causal=True, tags="bench big"),
        case(1, 1024, 1024, 12, 12, 64, causal=True, tags="bench"),
        case(1, 2048, 2048, 12, 12, 64, causal=True, tags="bench big"),
        case(1, 2048, 2048, 9, 3, 64, causal=True, tags="bench big"),
    ]


def baseline(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, **terms: Any) -> Result:
    """F.scaled_dot_product_attention where it can express the call, else the reference in q's dtype."""
    from gptfast.ops.attention import reference

    plain = terms.get("cu_seqlens_q") is None and not any(terms.get(n) for n in ("softcap", "dropout_p"))
    if not plain or terms.get("sinks") is not None or 0 in q.shape:
        return reference(q, k, v, return_lse=return_lse, **terms)
    out = sdpa(q, k, v, **terms)
    if not return_lse:
        return out
    _, lse = reference(q, k, v, return_lse=True, **terms)
    return out, lse


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    from gptfast.ops.attention import visible

    (Sq, H), (Sk, Hk) = q.shape[1:3], k.shape[1:3]
    causal = causal and Sq > 1  # the last query sees every key
    bounded = tuple(window) != (-1, -1) or (causal and Sq != Sk)
    if bounded or ((mask is not None or bias is not None or alibi_slopes is not None) and causal):
        seen = visible(Sq, Sk, causal, window, q.device)
        mask, causal = (seen if mask is None else mask & seen), False
    if alibi_slopes is not None:
        i, j = torch.arange(Sq, device=q.device), torch.arange(Sk, device=q.device)
        distance = (j - i[:, None] - (Sk - Sq)).abs()
        slope = -alibi_slopes.view(-1, H, 1, 1) * distance
        bias = slope if bias is None else bias + slope
    if bias is not None:
        bias = bias if mask is None else bias.masked_fill(~mask, -math.inf)
    attn_mask = mask if bias is None else bias.to(q.dtype)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=causal, scale=scale, enable_gqa=Hk != H)
    return out.transpose(1, 2).nan_to_num(nan=0.0) if mask is not None else out.transpose(1, 2)


def take(arguments: Mapping[str, Any], b: int) -> dict[str, Any]:
    def row(name: str, value: Any) -> Any:
        if name in ("q", "k", "v") or (isinstance(value, Tensor) and value.dim() == 4 and value.shape[0] > 1):
            return value[b : b + 1]
        return value

    return {name: row(name, value) for name, value in arguments.items()}


def batch(arguments: Mapping[str, Any]) -> int:
    """Sequences end to end are no batch: tests/ops/test_attention.py takes them apart."""
    return 0 if arguments.get("cu_seqlens_q") is not None else arguments["q"].shape[0]


def cases_kvcache() -> list[Case]:
    def case(
        lengths: list[int], Sq: int, H: int, Hk: int, D: int, room: int, *terms: str, tags: str = "", **fixed: Any
    ) -> Case:
        def make(i: Inputs) -> dict[str, Any]:
            B = len(lengths)
            cache = (B, room, Hk, D)
            result: dict[str, Any] = {"q": i.randn(B, Sq, H, D), "k_cache": i.randn(*cache), "v_cache": i.randn(*cache)}
            result["lengths"] = torch.tensor(lengths, dtype=torch.int32)
            if "append" in terms:
                result |= {"k": i.randn(B, Sq, Hk, D), "v": i.randn(B, Sq, Hk, D)}
            if "rope" in terms or "partial_rope" in terms:
                half = D // 2 if "rope" in terms else D // 4
                angle = torch.arange(room)[:, None] * 10000.0 ** (-torch.arange(half) / half)
                result |= {"cos": angle.cos(), "sin": angle.sin()}
            if "pages" in terms:
                page = 16
                n = -(-room // page)
                order = torch.randperm(B * n, generator=i.generator).view(B, n).to(torch.int32)
                used = torch.arange(n) * page < torch.tensor(lengths)[:, None] + Sq
                result |= {"block_table": torch.where(used, order, -1)}
                result |= {"k_cache": i.randn(B * n, page, Hk, D), "v_cache": i.randn(B * n, page, Hk, D)}
            if "rows" in terms:
                result |= {"k_cache": i.randn(B + 2, room, Hk, D), "v_cache": i.randn(B + 2, room, Hk, D)}
                result["cache_batch_idx"] = torch.arange(B, 0, -1, dtype=torch.int32)
            if "leftpad" in terms:
                result["cache_leftpad"] = torch.tensor([n // 3 for n in lengths], dtype=torch.int32)
            if "sinks" in terms:
                result["sinks"] = i.randn(H, dtype=torch.float32)
            if "alibi_slopes" in terms:
                result["alibi_slopes"] = i.rand(B, H, dtype=torch.float32)
            if "int8" in terms:  # under fp32 queries, whatever the dtype asked for
                result |= {n: t.float() for n, t in result.items() if t.is_floating_point()}
                for name in ("k", "v"):
                    held = result[f"{name}_cache"]
                    result[f"{name}_cache"] = i.randint(-127, 128, tuple(held.shape), torch.int8)
                    result[f"{name}_scale"] = i.rand(*held.shape[:3], dtype=torch.float32) / 64
            for kind in CACHES.keys() & set(terms):
                result |= {name: result[name].to(CACHES[kind]) for name in ("k_cache", "v_cache")}
            return result | fixed

        name = f"{'.'.join(map(str, lengths))}-q{Sq}-h{H}.{Hk}-d{D}-room{room}" + "".join(f"-{t}" for t in terms)
        return Case(name + "".join(f"-{k}" for k in fixed), make, frozenset(tags.split()))

    return [
        case([5, 0, 130], 1, 6, 2, 64, 200, "append"),
        case([5, 1, 130, 300], 1, 3, 3, 40, 300, return_lse=True),
        case([0, 7, 129], 9, 4, 1, 32, 140, *("append", "rope"), return_lse=True),
        case([3, 250], 2, 4, 2, 24, 256, *("append", "partial_rope"), interleaved=True),
        case([20, 260], 4, 4, 2, 32, 288, *("append", "rope", "pages")),
        case([20, 140], 1, 4, 2, 32, 160, *("rows", "append")),
        case(
            [21, 200], 3, 4, 2, 32, 256, *("leftpad", "append", "sinks", "alibi_slopes"), window=(150, 0), softcap=9.0
        ),
        case([0, 40], 5, 2, 1, 16, 64, return_lse=True),  # the first sequence is empty
        case([40, 180], 6, 2, 2, 16, 200, causal=False, window=(70, 2)),
        case([5, 130], 1, 6, 2, 64, 140, *("append", "rope", "bf16")),
        case([0, 129], 9, 4, 1, 40, 140, *("append", "rope", "fp16"), return_lse=True),
        case([20, 260], 40, 4, 2, 32, 304, *("append", "pages", "bf16")),
        case([5, 130, 300], 1, 3, 3, 20, 300, "fp16"),
        case([5, 130], 1, 6, 2, 63, 140, *("append", "bf16"), activations="rounded"),
        case([0, 129], 9, 4, 1, 40, 140, *("append", "rope", "bf16"), activations="rounded", return_lse=True),
        case([20, 260], 40, 4, 2, 32, 304, *("append", "rope", "fp16"), activations="rounded"),
        case([64], 65, 3, 3, 72, 140, *("append", "bf16"), activations="rounded"),
        case([5, 0, 130], 1, 6, 2, 64, 140, *("append", "int8")),
        case([0, 129], 9, 4, 1, 40, 140, *("append", "rope", "int8"), return_lse=True),
        case([20, 260], 40, 4, 2, 32, 304, *("append", "pages", "int8")),
        case([20, 140], 2, 4, 2, 100, 160, *("rows", "append", "int8")),
        case([5, 130, 300], 1, 3, 3, 20, 300, "int8"),
        case([1023], 1, 9, 3, 64, 1024, "append", tags="bench"),
        case([1023], 1, 9, 3, 64, 1024, *("append", "bf16"), tags="bench"),
        case([1023], 1, 9, 3, 64, 1024, *("append", "int8"), tags="bench"),
        case([8191], 1, 32, 8, 128, 8192, "append", tags="bench big"),
    ]


def baseline_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    return_lse: bool = False,
    activations: str = "exact",
    **terms: Any,
) -> Result:
    """The new rows written by indexing, then F.scaled_dot_product_attention on the filled part of the cache, where all
    lengths are equal and nothing else is asked for; else the reference in q's dtype. Rounded: in the caches' dtype."""
    from gptfast.ops.attention import reference_kvcache

    if activations == "rounded":
        held = {name: None if t is None else t.to(k_cache.dtype) for name, t in (("k", k), ("v", v))}
        caches = k_cache, v_cache, lengths
        made = baseline_kvcache(q.to(k_cache.dtype), *caches, **held, return_lse=return_lse, **terms)
        return (made[0].to(q.dtype), made[1]) if return_lse else made.to(q.dtype)
    total, Sq = int(lengths[0]) + (0 if k is None else q.shape[1]), q.shape[1]
    if terms or return_lse or len(lengths) > 1:
        return reference_kvcache(q, k_cache, v_cache, lengths, k=k, v=v, return_lse=return_lse, **terms)
    if k is not None and v is not None:
        k_cache[:, total - Sq : total] = k
        v_cache[:, total - Sq : total] = v
    return sdpa(q, k_cache[:, :total].to(q.dtype), v_cache[:, :total].to(q.dtype), causal=True)


def take_kvcache(arguments: Mapping[str, Any], b: int) -> dict[str, Any]:
    whole = {"sinks", "cos", "sin"}
    return {n: t[b : b + 1] if isinstance(t, Tensor) and n not in whole else t for n, t in arguments.items()}


def batch_kvcache(arguments: Mapping[str, Any]) -> int:
    """Where rows share a cache, one can't be cut out: tests/ops/test_attention.py compares those."""
    shared = arguments.get("block_table") is not None or arguments.get("cache_batch_idx") is not None
    return 0 if shared else arguments["q"].shape[0]
