"""A tokenizer, a corpus and a model small enough to train in a second, the same in every process."""

from __future__ import annotations

import copy
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gptfast.formats.chat import CHATML
from gptfast.formats.tokenizer import Tokenizer
from gptfast.model import GPT, GPTConfig
from gptfast.train.data import Chat, Preference
from gptfast.train.dpo import DPO, DPOConfig
from gptfast.train.grpo import GRPO, GRPOConfig
from gptfast.train.lora import LoRAConfig, add_lora
from gptfast.train.packing import Corpus
from gptfast.train.ppo import PPO, PPOConfig
from gptfast.train.pretrain import Pretrain, PretrainConfig, encode_all, tokenise
from gptfast.train.ranked import Answer, Ranked, RankedConfig
from gptfast.train.reward import Reward, RewardConfig
from gptfast.train.reward_model import RewardEnsemble, RewardModel
from gptfast.train.sft import SFT, SFTConfig
from gptfast.train.trainer import Stage

TIMES = ("seconds", "tokens_per_s", "mfu")
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
    with open(run / "train.csv", newline="", encoding="utf-8") as file:
        return [(row["step"], row["loss"]) for row in csv.DictReader(file)]


ASK = [{"role": "user", "content": "say hello"}]


def chatting(words: Tokenizer, dropout: float) -> GPT:
    torch.manual_seed(4)
    return GPT(GPTConfig("llama", words.vocab_size, 2, 4, 32, 128, norm="rms_norm", positions="rope", n_kv_head=2,
                         activation="swiglu", eos_ids=(1,), dropout=dropout))  # fmt: skip


def lengths(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def stage(name: str, dropout: float = 0.1, **dials: Any) -> Stage:
    """A fresh stage of any kind: two calls give the same."""
    if name == "pretrain":
        return pretrain(dropout, **dials)
    words = tokenizer()
    words.chat_template = CHATML
    texts = [f"the cat {i} sat " + "on the mat " * (i % 5) for i in range(24)]
    chats = [Chat([*ASK, {"role": "assistant", "content": text}], "en", "x") for text in texts]
    pairs = [Preference(ASK, a, b, "en", "x", 1.0) for a, b in zip(texts[::2], texts[1::2])]
    model = chatting(words, dropout)

    def given(**own: Any) -> dict[str, Any]:
        return {"lr": 1e-3, "warmup": 0} | own | dials

    if name == "sft":
        return SFT(SFTConfig(**given(batch_size=8, sample_tokens=4)), model, words, chats, chats[:4], [ASK])
    if name == "reward":
        return Reward(RewardConfig(**given(batch_size=6)), RewardModel(model), words, pairs, pairs[:4])
    if name == "ranked":
        answers = [Answer(ASK, text, float(i % 7)) for i, text in enumerate(texts)]
        both = [RewardModel(backbone, i, neighbours=40) for i, backbone in enumerate((model, copy.deepcopy(model)))]
        config = RankedConfig(**given(batch_size=12, fragments=0.4))
        return Ranked(config, RewardEnsemble(both), words, answers, pairs[:4])
    if name.startswith("dpo"):
        if name == "dpo with adapters":
            add_lora(model, LoRAConfig(rank=2, dropout=0.1))
        return DPO(DPOConfig(**given(batch_size=6)), model, words, pairs, pairs[:4])
    online: dict[str, Any] = dict(max_new_tokens=12, minibatches=2, eval_prompts=2)
    prompts = [ASK, [{"role": "user", "content": "the cat"}]]
    if name == "ppo":  # a beta that moves, so that it has to be kept
        online |= dict(prompts_per_step=8, epochs=1, target_kl=0.01, kl_horizon=50)
        return PPO(PPOConfig(**given(**online)), model, words, prompts, lengths, heldout=prompts)
    online |= dict(prompts_per_step=2, samples_per_prompt=4)
    return GRPO(GRPOConfig(**given(**online)), model, words, prompts, lengths, heldout=prompts)


def figures(run: Path) -> list[dict[str, str]]:
    """Every figure of every step as it was written, but for how long it took."""
    with open(run / "train.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{n: v for n, v in row.items() if n not in TIMES and not n.startswith("time/")} for row in rows]
