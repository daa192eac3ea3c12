"""GPT and GGUF: the meaning of a file's metadata, and which of its tensors are which of ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptfast.model.config import GPTConfig
from gptfast.model.names import Source

ARCHITECTURES = ("gpt2", "llama", "qwen2", "qwen3")  # Mistral's files say llama
SCALINGS = {"none": "default", "linear": "linear", "yarn": "yarn"}


def read_config(metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> GPTConfig:
    """A GGUF's metadata and tensor shapes as a GPTConfig. Raises ValueError for a model that GPT can't compute."""
    kind = metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ValueError(f"expected a GGUF architecture among {', '.join(ARCHITECTURES)}, got {kind!r}")

    def get(key: str, default: Any = None, *, number: type = int) -> Any:
        value = metadata.get(f"{kind}.{key}", default)
        if value is None:
            raise ValueError(f"expected {kind}.{key} in the GGUF's metadata, got none")
        if isinstance(value, bool) or not isinstance(value, int if number is int else (int, float)):
            raise ValueError(f"expected {kind}.{key} as one number, got {value!r:.60}")
        # A float32 of the file as the decimal that it stands for: 1e-5, not 9.99999975e-06.
        return float(f"{value:.7g}") if number is float else value

    if "token_embd.weight" not in shapes or len(shapes["token_embd.weight"]) != 2:
        raise ValueError("expected a tensor token_embd.weight of two dimensions in the GGUF, got none")
    n_layer, n_head, n_embd = get("block_count"), get("attention.head_count"), get("embedding_length")
    if n_head < 1:
        raise ValueError(f"expected {kind}.attention.head_count of at least 1, got {n_head}")
    ends = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    common: dict[str, Any] = dict(
        vocab_size=shapes["token_embd.weight"][0],
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        context=get("context_length"),
        ffn_dim=get("feed_forward_length"),
        tie_embeddings="output.weight" not in shapes,
        bos_id=ends["bos"],
        eos_ids=() if ends["eos"] is None else (ends["eos"],),
    )
    if kind == "gpt2":
        return GPTConfig(family="gpt2", norm_eps=get("attention.layer_norm_epsilon", 1e-5, number=float), **common)
    head_dim = get("attention.key_length", n_embd // n_head)
    if get("attention.value_length", head_dim) != head_dim:
        raise ValueError(f"expected values as long as keys ({head_dim}), got {get('attention.value_length')}")
    return GPTConfig(
        family="llama",
        n_kv_head=get("attention.head_count_kv", n_head),
        head_dim=head_dim,
        norm="rms_norm",
        norm_eps=get("attention.layer_norm_rms_epsilon", 1e-5, number=float),
        positions="rope",
        rope_theta=get("rope.freq_base", 10000.0, number=float),
        rope_scaling=_scaling(metadata, kind),
        rotary_dim=get("rope.dimension_count", head_dim),
        activation="swiglu",
        qkv_bias="blk.0.attn_q.bias" in shapes,
        out_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_down.bias" in shapes,
        qk_norm="blk.0.attn_q_norm.weight" in shapes,
        window=metadata.get(f"{kind}.attention.sliding_window"),
        **common,
    )


def _scaling(metadata: dict[str, Any], kind: str) -> dict[str, Any] | None:
    name = metadata.get(f"{kind}.rope.scaling.type", "none")
    if name not in SCALINGS:
        raise ValueError(f"expected {kind}.rope.scaling.type among {', '.join(SCALINGS)}, got {name!r}")
    if name == "none":
        return None
    scaling = {"rope_type": SCALINGS[name], "factor": float(metadata[f"{kind}.rope.scaling.factor"])}
    if (original := metadata.get(f"{kind}.rope.scaling.original_context_length")) is not None:
        scaling["original_max_position_embeddings"] = original
    return scaling


def architecture(config: GPTConfig) -> str:
    """The architecture under which a GGUF file holds this configuration. Raises ValueError where there is none."""
    if config.family == "gpt2":
        return "gpt2"
    if config.window_layers is not None or config.activation != "swiglu":
        raise ValueError(
            "expected a window in all layers or none, and swiglu, for a GGUF file, "
            f"got window_layers {config.window_layers} and {config.activation}"
        )
    return "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias and not config.out_bias else "llama"


def write_config(config: GPTConfig) -> dict[str, Any]:
    """The metadata of a GGUF file that holds this configuration."""
    kind = architecture(config)
    written: dict[str, Any] = {
        "block_count": config.n_layer,
        "attention.head_count": config.n_head,
        "embedding_length": config.n_embd,
        "feed_forward_length": config.ffn_dim,
        "context_length": config.context,
        "vocab_size": config.vocab_size,
    }
    if kind == "gpt2":
        written["attention.layer_norm_epsilon"] = config.norm_eps
    else:
        written |= {
            "attention.head_count_kv": config.n_kv_head,
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "attention.layer_norm_rms_epsilon": config.norm_eps,
            "rope.freq_base": config.rope_theta,
            "rope.dimension_count": config.rotary_dim,
        }
        if config.window is not None:
            written["attention.sliding_window"] = config.window
        written |= _write_scaling(config)
    ids = {"bos": config.bos_id, "eos": config.eos_ids[0] if config.eos_ids else None}
    ends = {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i is not None}
    return {"general.architecture": kind, **{f"{kind}.{key}": value for key, value in written.items()}, **ends}


def _write_scaling(config: GPTConfig) -> dict[str, Any]:
    if config.rope_scaling is None:
        return {}
    given = dict(config.rope_scaling)
    kind, factor = given.pop("rope_type"), given.pop("factor", None)
    original = given.pop("original_max_position_embeddings", None)
    if kind not in ("linear", "yarn") or given:
        raise ValueError(f"expected linear or plain yarn scaling for a GGUF file, got {config.rope_scaling}")
    scaling = {"rope.scaling.type": kind, "rope.scaling.factor": factor}
    return scaling if original is None else scaling | {"rope.scaling.original_context_length": original}


def with_frequency_factors(config: GPTConfig, factors: Tensor) -> GPTConfig:
    """The configuration whose rotation frequencies are divided by these (the file's tensor rope_freqs.weight, which
    Llama 3's scaling becomes there)."""
    if config.rope_scaling is not None:
        raise ValueError(f"expected rope_freqs.weight without another scaling, got {config.rope_scaling['rope_type']}")
    if factors.numel() != config.rotary_dim // 2 or not bool((factors > 0).all()):
        raise ValueError(
            f"expected {config.rotary_dim // 2} positive values in rope_freqs.weight, got {factors.numel()}"
        )
    values = factors.float().flatten().tolist()
    scaling = {"rope_type": "longrope", "short_factor": values, "long_factor": values, "attention_factor": 1.0}
    return config.replace(rope_scaling={**scaling, "original_max_position_embeddings": config.context})


def names(config: GPTConfig, architecture: str) -> dict[str, Source]:
    """Each of our parameters by name, and the tensors of a GGUF file that it is made of."""
    gpt2 = config.family == "gpt2"
    found = {"embedding.weight": Source("token_embd.weight")}
    if gpt2:
        found["positions.weight"] = Source("position_embd.weight")
    permuted = (config.n_head, config.n_kv_head, 0) if architecture == "llama" else (0, 0, 0)
    norm_ends = ["weight"] + ["bias"] * (config.norm == "layer_norm")
    for i in range(config.n_layer):
        for end in norm_ends:
            found[f"blocks.{i}.attention_norm.{end}"] = Source(f"blk.{i}.attn_norm.{end}")
            found[f"blocks.{i}.mlp_norm.{end}"] = Source(f"blk.{i}.ffn_norm.{end}")
        for end in ["weight"] + ["bias"] * config.qkv_bias:
            parts = [f"blk.{i}.attn_qkv.{end}"] if gpt2 else [f"blk.{i}.attn_{x}.{end}" for x in "qkv"]
            found[f"blocks.{i}.attention.qkv.{end}"] = Source(*parts, heads=() if gpt2 else permuted)
        for end in ["weight"] + ["bias"] * config.out_bias:
            found[f"blocks.{i}.attention.out.{end}"] = Source(f"blk.{i}.attn_output.{end}")
        for end in ["weight"] + ["bias"] * config.mlp_bias:
            parts = [f"blk.{i}.ffn_{x}.{end}" for x in (("gate", "up") if config.gated else ("up",))]
            found[f"blocks.{i}.mlp.up.{end}"] = Source(*parts)
            found[f"blocks.{i}.mlp.down.{end}"] = Source(f"blk.{i}.ffn_down.{end}")
        if config.qk_norm:
            for x in "qk":
                found[f"blocks.{i}.attention.{x}_norm.weight"] = Source(f"blk.{i}.attn_{x}_norm.weight")
    for end in norm_ends:
        found[f"norm.{end}"] = Source(f"output_norm.{end}")
    if not config.tie_embeddings:
        found["head.weight"] = Source("output.weight")
    return found


def shapes(tensors: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of an open file."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def frequency_factors(gguf: Any) -> Tensor | None:
    """The file's rope_freqs.weight, if it has one."""
    return torch.as_tensor(gguf.float32("rope_freqs.weight")) if "rope_freqs.weight" in gguf.tensors else None
