"""Pre-training: next-token prediction over text in which documents don't see each other.

    loss = mean over the batch's tokens of -log p(next token)
    bits per byte = sum of -log2 p(token) / bytes of those tokens, special tokens excluded

Bits per byte don't depend on the tokenizer, so a model compares with others and with compressors (Gao et al., The Pile,
arXiv:2101.00027, section 3.1). The start of the weights is GPT-2's (Radford et al., 2019), the optimiser's settings
GPT-3's (arXiv:2005.14165, appendix B).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast.formats.tokenizer import Tokenizer
from gptfast.model import GPT
from gptfast.train.config import StageConfig, dial
from gptfast.train.packing import IGNORED, Corpus, Packed, offsets
from gptfast.train.trainer import Supervised


@dataclass(frozen=True)
class PretrainConfig(StageConfig):
    """Dials of pre-training."""

    batch_tokens: int = dial(4096, "tokens of one optimiser step", least=1)
    micro_tokens: int = dial(8192, "tokens of one forward and backward pass: less takes less memory", least=1)
    eval_tokens: int = dial(20_000, "held-out tokens of each language in an evaluation; 0 = all", least=0)
    sample_tokens: int = dial(48, "tokens of the texts that are written at each evaluation; 0 = none", least=0)


class Pretrain(Supervised):
    """Trains a GPT on a corpus.

    corpus    what it learns from: `packing.Corpus`, made with config.batch_tokens and config.seed
    heldout   by language: token ids of each document (start token first), for bits per byte
    prompts   texts that it continues at each evaluation
    """

    name = "pretrain"

    def __init__(
        self,
        config: PretrainConfig,
        model: GPT,
        tokenizer: Tokenizer,
        corpus: Corpus,
        heldout: Mapping[str, Sequence[Sequence[int]]],
        prompts: Sequence[str] = (),
    ) -> None:
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.corpus, self.heldout, self.prompts = corpus, heldout, prompts
        self.modules = {"model": model}
        self.micro_tokens = config.micro_tokens

    def batch(self, step: int) -> Packed:
        return self.corpus.batch(step)

    def loss(self, packed: Packed, count: int) -> Tensor:
        return next_token_loss(self.model, packed, count)

    def evaluate(self, step: int) -> dict[str, float]:
        last = step == self.config.steps
        found = {}
        for language, documents in self.heldout.items():
            most = 0 if last else self.config.eval_tokens
            found[f"bits_per_byte_{language}"] = bits_per_byte(self.model, self.tokenizer, documents, most)
        return found

    def samples(self, step: int) -> list[dict[str, Any]]:
        model = self.whole(self.model) if self.config.sample_tokens and self.prompts else None
        if model is None or not self.world.first:
            return []
        from gptfast.train.sampling import continuations

        return continuations(model, self.tokenizer, self.prompts, self.config.sample_tokens, self.config.seed)

    def flops_per_token(self) -> float:
        return training_flops(self.model, (min(self.model.config.context, self.config.batch_tokens) + 1) // 2)

    def export(self, folder: Path) -> None:
        from gptfast.train.sampling import save_model

        model = self.whole(self.model)
        if model is not None and self.world.first:
            save_model(model, self.tokenizer, folder / "model")


def next_token_loss(model: GPT, packed: Packed, count: int) -> Tensor:
    """Cross-entropy of the packed targets, summed and divided by count, () fp32."""
    total = model.loss(packed.ids[None], packed.targets[None], cu_seqlens=packed.cu_seqlens, reduction="sum")
    return total / count


def training_flops(model: GPT, context: int) -> float:
    """Of one token, forward and backward, that sees `context` tokens: three times the forward pass."""
    return 3.0 * model.config.flops_per_token(max(1, context))


def tokenise(tokenizer: Tokenizer, texts: Sequence[str], start: int | None) -> tuple[Tensor, Tensor]:
    """Documents as one run of token ids (N,) int32, each behind the start token, and where each begins (n + 1,)."""
    documents = encode_all(tokenizer, texts, start)
    starts = torch.tensor([0, *map(len, documents)], dtype=torch.int64).cumsum(0)
    flat = torch.cat([torch.tensor(d, dtype=torch.int32) for d in documents]) if documents else torch.empty(0).int()
    return flat, starts


def encode_all(tokenizer: Tokenizer, texts: Sequence[str], start: int | None) -> list[list[int]]:
    """Each text's ids behind the start token (None: no start token); special tokens' characters are text."""
    before = [] if start is None else [start]
    return [before + ids for ids in tokenizer.encode_all(texts)]


@torch.no_grad()
def bits_per_byte(
    model: GPT, tokenizer: Tokenizer, documents: Sequence[Sequence[int]], most_tokens: int = 0, row: int = 8192
) -> float:
    """Bits that the model needs for a byte of these documents: each token after a document's first is predicted, from
    at most the model's context; where a document is longer, a quarter of the context stands before the first token
    that counts. most_tokens: stop after so many; 0 = all."""
    context, overlap = model.config.context, max(1, model.config.context // 4)
    sequences: list[tuple[list[int], int]] = []  # tokens, how many of their targets don't count
    seen = 0
    for document in documents:
        if most_tokens and seen >= most_tokens:
            break
        ids = list(document)
        at = 0
        while at < len(ids) - 1:
            first = at if at == 0 else at - overlap
            piece = ids[first : first + context + 1]
            sequences.append((piece, at - first))
            at = first + len(piece) - 1
        seen += len(ids)
    nats, counted = 0.0, 0
    lengths = byte_lengths(tokenizer)
    for group in _groups(sequences, row):
        ids = torch.tensor([t for piece, _ in group for t in piece[:-1]])
        targets = torch.tensor([t for piece, _ in group for t in piece[1:]])
        for (_, skipped), begin in zip(group, offsets([len(p) - 1 for p, _ in group]).tolist()):
            targets[begin : begin + skipped] = IGNORED
        sizes = torch.where(targets == IGNORED, -1, lengths[targets])
        targets[sizes < 0] = IGNORED
        cu_seqlens = offsets([len(p) - 1 for p, _ in group])
        logprobs = model.logprobs(ids[None], targets[None], cu_seqlens=cu_seqlens)
        assert isinstance(logprobs, Tensor)
        nats -= float(logprobs.double().sum())
        counted += int(sizes.clamp(min=0).sum())
    return nats / math.log(2) / max(1, counted)


def byte_lengths(tokenizer: Tokenizer) -> Tensor:
    """(V,) int64: how many bytes each token stands for; -1 for special tokens."""
    sizes = [-1 if i in tokenizer.special_ids else len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
    return torch.tensor(sizes)


def _groups(sequences: Sequence[tuple[list[int], int]], most: int) -> list[list[tuple[list[int], int]]]:
    """Runs of sequences of about `most` tokens."""
    groups: list[list[tuple[list[int], int]]] = [[]]
    size = 0
    for sequence in sequences:
        if groups[-1] and size + len(sequence[0]) > most:
            groups.append([])
            size = 0
        groups[-1].append(sequence)
        size += len(sequence[0])
    return [g for g in groups if g]
