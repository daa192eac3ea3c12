"""Attention: Hugging Face models by attn_implementation="gptfast", others where they call
F.scaled_dot_product_attention."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gptfast.compat import huggingface, sdpa
from gptfast.patch.changes import Replacement

SETTING = "_attn_implementation_internal"


def huggingface_configs(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """The Hugging Face models within this one, each config once, with the outermost module that has it."""
    if (transformers := sys.modules.get("transformers")) is None:
        return
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel) and id(module.config) not in seen:
            seen.add(id(module.config))
            yield module, module.config


def unreachable(model: Any) -> str | None:
    """Why a Hugging Face model's attention can't be chosen by its config, or None."""
    if model.config.output_attentions:
        return "its config asks for attention weights, which no fused kernel keeps"
    if _is_gpt_neo(model) or model._can_set_attn_implementation():
        return None
    return f"{type(model).__name__} doesn't go through transformers' AttentionInterface"


def _is_gpt_neo(model: Any) -> bool:
    return model.config.model_type == "gpt_neo"


def uses_interface(module: nn.Module) -> bool:
    """Whether a module's forward asks transformers for its attention function."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def is_gpt_neo_attention(module: nn.Module) -> bool:
    """GPT-Neo's, which computes its scores in a method of its own and masks by a buffer."""
    return type(module).__name__ == "GPTNeoSelfAttention" and hasattr(module, "attention_type")


class GPTNeoAttend:
    """In the place of GPTNeoSelfAttention._attn: q, k, v (B, H, S, D), a mask in one of compat.huggingface's forms."""

    is_causal = True

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Any:
        module = self.module
        window = module.config.window_size if module.attention_type == "local" else None
        dropout = module.attn_dropout.p if module.training else 0.0
        if attention_mask is not None and attention_mask.dim() == 4 and window:
            Sk, Sq = key.shape[2], query.shape[2]
            seen = module.bias[:, :, Sk - Sq : Sk, :Sk].bool()
            if attention_mask.dtype == torch.bool:
                attention_mask = attention_mask & seen
            else:
                attention_mask = attention_mask.masked_fill(~seen, -torch.inf)
        out, weights = huggingface.attention(
            *(module, query, key, value, attention_mask), dropout, scaling=1.0, sliding_window=window
        )
        return out.transpose(1, 2), weights


class Routed(Replacement):
    """The forward of a module in which F.scaled_dot_product_attention runs on ops.attention."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with sdpa.routed(self.backend):
            return self.original(*args, **kwargs)


def calls_sdpa(module: nn.Module) -> bool:
    """Whether a module's forward names scaled_dot_product_attention, itself or in a function inside it."""
    forward = inspect.unwrap(type(module).forward)
    pending, name = [getattr(forward, "__code__", None)], "scaled_dot_product_attention"
    while pending:
        code = pending.pop()
        if code is None:
            continue
        if name in code.co_names:
            return True
        pending += [c for c in code.co_consts if inspect.iscode(c)]
    return False


def never_reaches_sdpa(module: nn.Module) -> bool:
    """Whether a module that names scaled_dot_product_attention doesn't call it on an ordinary input (B, T, C): it has
    another branch, and settings that choose it."""
    from gptfast.patch import probe

    widths = [m.in_features for m in module.modules() if isinstance(m, nn.Linear)]
    if not widths:
        return False
    try:
        twin = probe.rehearsal(module).eval()
        with torch.no_grad(), sdpa.routed(None) as route:
            type(module).forward(twin, torch.zeros(1, 2, widths[0]))
    except Exception:
        return False  # it takes something else, and nothing is known
    return route.calls == 0
