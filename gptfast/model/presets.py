"""Architectures by name.

GPT-2's are those of Radford et al. (2019) as released; GPT-3's those of Brown et al. (arXiv:2005.14165), table 2.1,
with all layers dense (the paper alternates dense and banded ones). Two of its rows don't multiply out: 24 heads of 128
in a width of 2048 (XL) and 40 heads of 128 in a width of 5140 (13B); here they are 16 heads, and a width of 5120.
"""

from __future__ import annotations

from typing import Any

from gptfast.model.config import GPTConfig


def _gpt2(n_layer: int, n_embd: int, n_head: int, context: int = 1024, vocab_size: int = 50257) -> GPTConfig:
    ends: dict[str, Any] = dict(bos_id=50256, eos_ids=(50256,)) if vocab_size == 50257 else {}
    return GPTConfig("gpt2", vocab_size, n_layer, n_head, n_embd, context, **ends)


def _llama(
    vocab_size: int, n_layer: int, n_embd: int, n_head: int, n_kv_head: int, ffn_dim: int, context: int, **changes
) -> GPTConfig:
    defaults: dict[str, Any] = dict(
        n_kv_head=n_kv_head,
        ffn_dim=ffn_dim,
        norm="rms_norm",
        positions="rope",
        activation="swiglu",
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        tie_embeddings=False,
    )
    return GPTConfig("llama", vocab_size, n_layer, n_head, n_embd, context, **(defaults | changes))


_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

PRESETS = {
    "tiny": _gpt2(4, 128, 4, context=256, vocab_size=256),
    "gpt2-124m": _gpt2(12, 768, 12),
    "gpt2-355m": _gpt2(24, 1024, 16),
    "gpt2-774m": _gpt2(36, 1280, 20),
    "gpt2-1.5b": _gpt2(48, 1600, 25),
    "gpt3-125m": _gpt2(12, 768, 12, 2048),
    "gpt3-350m": _gpt2(24, 1024, 16, 2048),
    "gpt3-760m": _gpt2(24, 1536, 16, 2048),
    "gpt3-1.3b": _gpt2(24, 2048, 16, 2048),
    "gpt3-2.7b": _gpt2(32, 2560, 32, 2048),
    "gpt3-6.7b": _gpt2(32, 4096, 32, 2048),
    "gpt3-13b": _gpt2(40, 5120, 40, 2048),
    "gpt3-175b": _gpt2(96, 12288, 96, 2048),
    "smollm2-135m": _llama(
        49152, 30, 576, 9, 3, 1536, 8192, rope_theta=1e5, tie_embeddings=True, bos_id=1, eos_ids=(2,)
    ),
    "llama-7b": _llama(32000, 32, 4096, 32, 32, 11008, 2048, norm_eps=1e-6, bos_id=1, eos_ids=(2,)),
    "llama2-7b": _llama(32000, 32, 4096, 32, 32, 11008, 4096, bos_id=1, eos_ids=(2,)),
    "llama3.1-8b": _llama(
        128256, 32, 4096, 32, 8, 14336, 131072, rope_theta=5e5, rope_scaling=_LLAMA3, bos_id=128000, eos_ids=(128001,)
    ),
    "mistral-7b": _llama(32000, 32, 4096, 32, 8, 14336, 32768, window=4096, bos_id=1, eos_ids=(2,)),
}


def preset(name: str) -> GPTConfig:
    """The configuration of this name. Raises ValueError that lists the names."""
    if name not in PRESETS:
        raise ValueError(f"expected a preset among {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
