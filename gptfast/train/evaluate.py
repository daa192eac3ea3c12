"""What the recipe's stages changed, in numbers, on prompts that no stage trained on.

Answers are sampled at temperature 1 from the whole distribution, with seeds of their own. PPO's gain is told by its
reward, by a judge that had no part in it (VADER's lexicon), and by what would show a gamed reward: how far it moved in
nats, how varied the answers are, how likely the pre-trained model finds them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptfast.formats.tokenizer import Tokenizer
from gptfast.model import GPT
from gptfast.train import data
from gptfast.train.data import Message
from gptfast.train.judges import distinct, positive_share, share, vader
from gptfast.train.packing import shuffled
from gptfast.train.reward_model import read_reward, rows_of
from gptfast.train.rollout import Rollout, Samples
from gptfast.train.sampling import answers, continuations
from gptfast.train.sequences import completion_logprobs, pack_completions, row_sums
from gptfast.train.tokenizer import prompt as opened

if TYPE_CHECKING:
    from gptfast.train.recipe import Recipe

ANSWERS = 256  # sampled from each model for PPO's figures
CHATS = 128  # held-out questions of each source of chats
LONGEST = 96  # tokens of an answer to those


def evaluate(recipe: Recipe) -> dict[str, Any]:
    """All figures of the last stage, by name."""
    tokenizer = recipe.tokenizer()
    base, sft, ppo = (recipe.model(stage).eval() for stage in ("pretrain", "sft", "ppo"))
    return {
        "sft": _answers_end(recipe, sft, tokenizer),
        "ppo": _gain(recipe, base, sft, ppo, tokenizer),
        "samples": _side_by_side(recipe, base, sft, ppo, tokenizer),
    }


def _answers_end(recipe: Recipe, model: GPT, tokenizer: Tokenizer) -> dict[str, Any]:
    """How many held-out questions get an answer that ends by itself, and how many second questions, asked behind the
    first answer."""
    ended = []
    first: list[list[Message]] = []
    for source in data.default_sources("chat"):
        chats = data.chats([source], "validation")
        first += [chats[i].messages[:-1] for i in shuffled(len(chats), "questions", recipe.seed)[:CHATS]]
    rollout = Rollout(model, tokenizer)
    made = rollout([opened(tokenizer, m) for m in first], seed=recipe.seed, step=-3, max_new_tokens=LONGEST)
    ended += made.ended
    second = [
        [*question, {"role": "assistant", "content": answer}, following[-1]]
        for (question, following), answer in zip(pairwise(first), made.texts)
    ][:CHATS]
    room = model.config.context - LONGEST
    ids = [i for i in (opened(tokenizer, m) for m in second) if len(i) <= room]
    again = rollout(ids, seed=recipe.seed, step=-4, max_new_tokens=LONGEST)
    empty = sum(not text.strip() for text in made.texts)
    return {
        "ended": share(sum(ended), len(ended))._asdict(),
        "ended_second_turn": share(sum(again.ended), len(again))._asdict(),
        "empty": empty / len(made),
        "longest": LONGEST,
    }


def _gain(recipe: Recipe, base: GPT, sft: GPT, ppo: GPT, tokenizer: Tokenizer) -> dict[str, Any]:
    """The same held-out prompts answered by the fine-tuned model and by PPO's."""
    reward = read_reward(recipe.out / "reward" / "model")
    longest = int(recipe.dials["ppo"].get("max_new_tokens", 48))
    recipe.normalise(reward, sft, tokenizer, longest)
    prompts = recipe.prompts("validation")
    ids = [opened(tokenizer, prompts[i]) for i in shuffled(len(prompts), "gain", recipe.seed)[:ANSWERS]]
    judge = vader()
    found: dict[str, Any] = {}
    made: dict[str, Samples] = {}
    for name, model in (("sft", sft), ("ppo", ppo)):
        made[name] = samples = Rollout(model, tokenizer)(ids, seed=recipe.seed, step=-5, max_new_tokens=longest)
        scores = reward.rewards(samples.prompts, samples.responses)
        found[name] = {
            "score": float(scores.mean()),
            "score_std": float(scores.std()),
            "positive": positive_share(judge, samples.texts)._asdict(),
            "distinct_2": distinct(samples.texts, 2),
            "base_perplexity": perplexity(base, tokenizer, samples.texts),
            "ended": sum(samples.ended) / len(samples),
            "tokens": sum(map(len, samples.responses)) / len(samples),
        }
    before, after = found["sft"], found["ppo"]
    return found | {
        "answers": len(ids),
        "gain_in_std": (after["score"] - before["score"]) / before["score_std"],
        "gain_in_points": 100 * (after["positive"]["value"] - before["positive"]["value"]),
        "kl": _divergence(ppo, sft, made["ppo"]),
        "distinct_2_ratio": after["distinct_2"] / max(before["distinct_2"], 1e-9),
        "perplexity_ratio": after["base_perplexity"] / before["base_perplexity"],
    }


@torch.no_grad()
def _divergence(model: GPT, other: GPT, samples: Samples) -> float:
    """KL(model || other) in nats an answer, by the model's own answers."""
    total = 0.0
    for first in range(0, len(samples), 64):
        rows = range(first, min(first + 64, len(samples)))
        packed = pack_completions([samples.prompts[i] for i in rows], [samples.responses[i] for i in rows])
        apart = completion_logprobs(model, packed) - completion_logprobs(other, packed)
        total += float(row_sums(apart, [len(samples.responses[i]) for i in rows]).sum())
    return total / len(samples)


@torch.no_grad()
def perplexity(model: GPT, tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Of these texts' tokens, each text behind the start token by itself."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    sequences = [start + tokenizer.encode(text, add_bos=False) for text in texts]
    nats, count = 0.0, 0
    for packed in rows_of([s for s in sequences if len(s) > 1]):
        logprobs = model.logprobs(packed.ids[None], packed.targets[None], cu_seqlens=packed.cu_seqlens)
        assert isinstance(logprobs, Tensor)
        nats -= float(logprobs.double().sum())
        count += packed.learnt
    return math.exp(nats / max(1, count))


def _side_by_side(recipe: Recipe, base: GPT, sft: GPT, ppo: GPT, tokenizer: Tokenizer) -> list[dict[str, str]]:
    """The same question continued by the base model and answered by the other two."""
    from gptfast.train.recipe import ASKED

    rows = [(language, text) for language, texts in ASKED.items() for text in texts]
    asked = [[{"role": "user", "content": text}] for _, text in rows]
    plain = continuations(base, tokenizer, [text for _, text in rows], 40, recipe.seed)
    tuned = answers(sft, tokenizer, asked, 64, recipe.seed)
    better = answers(ppo, tokenizer, asked, 64, recipe.seed)
    return [
        {"language": language, "prompt": text, "base": b["text"], "sft": s["text"], "ppo": p["text"]}
        for (language, text), b, s, p in zip(rows, plain, tuned, better)
    ]
