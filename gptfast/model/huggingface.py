"""GPT and Hugging Face: the meaning of a config.json, and which of its tensors are which of ours."""

from __future__ import annotations

from typing import Any

from gptfast.model.config import GPTConfig
from gptfast.model.names import Source

MODEL_TYPES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
}
GATES = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}
REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
# What transformers assumes where a config.json of this type is silent.
SILENT: dict[str, dict[str, Any]] = {
    "gpt2": dict(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12),
    "llama": dict(max_position_embeddings=2048),
    "mistral": dict(max_position_embeddings=131072, num_key_value_heads=8, sliding_window=4096),
    "qwen2": dict(max_position_embeddings=32768),
    "qwen3": dict(max_position_embeddings=32768, head_dim=128),
}
# Buffers and copies that older files carry.
IGNORED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def read_config(config: dict[str, Any]) -> GPTConfig:
    """A config.json's contents as a GPTConfig. Raises ValueError for a model that GPT can't compute."""
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"expected a model_type among {', '.join(MODEL_TYPES)}, got {kind!r}")
    if config.get("quantization_config"):
        method = dict(config["quantization_config"]).get("quant_method")
        raise ValueError(f"expected plain weights (or a GGUF file), got a folder quantised with {method!r}")
    given = {name: value for name, value in config.items() if value is not None}
    if "sliding_window" in config and config["sliding_window"] is None:
        given["sliding_window"] = None
    return _read_gpt2(SILENT["gpt2"] | given) if kind == "gpt2" else _read_llama(kind, SILENT[kind] | given)


def _eos(config: dict[str, Any]) -> tuple[int, ...]:
    eos = config.get("eos_token_id")
    return () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)


def _activation(name: str, known: dict[str, str]) -> str:
    if name not in known:
        raise ValueError(f"expected an activation among {', '.join(known)}, got {name!r}")
    return known[name]


def _read_gpt2(c: dict[str, Any]) -> GPTConfig:
    for name, supported in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if c.get(name, supported) != supported:
            raise ValueError(f"expected {name} = {supported} in a GPT-2 config, got {c[name]}")
    return GPTConfig(
        family="gpt2",
        vocab_size=c["vocab_size"],
        n_layer=c["n_layer"],
        n_head=c["n_head"],
        n_embd=c["n_embd"],
        context=c["n_positions"],
        ffn_dim=c.get("n_inner", 4 * c["n_embd"]),
        norm_eps=c.get("layer_norm_epsilon", 1e-5),
        activation=_activation(c.get("activation_function", "gelu_new"), ACTIVATIONS),
        tie_embeddings=c.get("tie_word_embeddings", True),
        dropout=c.get("resid_pdrop", 0.1),
        bos_id=c.get("bos_token_id"),
        eos_ids=_eos(c),
    )


def _read_llama(kind: str, c: dict[str, Any]) -> GPTConfig:
    if missing := [name for name in REQUIRED if name not in c]:
        raise ValueError(f"expected {missing[0]} in a {kind} config, got none")
    rope = dict(c.get("rope_scaling") or {}) | dict(c.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", c.get("rope_theta", 10000.0))
    rotary = rope.pop("partial_rotary_factor", c.get("partial_rotary_factor", 1.0))
    old_type = rope.pop("type", "default")
    rope.setdefault("rope_type", old_type)
    head_dim = c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
    window, window_layers = _windows(kind, c)
    attention_bias = c.get("attention_bias", False)
    return GPTConfig(
        family="llama",
        vocab_size=c["vocab_size"],
        n_layer=c["num_hidden_layers"],
        n_head=c["num_attention_heads"],
        n_kv_head=c.get("num_key_value_heads", c["num_attention_heads"]),
        n_embd=c["hidden_size"],
        context=c["max_position_embeddings"],
        head_dim=head_dim,
        ffn_dim=c["intermediate_size"],
        norm="rms_norm",
        norm_eps=c.get("rms_norm_eps", 1e-6),
        positions="rope",
        rope_theta=float(theta),
        rope_scaling=None if rope["rope_type"] == "default" else rope,
        rotary_dim=int(head_dim * rotary),
        activation=_activation(c.get("hidden_act", "silu"), GATES),
        qkv_bias=kind == "qwen2" or (attention_bias and kind != "mistral"),
        out_bias=attention_bias and kind in ("llama", "qwen3"),
        mlp_bias=c.get("mlp_bias", False) and kind == "llama",
        qk_norm=kind == "qwen3",
        window=window,
        window_layers=window_layers,
        tie_embeddings=c.get("tie_word_embeddings", False),
        dropout=c.get("attention_dropout", 0.0),
        bos_id=c.get("bos_token_id"),
        eos_ids=_eos(c),
    )


def _windows(kind: str, c: dict[str, Any]) -> tuple[int | None, tuple[bool, ...] | None]:
    """The sliding window and the layers that have it (None: all)."""
    if kind == "mistral":
        return c["sliding_window"], None
    if kind == "llama" or not c.get("use_sliding_window", False) or c.get("sliding_window") is None:
        return None, None
    if (types := c.get("layer_types")) is not None:
        layers = tuple(t == "sliding_attention" for t in types)
    else:
        layers = tuple(i >= c.get("max_window_layers", 28) for i in range(c["num_hidden_layers"]))
    return (c["sliding_window"], None if all(layers) else layers) if any(layers) else (None, None)


def model_type(config: GPTConfig) -> str:
    """The Hugging Face model type that computes this configuration. Raises ValueError where there is none."""
    if config.family == "gpt2":
        if (config.norm, config.positions, config.gated) != ("layer_norm", "learned", False) or config.window:
            raise ValueError("expected layer_norm, learned positions and no gate or window in a gpt2-family folder")
        return "gpt2"
    if (config.norm, config.positions, config.gated) != ("rms_norm", "rope", True):
        raise ValueError("expected rms_norm, rope and a gated MLP in a llama-family folder")
    if config.qk_norm:
        kind = "qwen3"
    elif config.window_layers is not None or (config.qkv_bias and not config.out_bias):
        kind = "qwen2"
    else:
        kind = "mistral" if config.window is not None else "llama"
    back = read_config(_write_llama(config, kind))
    if back != config:
        raise ValueError(f"expected a configuration that a {kind} folder can hold, got {config}")
    return kind


def write_config(config: GPTConfig) -> dict[str, Any]:
    """The contents of a config.json that transformers reads as the same model."""
    kind = model_type(config)
    return _write_gpt2(config) if kind == "gpt2" else _write_llama(config, kind)


def _ends(config: GPTConfig) -> dict[str, Any]:
    eos = config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None
    return {"bos_token_id": config.bos_id, "eos_token_id": eos, "tie_word_embeddings": config.tie_embeddings}


def _write_gpt2(config: GPTConfig) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.context,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.ffn_dim,
        "activation_function": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation),
        "layer_norm_epsilon": config.norm_eps,
        **{name: config.dropout for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")},
        **_ends(config),
    }


