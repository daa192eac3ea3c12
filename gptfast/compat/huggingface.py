"""attn_implementation="gptfast" for Hugging Face transformers: an attention function and the masks that it takes.

After register(), `AutoModelForCausalLM.from_pretrained(..., attn_implementation="gptfast")` and
`model.set_attn_implementation("gptfast")` work like "sdpa" and "flash_attention_2".

What the mask function gives, and the attention function takes for `attention_mask`:
    None        causality and window by flags, aligned bottom-right: the last query sees the last key
    (B, n) bool the same on the first n keys alone, of which False ones are padding; n may be less than there are (a
                static cache has room for more)
    4-D         all that is to be known: bool (True = attend) or added to the scores; no flags
Flags cost no memory, and blocks that nobody attends to are skipped; so 4-D masks are made only for what flags can't
say: packed sequences without cu_seq_lens, chunks, custom mask functions, and under a compiler whatever would depend on
the contents of a tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptfast import ops
from gptfast.ops.attention import visible

NAME = "gptfast"

# Models whose attention hands its window on to the attention function; others get windows as masks.
WINDOWED = frozenset(
    {"mistral", "mixtral", "ministral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi3"}
    | {"starcoder2", "gpt_oss", "cohere2", "smollm3", "olmo3"}
)


def register() -> None:
    """Makes attn_implementation="gptfast" known to transformers, which must be installed; again is harmless.

    Raises ImportError where transformers is missing or older than 5.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            'gptfast.compat.huggingface needs transformers 5 or later: pip install "transformers>=5"'
        ) from error
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query (B, H, Sq, D), key and value (B, Hk, Sk, D) -> (B, Sq, H, D) and None,
    or the probabilities (B, H, Sq, Sk) where output_attentions asks for them.

    attention_mask as the top of this page says; s_aux (H): attention sinks; cu_seq_lens (N + 1) int32: N sequences lie
    end to end in the batch, and the mask is not looked at. Raises ValueError for a paged cache.
    """
    if kwargs.get("cache") is not None:
        raise ValueError('attn_implementation="gptfast" expected no paged cache, got one: there "sdpa" serves')
    query, key, value = _alike(query, key, value)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    width, wide = value.shape[-1], max(query.shape[-1], value.shape[-1])
    if width != query.shape[-1]:  # zeros change neither the scores nor the columns that are kept
        query, key, value = (F.pad(t, (0, wide - t.shape[-1])) for t in (query, key, value))
    causal = is_causal
    if causal is None:
        causal = getattr(module, "is_causal", True) and getattr(getattr(module, "config", None), "is_causal", True)
    terms: dict[str, Any] = {"scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux}
    if dropout:  # PyTorch's generator decides, so that manual_seed holds and activation checkpointing draws the same
        terms |= {"dropout_p": dropout, "seed": int(torch.randint(2**62, ()))}
    flags: dict[str, Any] = {"causal": bool(causal)}
    if sliding_window:
        flags["window"] = (sliding_window - 1, -1 if causal else sliding_window - 1)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    backend = module.__dict__.get("_gptfast_backend")
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        edges = {"cu_seqlens_q": cu_seq_lens_q.to(torch.int32), "cu_seqlens_k": cu_seq_lens_k.to(torch.int32)}
        rows = (t.flatten(0, 1) for t in (q, k, v))
        return ops.attention(*rows, **terms, **flags, **edges, backend=backend).view(q.shape)[..., :width], None
    if attention_mask is None:
        terms |= flags
    elif attention_mask.dim() == 2:
        n = attention_mask.shape[1]
        k, v = k[:, :n], v[:, :n]
        terms |= flags
        if attention_mask.stride(1):  # an expanded one says how many keys there are, no more
            terms["mask"] = attention_mask[:, None, None]
    elif attention_mask.dtype == torch.bool:
        terms["mask"] = attention_mask
    else:
        terms["bias"] = attention_mask if attention_mask.dtype == torch.float32 else attention_mask.to(q.dtype)
    if position_bias is not None:
        terms["bias"] = position_bias + terms["bias"] if "bias" in terms else position_bias
    out = ops.attention(q, k, v, backend=backend, **terms)
    weights = _probabilities(q, k, **terms) if _weights_wanted(kwargs) else None
    return out if width == wide else out[..., :width], weights


def _alike(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One dtype: autocast's where it is on, else the query's."""
    dtype, kind = query.dtype, query.device.type
    if (
        torch.amp.is_autocast_available(kind)
        and torch.is_autocast_enabled(kind)
        and dtype in (torch.float32, torch.bfloat16, torch.float16)
    ):
        dtype = torch.get_autocast_dtype(kind)
    if query.dtype == key.dtype == value.dtype == dtype:
        return query, key, value
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _weights_wanted(kwargs: dict[str, Any]) -> bool:
    """Whether the caller records probabilities: by keyword, or through transformers' own collector of outputs."""
    if kwargs.get("output_attentions"):
        return True
    collector = _collector()
    if collector is None or torch.compiler.is_compiling():
        return False
    collected = collector.get()
    return bool(collected) and any("attentions" in name for name in collected)


