"""GPT against transformers: random tiny models of every supported type, folders both ways, and configurations."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptfast.generate.cache import KVCache
from gptfast.model import GPT, GPTConfig, convert
from gptfast.ops.spec import tolerance
from gptfast.quantize import QuantizedWeight

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = dict(
    vocab_size=211, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=96, max_position_embeddings=128, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=1e4, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
GPT2: dict[str, Any] = dict(model_type="gpt2", vocab_size=211, n_positions=128, bos_token_id=None, eos_token_id=None)
UNTIED: dict[str, Any] = dict(n_inner=80, activation_function="gelu", tie_word_embeddings=False)
BIASED: dict[str, Any] = dict(
    attention_bias=True, mlp_bias=True, head_dim=24, tie_word_embeddings=True, rope_parameters=LLAMA3
)
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": dict(GPT2, n_embd=64, n_layer=3, n_head=4),
    "gpt2-untied-gelu": dict(GPT2, n_embd=48, n_layer=2, n_head=3, **UNTIED),
    "llama": dict(SMALL, model_type="llama"),
    "llama-tied-biased": dict(SMALL, model_type="llama", **BIASED),
    "mistral": dict(SMALL, model_type="mistral", sliding_window=9),
    "qwen2": dict(SMALL, model_type="qwen2"),
    "qwen2-window": dict(SMALL, model_type="qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "qwen3": dict(SMALL, model_type="qwen3", head_dim=32, tie_word_embeddings=True),
}
T = 41  # tokens of each text: longer than every window


class Fp64RMSNorm(nn.Module):
    """transformers' own computes in fp32 whatever the dtype."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def theirs(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A transformers model with seeded random parameters, large enough that every part matters."""
    values = dict(CONFIGS[name])
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            is_norm = "norm" in key or ".ln_" in key
            p.data = (noise * 0.15 + (1.0 if is_norm and key.endswith("weight") else 0.0)).to(dtype)
    return model.eval()  # the parameters only have the dtype: model.to(dtype) would round rope's frequencies too


def exact(model: Any) -> Any:
    """The same weights, everything in fp64."""
    wide = copy.deepcopy(model).double()
    for parent in list(wide.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, Fp64RMSNorm(child.weight, child.variance_epsilon))
    return wide


def text(vocabulary: int = 211) -> Tensor:
    return torch.randint(vocabulary, (2, T), generator=torch.Generator().manual_seed(1))


def greedy(model: GPT, ids: Tensor, n: int) -> Tensor:
    """n tokens after each row, through the cache."""
    cache = KVCache(model.config, ids.shape[0], ids.shape[1] + n, model.dtype)
    new: list[Tensor] = []
    for _ in range(n):
        logits = model(ids, cache, last=torch.full((ids.shape[0],), ids.shape[1] - 1))
        cache.advance(ids.shape[1])
        ids = logits.argmax(-1, keepdim=True)
        new.append(ids)
    return torch.cat(new, 1)


