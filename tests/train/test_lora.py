"""Adapters: that they are the formula, train over float and quantised weights, merge, and are PEFT's on disk."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptfast import ops
from gptfast.formats.files import FormatError
from gptfast.layers import Linear
from gptfast.model import GPT, GPTConfig
from gptfast.quantize import QuantizedWeight
from gptfast.train import AdamW
from gptfast.train.lora import (
    TARGETS,
    LoRAConfig,
    LoRALinear,
    adapted,
    add_lora,
    disabled,
    load_adapter,
    lora_parameters,
    merge_lora,
    merged_copy,
    save_adapter,
)

COMMON: dict[str, Any] = dict(vocab_size=97, n_layer=2, n_embd=64, n_head=4, context=64)
CONFIGS = {
    "gpt2": GPTConfig("gpt2", **COMMON, bos_id=0, eos_ids=(1,)),
    "llama": GPTConfig(
        "llama", **COMMON, n_kv_head=2, norm="rms_norm", positions="rope", activation="swiglu", ffn_dim=96,
        qkv_bias=False, out_bias=False, mlp_bias=False, bos_id=0, eos_ids=(1,),
    ),
}  # fmt: skip


def make(family: str = "llama", kind: str | None = None, dtype: torch.dtype | None = None) -> GPT:
    torch.manual_seed(1)
    model = GPT(CONFIGS[family], dtype=dtype)
    for module in model.modules():
        if isinstance(module, Linear):
            torch.nn.init.normal_(module.weight, std=0.2)  # pyright: ignore[reportArgumentType]
            if kind is not None:
                module.set_weight(QuantizedWeight.quantize(module.weight.detach(), kind))  # pyright: ignore
    if kind is not None:
        model.embedding.set_weight(QuantizedWeight.quantize(model.embedding.weight.detach(), kind))  # pyright: ignore
    return model


def shaken(model: GPT) -> GPT:
    """The model with adapters that add something."""
    torch.manual_seed(3)
    for name, parameter in lora_parameters(model).items():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def batch(B: int = 2, T: int = 11) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 97, (B, T + 1), generator=torch.Generator().manual_seed(2))
    return ids[:, :-1], ids[:, 1:]


def dense(model: GPT) -> GPT:
    """The same model in fp64 with plain weights, adapters kept: autograd alone differentiates it."""
    made = copy.deepcopy(model)
    for module in made.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, QuantizedWeight):
            module.set_weight(weight.dequantize())  # pyright: ignore[reportCallIssue]
    made = made.double()
    made.backend = "reference"
    for parameter in made.parameters():
        parameter.requires_grad_(True)
    return made


@pytest.mark.parametrize("rslora", [False, True])
def test_the_formula_part_by_part(rslora: bool) -> None:
    model = shaken(add_lora(make(), LoRAConfig(rank=4, alpha=8, rslora=rslora)))
    layer = model.blocks[0].attention.qkv  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(layer, LoRALinear) and layer.parts == (64, 32, 32)
    x = torch.randn(5, 64)
    scale = 8 / (2 if rslora else 4)
    wanted, row = x @ layer.weight.T, 0  # pyright: ignore[reportOperatorIssue,reportAttributeAccessIssue]
    for i, rows in enumerate(layer.parts):
        A, B = layer.lora_A[4 * i : 4 * i + 4], layer.lora_B[row : row + rows]
        wanted[:, row : row + rows] += scale * x @ A.T @ B.T
        row += rows
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [None, "q4_1", "q8_0"])
@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_are_those_of_the_dense_model(family: str, kind: str | None) -> None:
    model = shaken(add_lora(make(family, kind), LoRAConfig(rank=3)))
    double = dense(model)
    ids, targets = batch()
    model.loss(ids, targets).backward()
    double.loss(ids, targets).backward()
    wanted = lora_parameters(double)
    for name, parameter in lora_parameters(model).items():
        exact = wanted[name].grad
        assert parameter.grad is not None and exact is not None
        torch.testing.assert_close(parameter.grad.double(), exact, rtol=1e-3, atol=1e-5)
        assert exact.abs().max() > 1e-4, "a gradient that could be missed"
    frozen = [n for n, p in model.named_parameters() if p.grad is not None and "lora" not in n]
    assert not frozen


@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_a_frozen_weight_passes_gradients_on(activations: str) -> None:
    weight = QuantizedWeight.quantize(torch.randn(40, 96), "q4_1")
    x, bias = torch.randn(2, 3, 96, requires_grad=True), torch.randn(40, requires_grad=True)
    y = ops.linear(x, weight, bias, activations=activations)
    with torch.no_grad():
        assert torch.equal(y, ops.linear(x, weight, bias, activations=activations)), "the same bits without gradients"
    dy = torch.randn_like(y)
    dx, dbias = torch.autograd.grad(y, (x, bias), dy)
    torch.testing.assert_close(dx, dy @ weight.dequantize(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dbias, dy.sum((0, 1)), rtol=1e-5, atol=1e-5)


def test_fresh_adapters_change_nothing_and_the_base_stays() -> None:
    model = make(kind="q4_1")
    ids, targets = batch()
    model.activations = "exact"
    before = model(ids)
    add_lora(model, LoRAConfig(rank=2), seed=5)
    assert torch.equal(model(ids), before)
    again = add_lora(make(kind="q4_1"), LoRAConfig(rank=2), seed=5)
    assert all(torch.equal(p, q) for p, q in zip(lora_parameters(model).values(), lora_parameters(again).values()))
    parameters = lora_parameters(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(parameters)
    optimizer, losses = AdamW(list(parameters.values()), lr=1e-2), []
    for _ in range(12):
        loss = model.loss(ids, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    with disabled(model):
        assert torch.equal(model(ids), before)
        with disabled(model):
            pass
        assert torch.equal(model(ids), before), "an inner block's end isn't the outer one's"
    assert not torch.allclose(model(ids), before, atol=1e-2)


def test_bf16_weights_stay_and_adapters_are_fp32() -> None:
    model = add_lora(make(dtype=torch.bfloat16), LoRAConfig(rank=2))
    ids, targets = batch()
    model.loss(ids, targets).backward()
    for name, parameter in lora_parameters(model).items():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None and (name.endswith("lora_A") or parameter.grad.abs().max() > 0)
    assert model.hidden(ids).dtype == torch.bfloat16


def test_dropout_is_of_the_seed_and_for_training_alone() -> None:
    model = shaken(add_lora(make(), LoRAConfig(rank=4, dropout=0.5)))
    ids, _ = batch()
    assert torch.equal(model.eval()(ids), model(ids))
    model.train()
    torch.manual_seed(9)
    first, second = model(ids), model(ids)
    torch.manual_seed(9)
    assert torch.equal(model(ids), first) and not torch.equal(first, second)
    layer = next(iter(adapted(model).values()))
    x = torch.randn(64, 64)
    mean = torch.stack([layer.delta(x) for _ in range(400)]).mean(0)
    wanted = layer.eval().delta(x)
    assert (mean - wanted).abs().max() < 0.3 * wanted.std() + 0.1 * wanted.abs().max(), "expected value: no dropout's"


@pytest.mark.parametrize("kind", [None, "q4_1"])
@pytest.mark.parametrize("family", CONFIGS)
def test_merging(family: str, kind: str | None) -> None:
    model = shaken(add_lora(make(family, kind), LoRAConfig(rank=4, targets=("attention.qkv", "mlp.down"))))
    ids, _ = batch()
    wanted = model(ids)
    copied = merged_copy(model)
    assert not adapted(copied) and len(adapted(model)) == 4
    torch.testing.assert_close(copied(ids), wanted, rtol=1e-4, atol=1e-4)
    assert copied.embedding.weight is model.embedding.weight and torch.equal(model(ids), wanted)
    merge_lora(model)
    assert not adapted(model) and not any(isinstance(m, LoRALinear) for m in model.modules())
    torch.testing.assert_close(model(ids), wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="expected a model with adapters"):
        merge_lora(model)


@pytest.mark.parametrize("family", CONFIGS)
def test_saved_adapters_come_back(family: str, tmp_path: Path) -> None:
    config = LoRAConfig(rank=3, alpha=7, dropout=0.1, rslora=True, targets=("attention.out", "mlp.up"))
    model = shaken(add_lora(make(family), config)).eval()
    save_adapter(model, tmp_path / "a")
    other = load_adapter(make(family), tmp_path / "a").eval()
    assert torch.equal(other(batch()[0]), model(batch()[0]))
    assert {layer.config for layer in adapted(other).values()} == {config}
    load_adapter(other, tmp_path / "a")  # into adapters of the same kind
    with pytest.raises(ValueError, match="expected the model's own"):
        load_adapter(add_lora(make(family), LoRAConfig(rank=2)), tmp_path / "a")


@pytest.mark.parametrize("family", CONFIGS)
def test_peft_computes_the_same(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    make(family).save_folder(tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    model = shaken(add_lora(make(family), LoRAConfig(rank=4))).eval()
    save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    ids, _ = batch()
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(wrapped(ids).logits, model(ids), rtol=1e-4, atol=1e-4)
    wrapped.save_pretrained(tmp_path / "back")
    back = load_adapter(make(family), tmp_path / "back")
    assert torch.equal(back(ids), model(ids))


def test_peft_files_of_some_projections(tmp_path: Path) -> None:
    """An adapter of q and v alone: k's stays zero, in training too."""
    from safetensors.torch import load_file, save_file

    model = shaken(add_lora(make(), LoRAConfig(rank=2, targets=("attention.qkv",))))
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"].shape == (32, 2)
    save_file({n: t for n, t in tensors.items() if "k_proj" not in n}, tmp_path / "adapter_model.safetensors")
    loaded = load_adapter(make(), tmp_path)
    loaded.loss(*batch()).backward()
    for name, parameter in lora_parameters(loaded).items():
        rows = slice(2, 4) if name.endswith("lora_A") else slice(64, 96)
        assert parameter.grad is not None and parameter.grad[rows].abs().max() == 0 and parameter[rows].abs().max() == 0
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(peft_type="IA3"), "expected peft_type 'LORA', got 'IA3'"),
        (dict(use_dora=True), "expected use_dora False, got True"),
        (dict(rank_pattern={"q_proj": 8}), "expected rank_pattern {}"),
        (dict(r=0), "expected rank a positive whole number, got 0"),
        (dict(r="8"), "expected r, lora_alpha and lora_dropout as numbers"),
        (dict(r=5), "of (5, 96) floats"),
    ],
)
def test_files_that_ask_for_something_else(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    save_adapter(add_lora(make(), LoRAConfig(rank=4)), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(FormatError) as caught:
        load_adapter(make(), tmp_path)
    assert message in str(caught.value)


def test_a_refused_file_leaves_the_model_alone(tmp_path: Path) -> None:
    save_adapter(add_lora(make("gpt2"), LoRAConfig(rank=4)), tmp_path)
    model = make("llama")
    with pytest.raises(FormatError, match="got none of them"):
        load_adapter(model, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x80\x04junk")
    with pytest.raises(FormatError, match="expected a safetensors file"):
        load_adapter(model, tmp_path)
    save_adapter(add_lora(make("llama"), LoRAConfig(rank=4)), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 5}))
    with pytest.raises(FormatError):
        load_adapter(model, tmp_path)
    assert not adapted(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank=0), "rank a positive whole number, got 0"),
        (dict(alpha=0.0), "alpha a positive number, got 0.0"),
        (dict(dropout=1.0), "0 <= dropout < 1, got 1.0"),
        (dict(targets=("attention.q",)), f"targets among {', '.join(TARGETS)}, got attention.q"),
        (dict(targets=()), "got none"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        LoRAConfig(**options)
    assert message in str(caught.value)
    with pytest.raises(ValueError, match="without adapters, got one with"):
        add_lora(add_lora(make()))