@cache
def _collector() -> Any:
    """The context variable of transformers that names what a forward collects, where this version has it."""
    return getattr(sys.modules.get("transformers.utils.output_capturing"), "_active_collector", None)


def _probabilities(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """The probabilities (B, H, Sq, Sk) that no fused kernel keeps, before dropout, in q's dtype."""
    H, Sq, Sk = q.shape[2], q.shape[1], k.shape[1]
    keys = k.float().repeat_interleave(H // k.shape[2], 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), keys) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.float()
    seen = visible(Sq, Sk, causal, window, q.device)
    scores = scores.masked_fill(~(seen if mask is None else seen & mask), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, H, 1, 1).expand(q.shape[0], H, Sq, 1)], -1)
    return torch.softmax(scores, -1)[..., :Sk].nan_to_num().to(q.dtype)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask interface: what attention() takes as attention_mask, in a form of the top of this page.

    Queries stand at positions q_offset .. + q_length, keys at kv_offset .. + kv_length; attention_mask (B, positions)
    bool is False for padding; mask_function(b, h, q, k) and local_size as transformers' masking_utils gives them.
    """
    from transformers import masking_utils

    start: Any = q_offset  # transformers says int, and gives tensors too
    pattern = mask_function or masking_utils.causal_mask_function
    both_ways = pattern is masking_utils.bidirectional_mask_function and local_size is None
    in_order = pattern is masking_utils.causal_mask_function or _is_window(pattern, local_size, config)
    compiling = torch.compiler.is_compiling()
    by_flags = (both_ways and allow_is_bidirectional_skip) or (in_order and allow_is_causal_skip)
    n = kv_length if both_ways or not by_flags or compiling else int(q_offset) + q_length - kv_offset
    if compiling:
        # neither what a mask holds nor a cache's length may be read
        aligned = both_ways or (isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length)
        by_flags = by_flags and attention_mask is None and aligned
    if not by_flags or not 0 < n <= kv_length:
        return masking_utils.sdpa_mask(
            *(batch_size, q_length, kv_length, start, kv_offset, pattern, attention_mask),
            **dict(kwargs, local_size=local_size, allow_is_causal_skip=False, allow_is_bidirectional_skip=False),
            device=device,
        )
    if attention_mask is not None:
        kept = attention_mask[:, kv_offset : kv_offset + n]
        if kept.shape[1] < n:
            kept = F.pad(kept, (0, n - kept.shape[1]))
        if not kept.all():
            return kept.contiguous()  # of stride 1 even where one position is left
    return None if n == kv_length else torch.ones(1, 1, dtype=torch.bool, device=device).expand(batch_size, n)


def _is_window(pattern: Callable[..., Any], local_size: int | None, config: Any) -> bool:
    """Whether a mask function is the causal window of local_size that this model's attention passes on as a flag."""
    if local_size is None or getattr(config, "model_type", None) not in WINDOWED:
        return False
    if getattr(config, "sliding_window", None) != local_size:
        return False
    cells = [cell.cell_contents for cell in getattr(pattern, "__closure__", None) or ()]
    parts = cells[0] if len(cells) == 1 and isinstance(cells[0], tuple) else ()
    names = [getattr(part, "__qualname__", "").split(".")[0] for part in parts]
    return names == ["sliding_window_overlay", "causal_mask_function"]
