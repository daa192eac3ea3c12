"""Supervised fine-tuning: a model that continues text learns to answer in turns.

    loss = sum over the assistant's tokens of -log p(token) / how many of them the whole batch has

The assistant's text and its end mark are learnt, nothing else: not the start token, the roles' marks, or what system
and user say. The loss is divided by the number of these tokens in the whole batch, over all processes and
micro-batches, so that a token counts the same wherever it stands. (Ouyang et al., arXiv:2203.02155, section 3.5.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast.formats.tokenizer import Tokenizer
from gptfast.model import GPT
from gptfast.train.config import StageConfig, dial
from gptfast.train.data import Chat, Message
from gptfast.train.logs import patiently
from gptfast.train.packing import Order, Packed, pack
from gptfast.train.pretrain import next_token_loss, training_flops
from gptfast.train.sampling import answers, save_model
from gptfast.train.tokenizer import conversation
from gptfast.train.trainer import Supervised


@dataclass(frozen=True)
class SFTConfig(StageConfig):
    """Dials of supervised fine-tuning."""

    lr: float = dial(3e-4, "learning rate at its highest", least=0)
    batch_size: int = dial(32, "conversations of one optimiser step", least=1)
    micro_tokens: int = dial(8192, "tokens of one forward and backward pass: less takes less memory", least=1)
    sample_tokens: int = dial(64, "the longest answer that is written at an evaluation; 0 = none", least=0)


class SFT(Supervised):
    """Fine-tunes a GPT on conversations.

    chats     what it learns from; each has at least one message of the assistant
    heldout   conversations for the loss that is reported
    prompts   conversations, ending with the user, that it answers at each evaluation
    """

    name = "sft"

    def __init__(
        self,
        config: SFTConfig,
        model: GPT,
        tokenizer: Tokenizer,
        chats: Sequence[Chat],
        heldout: Sequence[Chat] = (),
        prompts: Sequence[Sequence[Message]] = (),
    ) -> None:
        self.config, self.model, self.tokenizer, self.prompts = config, model, tokenizer, prompts
        self.modules = {"model": model}
        self.micro_tokens = config.micro_tokens
        self.examples = examples(tokenizer, chats, model.config.context)
        self.heldout = {
            language: examples(tokenizer, [c for c in heldout if c.language == language], model.config.context)
            for language in sorted({c.language for c in heldout})
        }
        if not self.examples:
            raise ValueError(
                f"sft: expected conversations with an answer within {model.config.context} tokens, got none among "
                f"{len(chats)}"
            )
        self.order = Order(len(self.examples), config.seed, "sft")

    def batch(self, step: int) -> Packed:
        chosen = [self.examples[i] for i in self.order.batch(step, self.config.batch_size)]
        return pack([ids for ids, _ in chosen], [mask for _, mask in chosen])

    def loss(self, packed: Packed, count: int) -> Tensor:
        return next_token_loss(self.model, packed, count)

    def evaluate(self, step: int) -> dict[str, float]:
        return {f"loss_{language}": mean_loss(self.model, held) for language, held in self.heldout.items() if held}

    def samples(self, step: int) -> list[dict[str, Any]]:
        model = self.whole(self.model) if self.config.sample_tokens and self.prompts else None
        if model is None or not self.world.first:
            return []
        return answers(model, self.tokenizer, self.prompts, self.config.sample_tokens, self.config.seed)

    def flops_per_token(self) -> float:
        tokens = sum(len(ids) for ids, _ in self.examples)
        return training_flops(self.model, tokens // len(self.examples) // 2)

    def export(self, folder: Path) -> None:
        model = self.whole(self.model)
        if model is not None and self.world.first:
            save_model(model, self.tokenizer, folder / "model")


def examples(tokenizer: Tokenizer, chats: Sequence[Chat], context: int) -> list[tuple[list[int], list[bool]]]:
    """Each conversation's ids and which of them are learnt, cut at the context; those with nothing to learn are out."""
    found = []
    for chat in patiently(chats, "reading conversations"):
        ids, mask = conversation(tokenizer, chat.messages)
        ids, mask = ids[:context], mask[:context]
        if any(mask):
            found.append((ids, mask))
    return found


@torch.no_grad()
def mean_loss(model: GPT, held: Sequence[tuple[list[int], list[bool]]], row: int = 8192) -> float:
    """Nats a token that is learnt, over all of these."""
    nats, count = 0.0, 0
    at = 0
    while at < len(held):
        group = [held[at]]
        while at + len(group) < len(held) and sum(len(ids) for ids, _ in group) < row:
            group.append(held[at + len(group)])
        at += len(group)
        packed = pack([ids for ids, _ in group], [mask for _, mask in group])
        nats += float(next_token_loss(model, packed, 1))
        count += packed.learnt
    return nats / max(1, count)
