"""Prompts and answers as token ids, by the tokenizer's own chat template, and rewards that are Python callables."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

from gptfast.formats.tokenizer import Tokenizer
from gptfast.train.data.types import Message
from gptfast.train.logs import patiently
from gptfast.train.tokenizer import answer
from gptfast.train.tokenizer import prompt as opened

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
RewardFunction = Callable[[list[list[Message]], list[str]], Sequence[float]]


class Pair(Protocol):
    """An answer that was preferred to another (gptfast.train.data.Preference is one)."""

    @property
    def prompt(self) -> Any: ...
    @property
    def chosen(self) -> str: ...
    @property
    def rejected(self) -> str: ...
    @property
    def margin(self) -> float | None: ...


def messages_of(prompt: Prompt, tokenizer: Tokenizer | None = None) -> list[Message]:
    """A prompt as a conversation: plain text is the user's, and so is what token ids stand for."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if _is_ids(prompt):
        text = "" if tokenizer is None else tokenizer.decode(prompt)  # pyright: ignore[reportArgumentType]
        return [{"role": "user", "content": text}]
    return [dict(message) for message in prompt]  # pyright: ignore


def prompt_ids(prompt: Prompt, tokenizer: Tokenizer | None) -> list[int]:
    """Token ids with the assistant's turn opened. Token ids stay as they are; text is plain text where the tokenizer
    has no chat template. Raises ValueError where there is no tokenizer to encode with."""
    if not isinstance(prompt, str) and _is_ids(prompt):
        return [int(i) for i in prompt]  # pyright: ignore[reportArgumentType]
    if tokenizer is None:
        raise ValueError("expected prompts as token ids where there is no tokenizer, got text")
    if isinstance(prompt, str) and tokenizer.chat_template is None:
        return tokenizer.encode(prompt)
    return opened(tokenizer, messages_of(prompt))


def completion_ids(prompt: Prompt, text: str, tokenizer: Tokenizer, opened: Sequence[int] | None = None) -> list[int]:
    """The token ids of an assistant's answer as fine-tuning taught it to write: its text and the mark that ends its
    turn. Behind a prompt of plain ids, or without a chat template: the text's and the tokenizer's end token. opened:
    prompt_ids of the prompt, where they are known."""
    if tokenizer.chat_template is None or (not isinstance(prompt, str) and _is_ids(prompt)):
        end = tokenizer.eos_id if tokenizer.eos_id is not None else min(tokenizer.eos_ids, default=None)
        return tokenizer.encode(text, add_bos=False) + ([] if end is None else [end])
    before = prompt_ids(prompt, tokenizer) if opened is None else opened
    return answer(tokenizer, [*messages_of(prompt), {"role": "assistant", "content": text}], before)


def _is_ids(prompt: Any) -> bool:
    return len(prompt) > 0 and not hasattr(prompt[0], "keys")


def reward_function(reward: str | RewardFunction) -> RewardFunction:
    """A callable, or the one that "package.module:function" names. Raises ValueError where there is none."""
    if not isinstance(reward, str):
        if not callable(reward):
            raise ValueError(f"expected a reward as a callable or 'package.module:function', got {reward!r:.80}")
        return reward
    module, colon, name = reward.partition(":")
    if not colon or not module or not name:
        raise ValueError(f"expected a reward as 'package.module:function', got {reward!r}")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"expected a reward as 'package.module:function', got {reward!r}: {error}") from None
    if not callable(found):
        raise ValueError(f"expected {reward!r} to be callable, got {type(found).__name__}")
    return cast(RewardFunction, found)


def call_reward(reward: RewardFunction, prompts: list[list[Message]], responses: list[str]) -> list[float]:
    """What a callable says of each response. Raises ValueError where it doesn't give one finite number for each."""
    found = [float(r) for r in reward(prompts, responses)]
    if len(found) != len(responses):
        raise ValueError(f"expected {len(responses)} rewards, one for each response, got {len(found)}")
    if wrong := [r for r in found if not abs(r) < float("inf")]:
        raise ValueError(f"expected finite rewards, got {wrong[0]}")
    return found


def pair_ids(
    pairs: Sequence[Pair], tokenizer: Tokenizer, longest: int
) -> tuple[list[list[int]], list[list[int]], list[list[int]], list[float]]:
    """Prompts, chosen and rejected completions as token ids, and the margins (0 where there is none).

    Pairs of which one is longer than `longest` tokens, prompt included, are left out. Raises ValueError where none is
    left.
    """
    prompts, chosen, rejected, margins = list[list[int]](), list[list[int]](), list[list[int]](), list[float]()
    known: dict[str, list[int]] = {}  # a few prompts ask for thousands of pairs
    for pair in patiently(pairs, "reading pairs"):
        asked = repr(pair.prompt)
        if asked not in known:
            known[asked] = prompt_ids(pair.prompt, tokenizer)
        prompt = known[asked]
        both = [completion_ids(pair.prompt, text, tokenizer, prompt) for text in (pair.chosen, pair.rejected)]
        if len(prompt) + max(map(len, both)) <= longest and prompt and all(both):
            prompts.append(prompt)
            chosen.append(both[0])
            rejected.append(both[1])
            margins.append(pair.margin or 0.0)
    if not prompts:
        raise ValueError(f"expected pairs of answers within {longest} tokens, got none among {len(pairs)}")
    return prompts, chosen, rejected, margins
