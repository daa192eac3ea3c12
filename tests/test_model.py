"""GPT on its own: caches, presets and counts, GGUF, initialisation, gradients and dropout."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gptfast
from gptfast.formats import blocks
from gptfast.formats.gguf import open_gguf
from gptfast.generate.cache import KVCache
from gptfast.kernels import reason_missing
from gptfast.layers import Linear
from gptfast.model import GPT, PRESETS, GPTConfig, convert, preset
from gptfast.ops.spec import ulp
from gptfast.quantize import PackedWeight, QuantizedWeight

LLAMA: dict[str, Any] = dict(
    n_kv_head=2, ffn_dim=96, norm="rms_norm", positions="rope", activation="swiglu", qkv_bias=False, out_bias=False,
    mlp_bias=False,
)  # fmt: skip
CONFIGS = {
    "gpt2": GPTConfig("gpt2", 97, 3, 4, 64, 64),
    "llama": GPTConfig("llama", 97, 3, 4, 64, 64, **LLAMA),
    "window": GPTConfig("llama", 97, 3, 4, 64, 64, **LLAMA, window=5, window_layers=(True, False, True), qk_norm=True),
}


def model_of(name: str, dtype: torch.dtype = torch.float32) -> GPT:
    torch.manual_seed(0)
    model = GPT(CONFIGS[name], dtype=dtype)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape).to(dtype)
    return model.eval()


def block(model: GPT, i: int) -> Any:
    return model.blocks[i]


def text(B: int, T: int, vocabulary: int = 97) -> Tensor:
    return torch.randint(vocabulary, (B, T), generator=torch.Generator().manual_seed(B))


def in_chunks(model: GPT, ids: Tensor, sizes: list[int], kept: torch.dtype | None = None) -> Tensor:
    """The logits of all positions, computed so many at a time through a cache (of dtype `kept`)."""
    cache = KVCache(model.config, ids.shape[0], ids.shape[1], kept or model.dtype)
    logits = []
    for chunk in ids.split(sizes, dim=1):
        logits.append(model(chunk, cache))
        cache.advance(chunk.shape[1])
    return torch.cat(logits, 1)


needs_cpu = pytest.mark.skipif(reason_missing("cpu") is not None, reason="the C++ extension is not built")


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_decode_chunks_and_batches_have_the_bits_of_prefill(name: str, dtype: torch.dtype) -> None:
    model, ids = model_of(name, dtype), text(3, 23)
    model.backend = "cpu"
    whole = in_chunks(model, ids, [23])
    assert torch.equal(model(ids), whole), "without a cache"
    assert torch.equal(in_chunks(model, ids, [7, 1, 12, 3]), whole), "in chunks"
    assert torch.equal(in_chunks(model, ids, [1] * 23), whole), "one by one"
    assert torch.equal(in_chunks(model, ids[1:2], [20, 1, 1, 1]), whole[1:2]), "alone"


@needs_cpu
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_a_smaller_cache_has_the_bits_of_prefill_too(name: str, kept: torch.dtype) -> None:
    model, ids = model_of(name), text(3, 23)
    model.backend = "cpu"
    whole = in_chunks(model, ids, [23], kept)
    assert not torch.equal(whole, in_chunks(model, ids, [23]))
    assert torch.equal(in_chunks(model, ids, [7, 1, 12, 3], kept), whole), "in chunks"
    assert torch.equal(in_chunks(model, ids, [1] * 23, kept), whole), "one by one"
    assert torch.equal(in_chunks(model, ids[1:2], [20, 1, 1, 1], kept), whole[1:2]), "alone"


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_the_reference_backend_agrees(name: str) -> None:
    """Within twice what fp32 itself costs: the fp64 model on the same weights tells."""
    model, ids = model_of(name), text(2, 19)
    fast = in_chunks(model, ids, [8, 11])
    model.backend = "reference"
    plain = model(ids)
    wanted = model.double()(ids)
    limit = 2 * (plain - wanted).abs().max().item() + ulp(wanted.abs().max().item(), torch.float32)
    assert (fast - wanted).abs().max().item() <= limit


@needs_cpu
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_ragged_rows_padded_on_the_right(name: str) -> None:
    model, ids = model_of(name), text(3, 16)
    lengths = torch.tensor([16, 3, 9])
    whole = model(ids)
    padded = torch.where(torch.arange(16) < lengths[:, None], ids, 96)
    cache = KVCache(model.config, 3, 20, model.dtype)
    logits = model(padded, cache, last=lengths - 1)
    cache.advance(lengths)
    assert torch.equal(logits, whole[torch.arange(3), lengths - 1])
    assert cache.lengths.tolist() == [16, 3, 9]
    step = text(3, 1)
    logits = model(step, cache)[:, 0]
    for b in range(3):
        alone = model(torch.cat((ids[b : b + 1, : lengths[b]], step[b : b + 1]), 1))[0, -1]
        assert torch.equal(logits[b], alone)


@needs_cpu
@pytest.mark.parametrize("kept", [torch.float32, torch.int8], ids=str)
@torch.inference_mode()
def test_cache_rows(kept: torch.dtype) -> None:
    model, ids = model_of("llama"), text(3, 8)
    cache = KVCache(model.config, 3, 8, kept)
    assert cache.nbytes == 3 * 8 * model.config.kv_bytes_per_token(kept)
    model(ids[:, :6], cache)
    cache.advance(6)
    chosen = cache.select([2, 0, 2])
    assert torch.equal(model(ids[[2, 0, 2], 6:], chosen), model(ids[:, 6:], cache)[[2, 0, 2]])
    row = cache.row(1)
    model(ids[1:2, 6:], row)
    row.advance(2)
    assert cache.lengths.tolist() == [6, 8, 6] and cache.k[0][1:2].data_ptr() == row.k[0].data_ptr()
    with pytest.raises(ValueError, match="expected at most 0 more tokens in a cache of 8, got 1"):
        model(ids[:, :1], cache)
    cache.truncate(4)
    cache.grow(20)
    assert cache.capacity == 20 and cache.lengths.tolist() == [4, 4, 4]
    assert torch.equal(model(ids[:, 4:], cache), in_chunks(model, ids, [4, 4], kept)[:, 4:])
    cache.reset()
    assert cache.lengths.tolist() == [0, 0, 0]


def test_what_does_not_fit_is_said() -> None:
    model = model_of("gpt2")
    with pytest.raises(ValueError, match="expected at most 64 more tokens in a context of 64, got 65"):
        model(text(1, 65))
    with pytest.raises(ValueError, match=r"expected ids \(B, T\) int64, got \(3,\) torch.int64"):
        model(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected ids for the cache's 2 rows, got 3"):
        model(text(3, 2), KVCache(model.config, 2, 8))
    with pytest.raises(ValueError, match="expected None, 'exact' or 'int8', got 'int4'"):
        model.activations = "int4"
    with pytest.raises(ValueError, match="norm one of layer_norm, rms_norm, got batch_norm"):
        GPTConfig("gpt2", 97, 3, 4, 64, 64, norm="batch_norm")
    with pytest.raises(ValueError, match="n_embd a multiple of n_head or a head_dim, got 65"):
        GPTConfig("gpt2", 97, 3, 4, 65, 64)


RELEASED = {  # parameters of the released checkpoints
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "smollm2-135m": 134_515_008,
    "llama-7b": 6_738_415_616,
    "llama2-7b": 6_738_415_616,
    "llama3.1-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
}
NOMINAL = {  # what table 2.1 of the GPT-3 paper calls its models
    "gpt3-125m": 125e6,
    "gpt3-350m": 350e6,
    "gpt3-760m": 760e6,
    "gpt3-1.3b": 1.3e9,
    "gpt3-2.7b": 2.7e9,
    "gpt3-6.7b": 6.7e9,
    "gpt3-13b": 13.0e9,
    "gpt3-175b": 175.0e9,
}


@pytest.mark.parametrize("name", RELEASED)
def test_presets_have_the_released_size(name: str) -> None:
    assert preset(name).parameters() == RELEASED[name]


@pytest.mark.parametrize("name", NOMINAL)
def test_gpt3_presets_have_their_size(name: str) -> None:
    """Exactly what GPT-2's layout has at this depth L and width d: a block's matrices 12 d^2, their biases 9 d and its
    norms 4 d, the last norm 2 d, and both embeddings. The paper's names are nominal, up to 2% off that count (its 350M
    makes 356M): close enough to tell one row of the table from another, and no more."""
    c = preset(name)
    L, d = c.n_layer, c.n_embd
    assert c.parameters() == L * (12 * d**2 + 13 * d) + 2 * d + (50257 + 2048) * d
    assert abs(c.parameters() / NOMINAL[name] - 1) < 0.02


def test_every_preset_is_made_on_the_meta_device() -> None:
    for name, config in PRESETS.items():
        start = time.perf_counter()
        assert sum(p.numel() for p in GPT(config, device="meta").parameters()) == config.parameters(), name
        assert time.perf_counter() - start < 10
    with pytest.raises(ValueError, match=r"expected a preset among tiny, .*, got 'gpt5'"):
        preset("gpt5")


def test_costs() -> None:
    c = preset("gpt2-124m")
    matrices = 12 * 12 * 768**2 + 50257 * 768
    assert c.matrix_parameters() == matrices
    assert c.flops_per_token(1024) == 2 * matrices + 12 * 4 * 768 * 1024
    assert c.kv_bytes_per_token() == 2 * 12 * 768 * 4
    assert c.bytes_per_step(2, 100) == 4 * matrices + 2 * 100 * c.kv_bytes_per_token()
    assert preset("mistral-7b").flops_per_token(8192) == preset("mistral-7b").flops_per_token(4096)
    model = model_of("gpt2", torch.bfloat16)
    norms_and_biases = model.config.parameters() - model.config.matrix_parameters() - 64 * 64
    assert model.bytes_per_step(1, 10) == model.config.bytes_per_step(1, 10, torch.bfloat16) + 2 * norms_and_biases


def test_initialisation() -> None:
    model = GPT(CONFIGS["gpt2"].replace(vocab_size=500))
    for i in range(3):
        for linear, std in (
            (block(model, i).attention.qkv, 0.02),
            (block(model, i).attention.out, 0.02 / math.sqrt(6)),
            (block(model, i).mlp.up, 0.02),
            (block(model, i).mlp.down, 0.02 / math.sqrt(6)),
        ):
            n = linear.weight.numel()
            assert abs(linear.weight.std().item() / std - 1) < 5 / math.sqrt(2 * n)  # five sigma
            assert not linear.bias.any()


def test_gradients_reach_every_parameter() -> None:
    for name in CONFIGS:
        model = model_of(name).train()
        model(text(2, 12)).logsumexp(-1).sum().backward()
        for key, p in model.named_parameters():
            assert p.grad is not None and bool(p.grad.isfinite().all()) and bool(p.grad.any()), key


def test_dropout_follows_the_generator_and_spares_evaluation() -> None:
    model = GPT(CONFIGS["gpt2"].replace(dropout=0.3)).train()
    ids = text(2, 12)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(ids)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    model.eval()
    assert torch.equal(run(1), run(2))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
@torch.inference_mode()
def test_gguf(kind: str, tmp_path: Path) -> None:
    model = model_of("llama")
    model.save_gguf(tmp_path / "m.gguf", kind)
    gguf = open_gguf(tmp_path / "m.gguf")
    loaded = GPT.from_gguf(gguf)
    assert loaded.config == model.config
    quantised = kind.startswith("Q")
    weight = block(loaded, 0).attention.qkv.weight
    assert isinstance(weight, QuantizedWeight) == quantised
    wanted = blocks.dequantize(blocks.quantize(block(model, 0).attention.qkv.weight, kind), kind, (128, 64))
    assert torch.equal(weight.dequantize() if quantised else weight.float(), wanted)
    if not quantised:
        return
    ids, plain = text(2, 9), GPT.from_gguf(gguf, weights="fp32")
    loaded.activations = "exact"
    plain.backend = "reference"
    exact = GPT.from_gguf(gguf, weights="fp32").double()
    exact.backend = "reference"
    truth = exact(ids)
    limit = 2 * (plain(ids) - truth).abs().max().item() + ulp(truth.abs().max().item(), torch.float32)
    assert (loaded(ids) - truth).abs().max().item() <= limit
    loaded.save_gguf(tmp_path / "again.gguf")
    again = open_gguf(tmp_path / "again.gguf")
    assert all(torch.equal(again.raw(name), gguf.raw(name)) for name in gguf.tensors)
    assert loaded.weight_bytes() < 0.3 * plain.weight_bytes()


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize(
    "config",
    [
        CONFIGS["gpt2"].replace(bos_id=3, eos_ids=(4,)),
        CONFIGS["llama"].replace(window=7, rope_scaling={"rope_type": "linear", "factor": 2.0}, tie_embeddings=False),
        CONFIGS["llama"].replace(qkv_bias=True, rotary_dim=8),
        CONFIGS["llama"].replace(qkv_bias=True, out_bias=True),
        CONFIGS["llama"].replace(qk_norm=True, head_dim=32, rotary_dim=32, rope_theta=5e5),
    ],
    ids=["gpt2", "llama-window-scaled-untied", "qwen2", "llama-biased", "qwen3"],
)
def test_gguf_and_back(config: GPTConfig, kind: str, tmp_path: Path) -> None:
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape)
    model.save_gguf(tmp_path / "m.gguf", kind)
    back = GPT.from_gguf(open_gguf(tmp_path / "m.gguf"), weights="fp32")
    assert back.config == config
    for (name, a), b in zip(back.named_parameters(), model.parameters(), strict=True):
        stored = a.dim() == 2 and name != "positions.weight" and kind != "F32"
        wanted = blocks.dequantize(blocks.quantize(b, kind), kind, b.shape) if stored else b
        assert torch.equal(a, wanted), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "mamba"}, "architecture among gpt2, llama, qwen2, qwen3, got 'mamba'"),
        ({"llama.block_count": "3"}, "expected llama.block_count as one number, got '3'"),
        ({"llama.block_count": 4}, r"missing blk\.3\.attn_k\.weight"),
        ({"llama.block_count": 0}, "expected n_layer a positive whole number, got 0"),
        ({"llama.attention.head_count": 0}, "head_count of at least 1, got 0"),
        ({"llama.feed_forward_length": 64}, r"to make \(128, 64\), got \(192, 64\)"),
        ({"llama.rope.scaling.type": "wild"}, r"expected llama.rope.scaling.type among none, linear, yarn, got 'wild'"),
    ],
)
def test_gguf_that_lies_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    convert.save_gguf(model_of("llama"), tmp_path / "m.gguf", metadata=change)
    with pytest.raises(ValueError, match=message):
        GPT.from_gguf(open_gguf(tmp_path / "m.gguf"))


def test_quantised_folder_is_written_as_fp32(tmp_path: Path) -> None:
    model = model_of("llama")
    model.save_folder(tmp_path / "plain")
    small = GPT.from_folder(tmp_path / "plain", weights="q8_0")
    small.save_folder(tmp_path / "again")
    back = GPT.from_folder(tmp_path / "again")
    weight = block(small, 1).mlp.down.weight
    assert isinstance(weight, QuantizedWeight) and torch.equal(block(back, 1).mlp.down.weight, weight.dequantize())


@needs_cpu
@pytest.mark.parametrize("name", CONFIGS)
def test_a_loaded_model_holds_its_float_matrices_packed_and_once(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    model.save_folder(tmp_path / "folder")
    loaded = gptfast.load(tmp_path / "folder").model
    linears = [m for m in loaded.modules() if isinstance(m, Linear)]
    assert linears and all(isinstance(m.weight, PackedWeight) for m in linears)
    assert isinstance(loaded.embedding.weight, PackedWeight) == (loaded.head is None)
    whole = all(m.out_features % 16 == 0 for m in linears) and loaded.config.vocab_size % 16 == 0
    assert not whole or loaded.weight_bytes() == model.weight_bytes()
    assert not {name for name, _ in loaded.named_parameters() if name.endswith(("qkv.weight", "up.weight"))}
    ids = text(2, 9)
    with torch.inference_mode():
        assert torch.allclose(loaded(ids), model(ids), atol=1e-4)
        alone = torch.cat([in_chunks(loaded, ids[:1], [1] * 9), in_chunks(loaded, ids[1:], [4, 5])])
        assert torch.equal(alone, loaded(ids))
    loaded.save_folder(tmp_path / "again")
    again = GPT.from_folder(tmp_path / "again")
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters(), strict=True))
    assert isinstance(block(gptfast.load(model).model, 0).attention.qkv.weight, torch.nn.Parameter), (
        "not the user's own"
    )
