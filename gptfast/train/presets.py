"""Recipes by name: the model, the tokenizer and every stage's dials.

`tiny` is meant to end within 15 minutes on two cores. What its numbers were chosen by stands in LOG.md. `taste` shows
every stage at work within two minutes, on texts that pip alone brings: its model talks nonsense. The
others are published models with their published settings, to plan with (`gptfast plan`) or to run where that is
possible.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gptfast.model.config import GPTConfig
from gptfast.model.presets import PRESETS as MODELS


@dataclass(frozen=True)
class RecipePreset:
    """The model without its vocabulary's size, what the reward model has otherwise, and each stage's dials by name.

    reward_members     reward models whose mean is the reward
    reward_neighbours  entries of each one's table for neighbouring tokens; 0: none
    texts              sources that pre-training reads and is measured on; none: the defaults
    """

    model: dict[str, Any]
    vocab_size: int
    sample_bytes: int  # of each language, that the tokenizer is trained on
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    reward_model: dict[str, Any] = field(default_factory=dict)
    reward_members: int = 1
    reward_neighbours: int = 0
    texts: tuple[str, ...] = ()

    def config(
        self, vocab_size: int, bos_id: int | None, eos_ids: tuple[int, ...], changes: dict[str, Any] | None = None
    ) -> GPTConfig:
        """The model for a tokenizer."""
        return GPTConfig(vocab_size=vocab_size, bos_id=bos_id, eos_ids=eos_ids, **(self.model | (changes or {})))


def _llama(n_layer: int, n_embd: int, n_head: int, ffn_dim: int, context: int, **more: Any) -> dict[str, Any]:
    return dict(
        family="llama", n_layer=n_layer, n_embd=n_embd, n_head=n_head, ffn_dim=ffn_dim, context=context,
        norm="rms_norm", positions="rope", activation="swiglu", qkv_bias=False, out_bias=False, mlp_bias=False,
    ) | more  # fmt: skip


def _published(name: str, lr: float, batch_tokens: int, steps: int) -> RecipePreset:
    """A GPT of Brown et al. (arXiv:2005.14165), table 2.1: its learning rate and batch, for 300 billion tokens."""
    config = MODELS[name]
    model = dict(
        family=config.family, n_layer=config.n_layer, n_embd=config.n_embd, n_head=config.n_head, context=config.context
    )
    dials = dict(lr=lr, batch_tokens=batch_tokens, steps=steps, warmup=min(2000, steps // 100), eval_every=1000)
    return RecipePreset(model, config.vocab_size, 64 << 20, {"pretrain": dials | {"save_every": 1000}})


PRESETS = {
    "tiny": RecipePreset(
        _llama(4, 192, 3, 512, 256),
        12288,
        2 << 20,
        {
            "pretrain": dict(
                steps=900, batch_tokens=1024, lr=3e-3, warmup=40, eval_every=250, save_every=250, eval_tokens=8000
            ),
            "sft": dict(steps=330, batch_size=24, lr=1.5e-3, warmup=20, eval_every=125, save_every=125),
            "reward": dict(
                steps=400,
                batch_size=64,
                lr=3e-3,
                warmup=20,
                beta2=0.99,
                hidden_tokens=0.15,
                fragments=0.3,
                min_lr=0.05,
                eval_every=100,
                save_every=200,
            ),
            "ppo": dict(
                steps=27,
                prompts_per_step=128,
                max_new_tokens=40,
                lr=2e-4,
                epochs=3,
                minibatches=4,
                beta=0.11,
                caution=1.0,
                eval_every=9,
                save_every=9,
                eval_prompts=48,
            ),
        },
        # Small, and from random weights: it learns which words people like sooner than the language model's last
        # token learns to look back at them (LOG.md).
        dict(n_layer=1, n_head=2, n_embd=128, ffn_dim=256, dropout=0.3),
        reward_members=3,
        reward_neighbours=1 << 16,
    ),
    "taste": RecipePreset(
        _llama(2, 128, 2, 344, 256),
        4096,
        1 << 20,
        {
            "pretrain": dict(
                steps=160, batch_tokens=1024, lr=4e-3, warmup=20, eval_every=80, save_every=160, eval_tokens=8000
            ),
            "sft": dict(steps=100, batch_size=16, lr=2e-3, warmup=10, eval_every=50, save_every=100),
            "reward": dict(
                steps=120, batch_size=48, lr=4e-3, warmup=10, beta2=0.99, min_lr=0.05, eval_every=60, save_every=120
            ),
            "ppo": dict(
                steps=8,
                prompts_per_step=48,
                max_new_tokens=24,
                lr=4e-4,
                epochs=3,
                minibatches=4,
                beta=0.05,
                eval_every=8,
                save_every=8,
                eval_prompts=24,
            ),
        },
        dict(n_layer=1, n_head=1, n_embd=64, ffn_dim=128, dropout=0.2),
        reward_neighbours=1 << 15,
        texts=("wikipedia", "dpo-zh"),
    ),
    # nanoGPT's settings for GPT-2 124M: half a million tokens a step, 6e-4, 300 billion tokens.
    "gpt2-124m": _published("gpt2-124m", 6e-4, 491_520, 600_000),
    "gpt3-125m": _published("gpt3-125m", 6e-4, 500_000, 600_000),
    "gpt3-350m": _published("gpt3-350m", 3e-4, 500_000, 600_000),
    "gpt3-760m": _published("gpt3-760m", 2.5e-4, 500_000, 600_000),
    "gpt3-1.3b": _published("gpt3-1.3b", 2e-4, 1_000_000, 300_000),
    "gpt3-2.7b": _published("gpt3-2.7b", 1.6e-4, 1_000_000, 300_000),
    "gpt3-6.7b": _published("gpt3-6.7b", 1.2e-4, 2_000_000, 150_000),
    "gpt3-13b": _published("gpt3-13b", 1e-4, 2_000_000, 150_000),
    "gpt3-175b": _published("gpt3-175b", 0.6e-4, 3_200_000, 93_750),
}


def recipe_preset(name: str) -> RecipePreset:
    """The preset of this name. Raises ValueError that lists the names."""
    if name not in PRESETS:
        raise ValueError(f"expected a preset among {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
