"""Small things to train: a tokenizer of bytes with turns, random models, pairs that a child could tell apart."""

from __future__ import annotations

from typing import Any, NamedTuple

import tokenizers
import torch

from gptfast.formats.tokenizer import Tokenizer
from gptfast.model import GPT, GPTConfig

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")


class Preferred(NamedTuple):
    prompt: list[dict[str, str]]
    chosen: str
    rejected: str
    margin: float | None = None


def tokenizer() -> Tokenizer:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    fast = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    fast.add_special_tokens([tokenizers.AddedToken(s, special=True) for s in SPECIAL])
    return Tokenizer(fast, eos_id=fast.token_to_id("<|end|>"), chat_template=TEMPLATE)


def model(seed: int = 0, *, llama: bool = False, **changes: Any) -> GPT:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = dict(vocab_size=260, n_layer=2, n_head=2, n_embd=32, context=96)
    if llama:
        sizes |= dict(norm="rms_norm", positions="rope", activation="swiglu", n_kv_head=1, ffn_dim=64)
        sizes |= dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias", "tie_embeddings"), False)
    made = GPT(GPTConfig("llama" if llama else "gpt2", **(sizes | changes)))
    with torch.no_grad():
        for p in made.parameters():  # far enough from 0 that the distributions aren't flat
            p.add_(torch.randn_like(p) * 0.05)
    return made


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def pairs(count: int, seed: int = 0) -> list[Preferred]:
    """The chosen answer has capital letters."""
    random = torch.Generator().manual_seed(seed)

    def word(first: str) -> str:
        letters = torch.randint(6, (int(torch.randint(3, 8, (), generator=random)),), generator=random)
        return "".join(chr(ord(first) + int(i)) for i in letters)

    return [Preferred(user(word("a")), word("A"), word("a")) for _ in range(count)]


def share_of_e(prompts: list[Any], responses: list[str]) -> list[float]:
    """How much of an answer is the letter e."""
    return [r.count("e") / max(1, len(r)) for r in responses]
