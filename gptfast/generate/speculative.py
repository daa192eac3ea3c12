"""Speculation: cheap guesses at the next tokens, which the model then looks at in one step instead of one step each.

The text stays the same, token for token, and its log-probs bit for bit. A position's logits don't depend on how many
positions are fed together, and token number i is drawn with the random numbers of (seed, i) alone; so each position is
drawn just as plain decoding draws it, and a guess is accepted where it equals what was drawn. That holds for greedy
decoding and for every kind of sampling. It is stronger than rejection sampling, which keeps the distribution but not
the text, and accepts as often as a greedy draft can be accepted.

Only a call that writes one text speculates: the rows of a batch share each reading of the weights already.

Sources: Leviathan, Kalman and Matias, "Fast inference from transformers via speculative decoding" (arXiv:2211.17192);
Saxena, "Prompt lookup decoding" (2023, github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

import torch

from gptfast.generate.cache import KVCache
from gptfast.generate.loop import BLOCK, CHUNK, WORTH_RECORDING
from gptfast.generate.pace import Pace
from gptfast.generate.replay import Replays
from gptfast.generate.sampler import Sampler
from gptfast.generate.steps import SIZES, Steps
from gptfast.model import GPT

if TYPE_CHECKING:
    from gptfast.generate.language_model import LanguageModel

MOST = SIZES[-1] - 1  # guesses that one step can look at: it also feeds the last certain token


class Draft(Protocol):
    """The guesses for one text."""

    def accept(self, tokens: Sequence[int], /) -> None:
        """These come next in the text, whether they were proposed or not; first of all the prompt."""
        ...

    def propose(self, most: int, /) -> list[int]:
        """What may come next: at most so many tokens, or none."""
        ...

    def close(self) -> None:
        """The text ends here."""
        ...


class Drafter(Protocol):
    """A way to guess, for any number of texts."""

    def begin(self, vocabulary: int) -> Draft:
        """For a text of a model with so many tokens. Raises ValueError, one sentence, where it has others."""
        ...


class PromptLookup:
    """Guesses that the text goes on as it did after the last place that ended with the same tokens.

    max_ngram, min_ngram  how many tokens the two places have in common; the most are looked for first
    max_draft             tokens proposed at once
    """

    def __init__(self, max_ngram: int = 3, max_draft: int = MOST, *, min_ngram: int = 2) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"PromptLookup: expected 1 <= min_ngram <= max_ngram, got {min_ngram} and {max_ngram}")
        self.lengths, self.max_draft = range(max_ngram, min_ngram - 1, -1), _draft_length(max_draft)

    def begin(self, vocabulary: int) -> Draft:
        return _Lookup(self)


class _Lookup:
    """A text and its index: for each n-gram the place behind it, the last one before the text's end."""

    def __init__(self, how: PromptLookup) -> None:
        self.lengths, self.max_draft = how.lengths, how.max_draft
        self.places: list[dict[tuple[int, ...], int]] = [{} for _ in self.lengths]
        self.text: list[int] = []
        self.next: int | None = None  # the place whose token is the guess

    def accept(self, tokens: Sequence[int]) -> None:
        text = self.text
        for token in tokens:
            # A place that was right so far is kept: it has more in common with the text's end than an n-gram.
            self.next = self.next + 1 if self.next is not None and text[self.next] == token else None
            text.append(token)
            for n, places in zip(self.lengths, self.places):
                if n > len(text):
                    continue
                key = tuple(text[-n:])
                if self.next is None:
                    self.next = places.get(key)
                places[key] = len(text)

    def propose(self, most: int) -> list[int]:
        if self.next is None:
            return []
        # A guess that runs into the text's end goes on in itself: what repeats goes round.
        start, period = self.next, len(self.text) - self.next
        return [self.text[start + i % period] for i in range(min(most, self.max_draft))]

    def close(self) -> None:
        pass


class DraftModel:
    """Guesses what a smaller model would write (greedily), with a KV cache of its own for each text.

    model      a LanguageModel or a GPT with the same tokens
    max_draft  tokens proposed at once
    """

    def __init__(self, model: LanguageModel | GPT, max_draft: int = 7) -> None:
        self.model = model if isinstance(model, GPT) else model.model
        self.cache_dtype = model.dtype if isinstance(model, GPT) else model.cache_dtype
        self.max_draft, self.replays = _draft_length(max_draft), Replays(self.model)

    def begin(self, vocabulary: int) -> Draft:
        if self.model.config.vocab_size != vocabulary:
            raise ValueError(
                f"speculation: expected a draft model of {vocabulary} tokens, like the model itself, "
                f"got one of {self.model.config.vocab_size}"
            )
        return _Written(self)


