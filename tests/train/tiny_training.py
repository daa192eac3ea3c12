"""A tokenizer, a corpus and a model small enough to train in a second, the same in every process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gptfast.formats.tokenizer import Tokenizer
from gptfast.model import GPT, GPTConfig
from gptfast.train.packing import Corpus
from gptfast.train.pretrain import Pretrain, PretrainConfig, encode_all, tokenise

TEXTS = [f"the cat {i} sat on the mat and said {i * 7 % 13} times hello world" for i in range(200)]


def tokenizer() -> Tokenizer:
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    fast.decoder = decoders.ByteLevel()  # pyright: ignore
    fast.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
            vocab_size=300,
            special_tokens=["<|bos|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return Tokenizer(fast, bos_id=0, add_bos=True)


def pretrain(dropout: float = 0.1, family: str = "gpt2", **dials: Any) -> Pretrain:
    """A fresh stage: two calls give the same one."""
    config = PretrainConfig(
        **{"steps": 12, "batch_tokens": 192, "micro_tokens": 64, "eval_every": 4, "save_every": 2, "warmup": 2,
           "log_every": 1, "lr": 3e-3, "sample_tokens": 4} | dials
    )  # fmt: skip
    words = tokenizer()
    tokens, starts = tokenise(words, TEXTS[:-10], words.bos_id)
    torch.manual_seed(config.seed)
    shape: dict[str, Any] = {}
    if family == "llama":
        shape = dict(norm="rms_norm", positions="rope", activation="swiglu", n_kv_head=2, tie_embeddings=False)
    model = GPT(GPTConfig(family, words.vocab_size, 2, 4, 32, 32, dropout=dropout, **shape))
    corpus = Corpus(tokens, starts, 32, config.batch_tokens, config.seed)
    return Pretrain(config, model, words, corpus, {"en": encode_all(words, TEXTS[-10:], words.bos_id)}, ["the cat"])


def trace(run: Path) -> list[tuple[str, str]]:
    """Step and loss as they were written: text, so that equal means every bit."""
    import csv

    with open(run / "train.csv", newline="", encoding="utf-8") as file:
        return [(row["step"], row["loss"]) for row in csv.DictReader(file)]
