from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gptfast.kernels.cpu import DTYPES, prepare, unsupported

CHUNK = 128  # keys
EXACT = 48  # queries of a sequence, for which the kernel makes up for lse's rounding
CACHE_DTYPES = {**DTYPES, torch.int8: 3}


def supports_attention(q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor | None = None, **terms: Any) -> str | None:
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        return "alibi_slopes require a gradient, and this kernel makes none for them"
    return _unsupported(q, k, v, terms, backward=True)


def supports_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, dlse: Tensor | None, **terms: Any
) -> str | None:
    for name, t in (("lse", lse), ("dlse", dlse)):
        if t is not None and t.dtype != torch.float32:
            return f"{name} must be float32, not {str(t.dtype).removeprefix('torch.')}"
    return unsupported(dout, out, backward=True) or _unsupported(q, k, v, terms, backward=True)


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
    return _unsupported(q, *held, terms)


def _unsupported(q: Tensor, k: Tensor, v: Tensor, terms: dict[str, Any], backward: bool = False) -> str | None:
    if q.shape[-1] > 256:
        return f"it takes heads of up to 256 dimensions, not {q.shape[-1]}"
    others = (terms.get(n) for n in ("k", "v", "cos", "sin", "bias", "sinks"))
    return unsupported(q, k, v, *others, backward=backward)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    **terms: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return prepare_attention(q, k, v, **terms)(q=q, k=k, v=v, **terms)
    edges = {"cu_q": cu_seqlens_q, "cu_k": cu_seqlens_k}
    return _attention(q, k, v, len(cu_seqlens_q) - 1, _longest(cu_seqlens_q), edges, **terms)(
        q=q, k=k, v=v, **edges, **terms
    )


def prepare_attention(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: None = None, cu_seqlens_k: None = None, **terms: Any
) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    return _attention(q, k, v, q.shape[0], q.shape[1], {}, **terms)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    B: int,
    longest: int,
    edges: dict[str, Tensor],
    *,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    return_lse: bool,
    **terms: Any,
) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    """The kernel, prepared, for B sequences of at most `longest` queries."""
    sizes, dtype = tuple(q.shape), q.dtype
    inputs, extra = _terms(q, k, mask, bias, alibi_slopes, sinks)
    inputs |= {"q": ("q", _rows), "k": ("k", _rows), "v": ("v", _rows)}
    inputs |= {name: (name, _contiguous) for name in edges}
    threads, room, numbers = _numbers(_rows(q), _rows(k), _rows(v), B, longest, k.shape[-3], **terms)
    outputs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"out": (sizes, dtype)}
    if return_lse:
        outputs["lse"] = (sizes[1], sizes[0]) if q.dim() == 3 else (B, sizes[2], longest), torch.float32
    return prepare(
        *("attention", threads, outputs, inputs),
        dict(q=q, k=k, v=v, mask=mask, bias=bias, alibi_slopes=alibi_slopes, sinks=sinks, **edges),
        results=len(outputs),
        workspace=4 * room,
        **numbers | extra | _dropout(**terms),
    )


