"""CTranslate2 in int8 or fp32, from the weights as fp32 in a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter
from typing import Any

import ctranslate2  # pyright: ignore[reportMissingImports]
import numpy as np
from ctranslate2.specs import TransformerDecoderModelSpec, common_spec  # pyright: ignore[reportMissingImports]
from safetensors.numpy import load_file

from benchmarks.peers.worker import Model, Timed, serve


def prepare(folder: Path, weights: str) -> None:
    to, part = folder / f"ctranslate2-{weights}", folder / "ctranslate2-part"
    if to.exists():
        return
    config = json.loads((folder / "folder" / "config.json").read_text())
    tensors = load_file(folder / "folder" / "model.safetensors")
    spec = (_gpt2 if config["model_type"] == "gpt2" else _llama)(config, tensors)
    # The vocabulary is the ids, written out.
    spec.register_vocabulary([str(i) for i in range(config["vocab_size"])])
    spec.config.unk_token, spec.config.bos_token, spec.config.eos_token = "0", "1", "2"
    spec.config.layer_norm_epsilon = config.get("rms_norm_eps") or config["layer_norm_epsilon"]
    spec.validate()
    spec.optimize(quantization=weights)
    part.mkdir(exist_ok=True)
    spec.save(str(part))
    part.rename(to)


def _llama(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> TransformerDecoderModelSpec:
    spec = TransformerDecoderModelSpec.from_config(
        config["num_hidden_layers"],
        config["num_attention_heads"],
        num_heads_kv=config["num_key_value_heads"],
        activation=common_spec.Activation.SWISH,
        pre_norm=True,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,
        rotary_interleave=False,
        rotary_base=config["rope_theta"],
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = decoder.projection.weight = tensors["model.embed_tokens.weight"]
    decoder.layer_norm.gamma = tensors["model.norm.weight"]
    for i, layer in enumerate(decoder.layer):
        w = {name.removeprefix(f"model.layers.{i}."): tensor for name, tensor in tensors.items()}
        attention, mlp = layer.self_attention, layer.ffn
        attention.layer_norm.gamma = w["input_layernorm.weight"]
        attention.linear[0].weight = np.concatenate([w[f"self_attn.{x}_proj.weight"] for x in "qkv"])
        attention.linear[1].weight = w["self_attn.o_proj.weight"]
        mlp.layer_norm.gamma = w["post_attention_layernorm.weight"]
        mlp.linear_0.weight = w["mlp.gate_proj.weight"]
        mlp.linear_0_noact.weight = w["mlp.up_proj.weight"]
        mlp.linear_1.weight = w["mlp.down_proj.weight"]
    return spec


def _gpt2(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> TransformerDecoderModelSpec:
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    spec = TransformerDecoderModelSpec.from_config(
        config["n_layer"], config["n_head"], activation=common_spec.Activation.GELUTanh, pre_norm=True
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = decoder.projection.weight = tensors["wte.weight"]
    decoder.position_encodings.encodings = tensors["wpe.weight"]
    _norm(decoder.layer_norm, tensors, "ln_f")
    for i, layer in enumerate(decoder.layer):
        attention, mlp = layer.self_attention, layer.ffn
        _norm(attention.layer_norm, tensors, f"h.{i}.ln_1")
        _norm(mlp.layer_norm, tensors, f"h.{i}.ln_2")
        for linear, name in (
            (attention.linear[0], "attn.c_attn"),
            (attention.linear[1], "attn.c_proj"),
            (mlp.linear_0, "mlp.c_fc"),
            (mlp.linear_1, "mlp.c_proj"),
        ):
            linear.weight = np.ascontiguousarray(tensors[f"h.{i}.{name}.weight"].T)
            linear.bias = tensors[f"h.{i}.{name}.bias"]
    return spec


def _norm(spec: Any, tensors: dict[str, np.ndarray], name: str) -> None:
    spec.gamma, spec.beta = tensors[f"{name}.weight"], tensors[f"{name}.bias"]


def load(folder: Path, weights: str, threads: int) -> Model:
    path = folder / f"ctranslate2-{weights}"
    generator = ctranslate2.Generator(str(path), compute_type=weights, intra_threads=threads)

    def run(prompts: list[list[int]], new: int) -> Timed:
        steps: list[float] = []
        start = perf_counter()
        found = generator.generate_batch(
            [[str(token) for token in prompt] for prompt in prompts],
            max_length=new,
            min_length=new,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=lambda _: steps.append(perf_counter()),
        )
        end = perf_counter()
        first = steps[len(prompts) - 1]  # one call for each row and step
        return Timed(first - start, end - first, [row.sequences_ids[0] for row in found])

    return Model(run, (path / "model.bin").stat().st_size)


if __name__ == "__main__":
    serve(prepare, load)