class _Written:
    """What the draft model writes behind a text. Its cache holds the text's beginning and perhaps its own guesses."""

    def __init__(self, how: DraftModel) -> None:
        self.model, self.max_draft, self.context = how.model, how.max_draft, how.model.config.context
        device = self.model.device
        self.cache = KVCache(self.model.config, 1, min(BLOCK, self.context), how.cache_dtype, device)
        alone: dict[str, Any] = dict(longest=0, vocabulary=self.model.config.vocab_size, device=device)
        greedy = Sampler([0], {"temperature": 0.0}, [[]], backend=self.model.backend, **alone)
        self.steps = Steps(self.model, greedy, how.replays)
        self.text: list[int] = []
        self.guesses: list[int] = []

    def accept(self, tokens: Sequence[int]) -> None:
        if self.guesses:
            right = 0
            for guess, token in zip(self.guesses, tokens):
                if guess != token:
                    break
                right += 1
            self.cache.truncate(len(self.text) + right)
            self.guesses = []
        self.text += tokens

    @torch.no_grad()
    def propose(self, most: int) -> list[int]:
        # Every token but the last guess takes a place in the draft model's context.
        most = min(most, self.max_draft, self.context + 1 - len(self.text))
        if most < 1:
            return []
        places = len(self.text) + most - 1
        if places > self.cache.capacity:
            self.cache.grow(min(-(-places // BLOCK) * BLOCK, self.context))
        self.cache.truncate(len(self.text) - 1)  # the last token is fed, perhaps again: what follows it is asked for
        missing = self.text[int(self.cache.lengths[0]) :]
        while len(missing) > SIZES[-1]:
            chunk, missing = missing[: min(CHUNK, len(missing) - 1)], missing[min(CHUNK, len(missing) - 1) :]
            ids = torch.tensor([chunk], device=self.model.device)
            self.model(ids, cache=self.cache, last=torch.zeros(1, dtype=torch.int64, device=self.model.device))
            self.cache.advance(len(chunk))
        guesses: list[int] = []
        while len(guesses) < most:
            size = self.steps.largest(len(missing), self.cache, 0)
            *_, (guess, _) = self.steps.draw(self.cache, missing[:size], 0)
            self.steps.advance(self.cache, size)
            missing = missing[size:]
            if not missing:
                if guess < 0:  # its logits hold NaN
                    break
                guesses.append(guess)
                missing = [guess]
        self.guesses = guesses
        return list(guesses)

    def close(self) -> None:
        self.steps.close()


class Speculation:
    """The speculating steps of one call with one row."""

    most = SIZES[-1]  # tokens that a step feeds at most

    def __init__(self, how: Drafter, model: Any, sampler: Sampler, replays: Replays, prompt: Sequence[int]) -> None:
        self.vocabulary = model.config.vocab_size
        self.draft = how.begin(self.vocabulary)
        self.steps = Steps(model, sampler, replays)
        self.pace = Pace(SIZES, self.steps.seconds)
        self.drafted = self.accepted = 0
        self._prompt = list(prompt)  # until the draft has it
        self._read = 0  # new tokens that the draft has

    def step(self, cache: KVCache, tokens: list[int], left: int, take: Callable[[int, float | None], bool]) -> None:
        """Feeds the last of the new tokens with guesses at what follows, and advances the cache.

        left: tokens that may still come, at least 1, for which the cache has room
        take: is given each next token and its log-prob, and says whether more may come
        """
        if self._prompt:
            self.draft.accept(self._prompt)
            self._prompt = []
        step, begin = len(tokens), perf_counter()
        self.draft.accept(tokens[self._read :])
        self._read = step
        guesses = self.draft.propose(most) if (most := min(self.pace.wanted(MOST), left)) else []
        guessing_s = perf_counter() - begin
        size = self.pace.size(min(len(guesses) + 1, left)) if guesses else 1
        if size > 1:
            size = self.steps.largest(size, cache, step)
        fed = guesses[: size - 1]
        if wrong := [t for t in fed if not 0 <= t < self.vocabulary]:
            raise ValueError(f"speculation: expected drafts of tokens from 0 to {self.vocabulary - 1}, got {wrong[0]}")
        drawn: list[int] = []
        try:
            for token, logprob in self.steps.draw(cache, [tokens[-1], *fed], step, left >= WORTH_RECORDING):
                drawn.append(token)
                if not take(token, logprob) or guesses[len(drawn) - 1 : len(drawn)] != [token]:
                    break
        finally:
            self.steps.advance(cache, len(drawn))
            self.drafted += len(fed)
            self.accepted += min(self.pace.learn(guesses, drawn, guessing_s), len(fed))

    def close(self) -> None:
        """Gives back what other calls may use."""
        self.steps.close()
        self.draft.close()


def speculate(
    setting: str | Drafter | None, model: Any, sampler: Sampler, replays: Replays, contexts: Sequence[Sequence[int]]
) -> Speculation | None:
    """What generate's setting `speculation` means for rows with these contexts; None: they are decoded plainly.

    Raises ValueError, one sentence, where it means nothing or its drafter doesn't fit the model.
    """
    how = PromptLookup() if setting == "prompt-lookup" else setting
    if isinstance(how, str) or not (how is None or hasattr(how, "begin")):
        raise ValueError(
            f"expected speculation None, 'prompt-lookup' or a Drafter such as DraftModel(...), got {setting!r}"
        )
    return None if how is None or len(contexts) > 1 else Speculation(how, model, sampler, replays, contexts[0])


def _draft_length(n: int) -> int:
    if not 1 <= n <= MOST:
        raise ValueError(f"expected max_draft a whole number from 1 to {MOST}, got {n!r}")
    return n