def attention_backward(
    *, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, **arguments: Any
) -> tuple[Tensor, ...]:
    """The gradients: gptfast/ops/attention_gradients.py."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return prepare_attention_backward(**arguments)(**arguments)
    longest, longest_k = _longest(cu_seqlens_q), _longest(cu_seqlens_k)
    pairs = int((cu_seqlens_q.diff() * cu_seqlens_k.diff()).sum())
    edges = {"cu_q": cu_seqlens_q, "cu_k": cu_seqlens_k}
    return _backward(len(cu_seqlens_q) - 1, longest, longest_k, pairs, edges, **arguments)(**arguments, **edges)


def prepare_attention_backward(
    *, q: Tensor, k: Tensor, cu_seqlens_q: None = None, cu_seqlens_k: None = None, **arguments: Any
) -> Callable[..., tuple[Tensor, ...]]:
    B, Sq, Sk = q.shape[0], q.shape[1], k.shape[1]
    return _backward(B, Sq, Sk, B * Sq * Sk, {}, q=q, k=k, **arguments)


def _backward(
    B: int,
    longest: int,
    longest_k: int,
    pairs: int,
    edges: dict[str, Tensor],
    *,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    causal: bool,
    scale: float | None,
    window: tuple[int, int],
    softcap: float,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    wants_bias: bool,
    wants_sinks: bool,
    **dropout: Any,
) -> Callable[..., tuple[Tensor, ...]]:
    """The kernel, prepared, for B sequences of at most `longest` queries and `longest_k` keys, so many pairs in all."""
    Sq, H, D = q.shape[-3:]
    Sk, Hk = k.shape[-3:-1]
    threads = 1 if H * pairs * D < 1 << 15 else torch.get_num_threads()
    room = 3 * H // Hk * _up(longest, 48) * (_up(D) + 16)  # dQ, q and dout of the heads of a KV head
    # By heads the longest task may be all that there is to wait for; by blocks there are 7 products instead of 5.
    rounds = max(-(-B * Hk // threads), 1) * longest * longest_k * B / max(pairs, 1)
    split = threads > 1 and 5 * rounds * threads > 7 * B * Hk
    nothing = (0,), dout.dtype
    wants_bias, wants_sinks = wants_bias and bias is not None, wants_sinks and sinks is not None
    outputs: dict[str, tuple[Any, torch.dtype]] = {
        **{f"d{name}": (tuple(t.shape), t.dtype) for name, t in (("q", q), ("k", k), ("v", v))},
        "dbias": (bias.shape, bias.dtype) if wants_bias and bias is not None else nothing,
        "dsinks": (sinks.shape, torch.float32) if wants_sinks and sinks is not None else nothing,
        "delta": (lse.shape, torch.float32),
    }
    if wants_sinks or wants_bias or longest <= EXACT or edges:
        outputs["norm"] = lse.shape, torch.float32
    given: dict[str, Any] = dict(q=q, k=k, v=v, dout=dout, out=out)
    strides = {f"{name}_strides": _strides(_rows(t)) for name, t in given.items()}
    inputs, numbers = _terms(q, k, mask, bias, alibi_slopes, sinks)
    inputs |= {name: (name, _rows) for name in given}
    inputs |= {name: (name, _contiguous) for name in ("lse", *(["dlse"] if dlse is not None else []), *edges)}
    shape = (0, 0, 0, 0)
    if wants_bias and bias is not None:
        shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    launch = prepare(
        *("attention_backward", threads, outputs, inputs),
        given | dict(mask=mask, bias=bias, alibi_slopes=alibi_slopes, sinks=sinks, lse=lse, dlse=dlse, **edges),
        results=5,
        workspace=0 if split else 4 * threads * room,
        **strides,
        **dict(B=B, Sq=Sq, Sk=Sk, H=H, Hk=Hk, D=D, q_longest=longest, k_longest=longest_k, room=room),
        **{"bias_dtype": 0, "slopes_batch": 0, "bias_shape": shape} | numbers,
        **_dropout(**dropout),
        scale=1 / math.sqrt(D) if scale is None else scale,
        softcap=softcap,
        dtype=DTYPES[q.dtype],
        causal=causal,
        left=window[0],
        right=window[1],
        split=split,
    )
    if not wants_sinks or sinks is None or sinks.dtype == torch.float32:
        return launch
    dtype = sinks.dtype

    def rounded(**arguments: Any) -> tuple[Tensor, ...]:
        *others, dsinks = launch(**arguments)
        return *others, dsinks.to(dtype)

    return rounded


def _terms(
    q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None
) -> tuple[dict[str, tuple[str, Callable[[Tensor], Tensor] | None]], dict[str, Any]]:
    """What is added to scores or hides them, as fields: inputs as prepare() takes them, and numbers."""
    inputs: dict[str, tuple[str, Callable[[Tensor], Tensor] | None]] = {}
    numbers: dict[str, Any] = {}
    H = q.shape[-2]
    for name, t in (("mask", mask), ("bias", bias)):
        if t is not None:
            inputs[name] = name, None
            numbers[f"{name}_strides"] = t.expand(q.shape[0], H, q.shape[1], k.shape[1]).stride()
    if bias is not None:
        numbers["bias_dtype"] = DTYPES[bias.dtype]
    if alibi_slopes is not None:
        inputs["slopes"] = "alibi_slopes", _floats
        numbers["slopes_batch"] = H if alibi_slopes.dim() == 2 else 0
    if sinks is not None:
        inputs["sinks"] = "sinks", _floats
    return inputs, numbers


def _dropout(dropout_p: float = 0.0, seed: int = 0, stream: int = 0, **_: Any) -> dict[str, Any]:
    return {
        **{"seed": int(seed) & 0xFFFFFFFFFFFFFFFF, "stream": stream & 0xFFFFFFFF},
        **{"keep_scale": 1 / (1 - dropout_p), "drop_below": int(dropout_p * 2**32)},
    }


def _longest(edges: Tensor) -> int:
    return max((b - a for a, b in pairwise(edges.tolist())), default=0)


def attention_kvcache(**arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
    return prepare_attention_kvcache(**arguments)(**arguments)


def prepare_attention_kvcache(
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
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    return_lse: bool,
    activations: str,
    **terms: Any,
) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    """The op for arguments of these shapes, strides and dtypes. What it allocates is for all that the cache has room
    for: the kernel alone reads the lengths, and a recorded launch may be run again with longer ones."""
    B, Sq, H, _ = sizes = tuple(q.shape)
    room, extra = k_cache.shape[1], {}
    inputs: dict[str, tuple[str, Callable[[Tensor], Tensor] | None]] = {  # field: argument, how it is made to fit
        **{"q": ("q", _rows), "k": ("k_cache", None), "v": ("v_cache", None), "lengths": ("lengths", _contiguous)}
    }
    if k is not None and v is not None:
        inputs |= {"k_cache": ("k_cache", None), "v_cache": ("v_cache", None), "k_new": ("k", _rows)}
        inputs["v_new"] = "v", _rows
        extra |= {"k_new_strides": _strides(_rows(k)), "v_new_strides": _strides(_rows(v))}
    if k_scale is not None and v_scale is not None:
        inputs |= {"k_scale": ("k_scale", None), "v_scale": ("v_scale", None)}
        extra |= {"k_scale_strides": k_scale.stride(), "v_scale_strides": v_scale.stride()}
    if cos is not None:
        inputs |= {"cos": ("cos", _floats), "sin": ("sin", _floats)}
        extra |= {"rotary": 2 * cos.shape[1], "interleaved": interleaved}
    if block_table is not None:
        inputs["block_table"] = "block_table", _contiguous
        extra |= {"page": room, "table_stride": block_table.shape[1]}
        room *= block_table.shape[1]
    if cache_batch_idx is not None:
        inputs["batch_index"] = "cache_batch_idx", _contiguous
    if cache_leftpad is not None:
        inputs["leftpad"] = "cache_leftpad", _contiguous
    if alibi_slopes is not None:
        inputs["slopes"] = "alibi_slopes", _floats
        extra["slopes_batch"] = H if alibi_slopes.dim() == 2 else 0
    if sinks is not None:
        inputs["sinks"] = "sinks", _floats
    threads, floats, numbers = _numbers(_rows(q), k_cache, v_cache, B, Sq, room, **terms)
    outputs = {"out": (sizes, q.dtype)} | ({"lse": ((B, H, Sq), torch.float32)} if return_lse else {})
    given: dict[str, Any] = dict(q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v, lengths=lengths, cos=cos, sin=sin)
    given |= dict(k_scale=k_scale, v_scale=v_scale)
    given |= dict(block_table=block_table, alibi_slopes=alibi_slopes, sinks=sinks)
    given |= dict(cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad)
    return prepare(
        *("attention", threads, outputs, inputs, given),
        results=len(outputs),
        workspace=4 * floats,
        **numbers | extra | _dropout() | {"rounded": activations == "rounded"},
    )


def _numbers(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    B: int,
    longest: int,
    Sk: int,
    *,
    causal: bool,
    scale: float | None,
    window: tuple[int, int],
    softcap: float,
    **_: Any,
) -> tuple[int, int, dict[str, Any]]:
    """For B sequences of at most `longest` queries and at most Sk keys: the threads, the floats of workspace, and the
    fields that are no pointers."""
    Sq, H, D = q.shape[-3:]
    Hk, rows = k.shape[-2], H // k.shape[-2] * longest
    threads = 1 if B * H * longest * Sk * D < 1 << 17 else torch.get_num_threads()
    chunks = -(-Sk // CHUNK)
    if threads == 1 or chunks < 2 or B * Hk * -(-rows // 48) >= 16 * threads:
        chunks = 0  # enough to share out without splitting the keys
    wide = 4 if rows <= 4 else 8 if rows <= 8 else _up(rows)  # rows rounded up to the lanes of any instruction set
    partial = wide * _up(D) + 2 * _up(rows)
    numbers = {
        **{"B": B, "Sq": Sq, "Sk": Sk, "H": H, "Hk": Hk, "D": D, "q_longest": longest},
        **{"q_strides": _strides(q), "k_strides": _strides(k), "v_strides": _strides(v)},
        **{"chunks": chunks, "partial": partial, "scale": 1 / math.sqrt(D) if scale is None else scale},
        **{
            "softcap": softcap,
            "dtype": DTYPES[q.dtype],
            "cache_dtype": CACHE_DTYPES[k.dtype],
            "causal": causal,
            "left": window[0],
            "right": window[1],
        },
        **{"bias_dtype": 0, "slopes_batch": 0, "page": 0, "table_stride": 0, "rotary": 0, "interleaved": 0},
        "rounded": 0,
    }
    return threads, B * Hk * chunks * partial, numbers


def _up(n: int, to: int = 16) -> int:
    return -(-n // to) * to


def _contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


def _rows(t: Tensor) -> Tensor:
    """t with a contiguous last dimension, copied only where it hasn't one."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _floats(t: Tensor) -> Tensor:
    return t.contiguous().float()


def _strides(x: Tensor) -> tuple[int, ...]:
    """Batch, position and head stride of (B, S, H, D) or (T, H, D)."""
    strides = x.stride()
    return strides[:3] if len(strides) == 4 else (0, *strides[:2])