def check_logits(ours: GPT, model: Any) -> None:
    ids = text()
    with torch.no_grad():
        wanted, plain = exact(model)(ids).logits, model(ids).logits
        got = ours(ids)
    assert got.dtype == torch.float32 and got.shape == wanted.shape
    error = (got.double() - wanted).abs().max().item()
    assert error <= tolerance(plain, wanted), f"max |error| {error:.3g} > {tolerance(plain, wanted):.3g}"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_logits(name: str, dtype: torch.dtype) -> None:
    model = theirs(name, dtype)
    ours = GPT.from_huggingface_model(model)
    assert ours.dtype == dtype
    check_logits(ours, model)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens(name: str) -> None:
    model, ids = theirs(name), text()
    with torch.no_grad():
        wanted = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=32,
            min_new_tokens=32,
            do_sample=False,
            pad_token_id=0,
        )[:, T:]
        got = greedy(GPT.from_huggingface_model(model), ids, 32)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_counted(name: str) -> None:
    model = theirs(name)
    config = GPTConfig.from_huggingface(model.config.to_dict())
    assert config.parameters() == sum(p.numel() for p in model.parameters())
    assert config.parameters() == sum(p.numel() for p in GPT(config, device="meta").parameters())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_our_folder_loads_there_and_back(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = theirs(name, dtype)
    ours = GPT.from_huggingface_model(model)
    ours.save_folder(tmp_path)
    there, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(there) is type(model) and there.dtype == dtype
    for key, value in model.state_dict().items():
        assert torch.equal(there.state_dict()[key], value), key
    ids = text()
    with torch.no_grad():
        assert torch.equal(there.eval()(ids).logits, model(ids).logits)
    back = GPT.from_folder(tmp_path)
    assert back.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), ours.parameters(), strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_their_folder_loads_here(name: str, tmp_path: Path) -> None:
    model = theirs(name)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    check_logits(GPT.from_folder(tmp_path), model)


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_survives(name: str) -> None:
    ours = GPTConfig.from_huggingface(theirs(name).config.to_dict())
    assert GPTConfig.from_huggingface(ours.to_huggingface()) == ours


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "qwen3"])
def test_our_gguf_means_the_same_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers reads GGUF on its own terms (names, permuted heads); it takes some sizes to be the defaults."""
    pytest.importorskip("gguf")
    changes = {"gpt2": {"n_positions": 1024}, "qwen3": {"head_dim": 128}}.get(name, {})
    monkeypatch.setitem(CONFIGS, name, CONFIGS[name] | changes)
    ours, ids = GPT.from_huggingface_model(theirs(name)), text()
    tokens = {"tokenizer.ggml.tokens": [f"<{i}>" for i in range(211)]}
    convert.save_gguf(ours, tmp_path / "m.gguf", metadata=tokens)
    monkeypatch.setattr(transformers.modeling_utils, "is_accelerate_available", lambda *_: True)
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(there.eval()(ids).logits, theirs(name)(ids).logits)


def test_weights_are_held_as_asked(tmp_path: Path) -> None:
    theirs("llama").save_pretrained(tmp_path)
    assert GPT.from_folder(tmp_path, weights="bf16").dtype == torch.bfloat16
    for weights, kinds in (("q8", {"q8_0"}), ("q4", {"q4_1", "q8_0"}), ("q4_0", {"q4_0"})):
        model = GPT.from_folder(tmp_path, weights=weights)
        held: dict[str, object] = {name: getattr(m, "weight", None) for name, m in model.named_modules()}
        found = {name: w.kind for name, w in held.items() if isinstance(w, QuantizedWeight)}
        assert set(found.values()) == kinds and found["embedding"] != "q4_1"
    with pytest.raises(ValueError, match=r"expected weights among fp32, .*, got 'int3'"):
        GPT.from_folder(tmp_path, weights="int3")


def test_bare_names_and_old_buffers_load() -> None:
    """GPT-2's first release has neither the prefix nor clean buffers."""
    model = theirs("gpt2")
    ours = GPT.from_huggingface_model(model)
    bare = model.transformer
    buffers = {"h.0.attn.bias": torch.ones(1, 1, 128, 128), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    state = dict(bare.state_dict()) | buffers
    bare.state_dict = lambda: state
    again = GPT.from_huggingface_model(bare)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.layers.1.mlp.up_proj.weight"), "missing model.layers.1.mlp.up_proj.weight"),
        (lambda s: s.update({"model.layers.0.extra": torch.ones(1)}), "got also model.layers.0.extra"),
        (lambda s: s.update({"model.norm.weight": torch.ones(65)}), r"model.norm.weight to make \(64,\), got \(65,\)"),
        (lambda s: s.update({"model.norm.weight": torch.ones(64, dtype=torch.int64)}), "got torch.int64"),
    ],
)
def test_wrong_tensors_are_named(change: Any, message: str) -> None:
    model = theirs("llama")
    state = dict(model.state_dict())
    change(state)
    model.state_dict = lambda: state
    with pytest.raises(ValueError, match=message):
        GPT.from_huggingface_model(model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(model_type="bert"), "expected a model_type among gpt2, llama, mistral, qwen2, qwen3, got 'bert'"),
        (dict(), "got None"),
        (dict(model_type="llama", vocab_size=5), "expected hidden_size in a llama config"),
        (dict(model_type="gpt2", scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx = False"),
        (dict(model_type="gpt2", activation_function="relu"), "expected an activation among .*, got 'relu'"),
        (dict(model_type="llama", quantization_config={"quant_method": "awq"}), "quantised with 'awq'"),
        (dict(CONFIGS["llama"], num_key_value_heads=3), "n_head a multiple of n_kv_head 3, got 4"),
    ],
)
def test_what_cannot_be_computed_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig.from_huggingface(config)