def _write_llama(config: GPTConfig, kind: str) -> dict[str, Any]:
    scaling = dict(config.rope_scaling) if config.rope_scaling else {}
    if config.rotary_dim != config.head_dim:
        scaling = {"rope_type": "default", **scaling, "partial_rotary_factor": config.rotary_dim / config.head_dim}
    written = {
        "model_type": kind,
        "architectures": [kind.capitalize() + "ForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "hidden_act": next(theirs for theirs, ours in GATES.items() if ours == config.activation),
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling or None,
        "attention_dropout": config.dropout,
        **_ends(config),
    }
    if kind in ("llama", "qwen3"):
        written["attention_bias"] = config.qkv_bias
    if kind == "llama":
        written["mlp_bias"] = config.mlp_bias
    if kind == "mistral":
        written["sliding_window"] = config.window
    if kind in ("qwen2", "qwen3"):
        flags = config.window_layers or (config.window is not None,) * config.n_layer
        written["use_sliding_window"] = config.window is not None
        written["sliding_window"] = config.window
        written["layer_types"] = ["sliding_attention" if flag else "full_attention" for flag in flags]
    return written


def names(config: GPTConfig) -> dict[str, Source]:
    """Each of our parameters by name, and the tensors of a Hugging Face folder that it is made of."""
    return _gpt2_names(config) if config.family == "gpt2" else _llama_names(config)


def _gpt2_names(config: GPTConfig) -> dict[str, Source]:
    found = {"embedding.weight": Source("transformer.wte.weight"), "positions.weight": Source("transformer.wpe.weight")}
    for i in range(config.n_layer):
        ours, theirs = f"blocks.{i}", f"transformer.h.{i}"
        for module, name, transposed in (
            ("attention_norm", "ln_1", False),
            ("attention.qkv", "attn.c_attn", True),
            ("attention.out", "attn.c_proj", True),
            ("mlp_norm", "ln_2", False),
            ("mlp.up", "mlp.c_fc", True),
            ("mlp.down", "mlp.c_proj", True),
        ):
            found[f"{ours}.{module}.weight"] = Source(f"{theirs}.{name}.weight", transposed=transposed)
            found[f"{ours}.{module}.bias"] = Source(f"{theirs}.{name}.bias")
    for end in ("weight", "bias"):
        found[f"norm.{end}"] = Source(f"transformer.ln_f.{end}")
    if not config.tie_embeddings:
        found["head.weight"] = Source("lm_head.weight")
    return found


def _llama_names(config: GPTConfig) -> dict[str, Source]:
    found = {"embedding.weight": Source("model.embed_tokens.weight")}
    for i in range(config.n_layer):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        attention = [f"{theirs}.self_attn.{x}_proj" for x in "qkv"]
        mlp = [f"{theirs}.mlp.{x}_proj" for x in ("gate", "up")]
        for end in ["weight"] + ["bias"] * config.qkv_bias:
            found[f"{ours}.attention.qkv.{end}"] = Source(*(f"{a}.{end}" for a in attention))
        for end in ["weight"] + ["bias"] * config.out_bias:
            found[f"{ours}.attention.out.{end}"] = Source(f"{theirs}.self_attn.o_proj.{end}")
        for end in ["weight"] + ["bias"] * config.mlp_bias:
            found[f"{ours}.mlp.up.{end}"] = Source(*(f"{m}.{end}" for m in mlp))
            found[f"{ours}.mlp.down.{end}"] = Source(f"{theirs}.mlp.down_proj.{end}")
        found[f"{ours}.attention_norm.weight"] = Source(f"{theirs}.input_layernorm.weight")
        found[f"{ours}.mlp_norm.weight"] = Source(f"{theirs}.post_attention_layernorm.weight")
        if config.qk_norm:
            for x in "qk":
                found[f"{ours}.attention.{x}_norm.weight"] = Source(f"{theirs}.self_attn.{x}_norm.weight")
    found["norm.weight"] = Source("model.norm.weight")
    if not config.tie_embeddings:
        found["head.weight"] = Source("lm_head.weight")
    return found
