"""A model with its tokenizer: text in, text out."""

from __future__ import annotations

import operator
import os
import random
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Integral, Real
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor

from gptfast.formats.tokenizer import StreamDecoder, Tokenizer
from gptfast.generate.cache import CACHE_DTYPES, KVCache
from gptfast.generate.loop import BLOCK, Limits, Loop, Row, room
from gptfast.generate.prompt_cache import PromptCache
from gptfast.generate.replay import Replays
from gptfast.generate.results import Generation, Score, Stats
from gptfast.generate.sampler import NEUTRAL, Processor, Sampler
from gptfast.generate.speculative import Drafter, speculate
from gptfast.generate.stop import NoText, Text
from gptfast.layers import Weight
from gptfast.model import GPT
from gptfast.ops.dispatch import explain
from gptfast.quantize import QuantizedWeight

SCORED_AT_ONCE = 256  # positions whose logits are in memory together
Prompt = str | Sequence[int] | Tensor
Message = Mapping[str, Any]

_process = os.getpid()


@dataclass
class Call:
    """One call's plan: its rows and where each begins."""

    loop: Loop
    rows: list[Row]
    several: bool  # the caller gets a list
    logprobs: bool
    cache: PromptCache | None
    contexts: list[list[int]]  # of each row, all tokens before the first new one
    start: Callable[[], None]
    prefill_s: float = 0.0
    decode_s: float = 0.0


class Stream(Iterator[str]):
    """The pieces of a text as it is generated. `generation` is the whole result once they are through, or so far."""

    def __init__(self, pieces: Generator[str, None, None], result: Callable[[], Generation]) -> None:
        self._pieces, self._result = pieces, result

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stops here: nothing more is generated, and a cache is free for the next call."""
        self._pieces.close()

    @property
    def generation(self) -> Generation:
        """The result so far: "interrupted" until the end is reached."""
        return self._result()


class LanguageModel:
    """A GPT and its tokenizer. Safe to use from several threads: a call owns everything that it changes.

    model      int64 (B, T) -> fp32 logits (B, T, V)
    tokenizer  None where there is none: then prompts are token ids and texts are empty
    kv_cache   the dtype of new KV caches: "fp32", "bf16", "fp16", "int8"; None = bf16 where activations are rounded to
               int8, else the model's own
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer | None = None, *, name: str = "model", kv_cache: str | None = None
    ) -> None:
        self.model, self.tokenizer, self.name, self.kv_cache = model, tokenizer, name, kv_cache
        ends = [*model.config.eos_ids, *(tokenizer.eos_ids if tokenizer is not None else ())]
        self.eos_ids = tuple(sorted(set(ends)))
        self._replays = Replays(model)

    def __repr__(self) -> str:
        return f"LanguageModel({self.name}, {self.model.config.parameters():,} parameters, context {self.context})"

    @property
    def context(self) -> int:
        """Tokens that the model can see at most, new ones included."""
        return self.model.config.context

    @property
    def cache_dtype(self) -> torch.dtype:
        """What new KV caches keep keys and values in. With queries and caches in bf16 int8 activations move SmolLM2's
        logits by a mean KL of 3.13e-3 nats, with fp32's by 3.05e-3."""
        if self.kv_cache is not None:
            return CACHE_DTYPES[self.kv_cache]
        model = self.model
        rounded = isinstance(model, GPT) and isinstance(self._head, QuantizedWeight) and model.activations != "exact"
        return torch.bfloat16 if rounded and model.dtype == torch.float32 else model.dtype

    @property
    def _head(self) -> Weight:
        return (self.model.embedding if self.model.head is None else self.model.head).weight

    @property
    def backend(self) -> str:
        """The backend that the model's matrix products run on."""
        model, weight = self.model, self._head
        row = torch.empty(1, model.config.n_embd, dtype=model.dtype, device=model.device)
        how = {"activations": model.activations or "int8"} if isinstance(weight, QuantizedWeight) else {}
        with torch.no_grad():
            return explain("linear", row, weight, backend=model.backend, **how).backend

    def generate(self, prompt: Prompt | Sequence[Prompt], **settings: Any) -> Any:
        """Continues a prompt (text or token ids), or each of a list of them. What all of them begin with, a system
        prompt for example, is computed once.

        max_new_tokens=256      None: up to the end of the context
        min_new_tokens=0        no end token, stop id or stop string before there are so many
        temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0, repetition_penalty=1.0, presence_penalty=0.0,
        frequency_penalty=0.0   as in gptfast.ops.sample; each a number or a list with one for each prompt
        logit_bias=None         {token id: bias}, or fp32 (V,)
        n=1                     continuations of each prompt, which is computed once
        seed=None               one for all (equal prompts give equal texts), or a list with one for each prompt; the
                                j-th continuation uses seed + j; None draws one, which the result reports
        stop=()                 a string, a token id, or several; the text ends before it
        ignore_eos=False        whether the model's own end tokens are tokens like others
        return_logprobs=False   True or "raw": of the model's own distribution; "processed": of the one drawn from
        processors=()           callables (history (B, L) int64 padded with -1, logits (B, V)) -> logits
        parse_special=False     whether text such as <|im_end|> in a prompt means the special token
        cache=None              a PromptCache whose tokens the prompt continues (see new_cache)
        speculation=None        "prompt-lookup", DraftModel(...) or another Drafter: the same tokens, sooner where its
                                guesses are right; for calls that write one text (gptfast.generate.speculative)
        progress=None           called with (prompt tokens computed, prompt tokens) after each chunk

        Returns a Generation, or a list of them for a list of prompts or n > 1 (the n of a prompt beside each other).
        Ctrl-C ends it with what there is. Raises ValueError for arguments that don't fit and RuntimeError where a row's
        logits leave nothing to choose.
        """
        call = self._plan(prompt, **settings)
        results = self._run(call)
        return results if call.several else results[0]

    def stream(self, prompt: Prompt, **settings: Any) -> Stream:
        """Continues one prompt and gives the text piece by piece, whole characters only; settings as in `generate`."""
        call = self._plan(prompt, **settings)
        if call.several:
            raise ValueError(f"stream: expected one prompt and n=1, got {len(call.rows)} texts to write")
        return Stream(self._pieces(call), lambda: self._results(call)[0])

    def chat(self, messages: Sequence[Message], **settings: Any) -> Any:
        """The assistant's answer to messages such as {"role": "user", "content": "Hi"}; settings as in `generate`.

        A `cache` is compared with the whole conversation, and what they share is not computed again.
        """
        return self.generate(self.chat_prompt(messages, settings), **settings)

    def stream_chat(self, messages: Sequence[Message], **settings: Any) -> Stream:
        """The assistant's answer, piece by piece."""
        return self.stream(self.chat_prompt(messages, settings), **settings)

    def chat_prompt(self, messages: Sequence[Message], settings: Mapping[str, Any] | None = None) -> list[int]:
        """The token ids that the tokenizer's template makes of messages, the assistant's turn opened.

        With a `cache` among the settings: those that it doesn't hold yet, and what it holds beyond them is forgotten.
        """
        ids = list(self._tokenizer().apply_chat_template(messages, add_generation_prompt=True))
        cache = (settings or {}).get("cache")
        if cache is None:
            return ids
        with cache.claim():
            return cache.match(ids)

    def new_cache(self, batch: int = 1, capacity: int = BLOCK) -> PromptCache:
        """An empty cache for calls that continue one another; it grows as needed."""
        return PromptCache(self._kv(batch, min(capacity, self.context)))

    @torch.no_grad()
    def score(self, text: Prompt, *, parse_special: bool = False) -> Score:
        """Log-probabilities of a text's tokens, each given those before it; in chunks, so that a text may be long.

        Raises ValueError for an empty text or one longer than the context.
        """
        _restart_threads_after_fork()
        ids = self._ids(text, parse_special, bos=True)
        self._check(ids)
        if len(ids) > self.context:
            raise ValueError(f"score: expected at most {self.context} tokens, the model's context, got {len(ids)}")
        cache = self._kv(1, len(ids))
        logprobs: list[float] = []
        tokens = torch.tensor([ids], dtype=torch.int64, device=self.model.device)
        for start in range(0, len(ids) - 1, SCORED_AT_ONCE):
            end = min(start + SCORED_AT_ONCE, len(ids) - 1)
            logits = self.model(tokens[:, start:end], cache=cache)[0]
            cache.advance(end - start)
            chosen = tokens[0, start + 1 : end + 1, None]
            logprobs += logits.log_softmax(-1).gather(1, chosen)[:, 0].tolist()
        return Score(ids, logprobs)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, as a Generation has it."""
        text = self._text(())
        for token in ids:
            text.push(token)
        text.flush()
        return str(text)

    def _plan(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int | None = 256,
        min_new_tokens: int = 0,
        n: int = 1,
        seed: int | Sequence[int] | None = None,
        stop: str | int | Sequence[str | int] = (),
        ignore_eos: bool = False,
        return_logprobs: bool | Literal["raw", "processed"] = False,
        processors: Sequence[Processor] = (),
        logit_bias: Mapping[int, float] | Tensor | None = None,
        parse_special: bool = False,
        cache: PromptCache | None = None,
        speculation: str | Drafter | None = None,
        progress: Callable[[int, int], None] | None = None,
        **parameters: Any,
    ) -> Call:
        """Checks everything at the door and lays out the rows."""
        _restart_threads_after_fork()
        prompts, listed = self._prompts(prompt, parse_special, cache)
        _at_least("n", n, 1)
        _at_least("min_new_tokens", min_new_tokens, 0)
        max_new = self.context if max_new_tokens is None else _at_least("max_new_tokens", max_new_tokens, 0)
        if return_logprobs not in (False, True, "raw", "processed"):
            raise ValueError(f"expected return_logprobs False, True, 'raw' or 'processed', got {return_logprobs!r}")
        count = len(prompts) * n
        stop_strings, stop_ids = _stops(stop, self.model.config.vocab_size)
        if cache is not None and cache.batch != count:
            raise ValueError(f"expected a cache of {count} rows, one for each text, got one of {cache.batch}")
        if cache is not None and cache.kv.config != self.model.config:
            raise ValueError("expected a cache made by this model's new_cache, got one of another model")
        held = cache.tokens if cache is not None else [[]] * count
        contexts = [h + prompts[i // n] for i, h in enumerate(held)]
        for ids in contexts:
            self._check(ids)
            if len(ids) + (max_new > 0) > self.context:
                raise ValueError(
                    f"expected fewer prompt tokens than the context of {self.context}, which holds the new ones too, "
                    f"got {len(ids)}"
                )
        seeds = _seeds(seed, len(prompts), n)
        rows = [Row(i, len(c), s, self._text(stop_strings)) for i, (c, s) in enumerate(zip(contexts, seeds))]
        ends = stop_ids | (frozenset() if ignore_eos else frozenset(self.eos_ids))
        limits = Limits(self.context, max_new, min_new_tokens, ends)
        longest = min(max(map(len, contexts)) + max_new, self.context)
        sampler = Sampler(
            seeds,
            _parameters(parameters, len(prompts), n),
            contexts,
            longest=longest,
            vocabulary=self.model.config.vocab_size,
            device=self.model.device,
            logit_bias=self._bias(logit_bias),
            forbidden_first=[t for t in sorted(ends) if t < self.model.config.vocab_size],  # a tokenizer may have more
            min_new=min_new_tokens,
            processors=processors,
            return_logprobs=return_logprobs,
            backend=self.model.backend,
        )
        sources, distinct = _distinct(contexts) if cache is None else (list(range(count)), contexts)
        capacity = room(min(longest, max(map(len, contexts)) + BLOCK), self.context, self.model.device)
        kv = self._kv(len(distinct), capacity) if cache is None else cache.kv
        loop = Loop(self.model, kv, limits, kept=cache is not None, replays=self._replays)
        loop.speculation = speculate(speculation, self.model, sampler, self._replays, contexts)

        def start() -> None:
            loop.prefill(distinct, progress)
            loop.begin(rows, sources, sampler)

        return Call(loop, rows, listed or n > 1, bool(return_logprobs), cache, contexts, start)

    def _run(self, call: Call) -> list[Generation]:
        steps = self._steps(call)
        try:
            for _ in steps:
                pass
        except KeyboardInterrupt:  # between two steps
            steps.close()
            for row in call.rows:
                row.interrupt()
        return self._results(call)

    def _pieces(self, call: Call) -> Generator[str, None, None]:
        for _ in self._steps(call):
            if call.rows[0].fresh:
                yield call.rows[0].fresh

    def _steps(self, call: Call) -> Generator[None, None, None]:
        """Runs a call step by step; at its end, however it comes, a kept cache knows its tokens."""
        if call.cache is None:
            yield from self._timed_steps(call)
            return
        with call.cache.claim():
            try:
                yield from self._timed_steps(call)
            finally:
                call.cache.tokens = [c + row.tokens for c, row in zip(call.contexts, call.rows)]

    def _timed_steps(self, call: Call) -> Generator[None, None, None]:
        """The time between two steps is the caller's own."""
        began = perf_counter()
        try:
            call.start()
            while call.loop.running:
                call.loop.step()
                if call.loop.steps == 1:
                    call.prefill_s = perf_counter() - began
                else:
                    call.decode_s += perf_counter() - began
                yield
                began = perf_counter()
        except KeyboardInterrupt:
            for row in call.rows:
                row.interrupt()
            yield
        finally:
            call.loop.close()
        if not call.loop.steps:
            call.prefill_s = perf_counter() - began

    def _results(self, call: Call) -> list[Generation]:
        new = sum(len(row.tokens) for row in call.rows)
        stats = Stats(
            prefill_s=call.prefill_s,
            decode_s=call.decode_s,
            prefill_tokens=call.loop.prefill_tokens,
            decode_tokens=max(0, new - len(call.rows)),
            cache_bytes=call.loop.cache.nbytes,
            drafted=call.loop.speculation.drafted if call.loop.speculation else 0,
            accepted=call.loop.speculation.accepted if call.loop.speculation else 0,
            peak_memory_bytes=_peak_memory(self.model.device),
        )
        return [
            Generation(
                text=str(row.text) if row.finish else str(row.text) + row.text.held,
                token_ids=row.tokens,
                finish_reason=row.finish or "interrupted",
                prompt_tokens=row.prompt_tokens,
                seed=row.seed,
                stats=stats,
                logprobs=row.logprobs if call.logprobs else None,
            )
            for row in call.rows
        ]

    def _kv(self, batch: int, capacity: int) -> KVCache:
        return KVCache(self.model.config, batch, max(1, capacity), self.cache_dtype, self.model.device)

    def _text(self, stops: Sequence[str]) -> Text:
        return Text(NoText() if self.tokenizer is None else StreamDecoder(self.tokenizer), stops)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer: expected token ids instead of text")
        return self.tokenizer

    def _prompts(self, prompt: Any, parse_special: bool, cache: PromptCache | None) -> tuple[list[list[int]], bool]:
        """Each prompt's token ids, and whether there was a list of them."""
        if isinstance(prompt, Tensor):
            prompt = prompt.tolist()
        if not hasattr(prompt, "__len__") or isinstance(prompt, Mapping):
            raise ValueError(f"expected a prompt of text or of token ids, or a list of them, got {prompt!r:.80}")
        listed = not isinstance(prompt, str) and len(prompt) > 0 and hasattr(prompt[0], "__len__")
        bos = cache is None or len(cache) == 0
        return [self._ids(p, parse_special, bos) for p in (prompt if listed else [prompt])], listed

    def _ids(self, prompt: Any, parse_special: bool, bos: bool) -> list[int]:
        if isinstance(prompt, str):
            return list(self._tokenizer().encode(prompt, parse_special=parse_special, add_bos=None if bos else False))
        try:
            return [operator.index(i) for i in prompt]
        except TypeError:
            raise ValueError(f"expected a prompt of text or of whole token ids, got {prompt!r:.80}") from None

    def _check(self, ids: list[int]) -> None:
        V = self.model.config.vocab_size
        if not ids:
            raise ValueError(
                "expected at least one prompt token, got none: this tokenizer adds no BOS token to start from"
            )
        if wrong := [i for i in (min(ids), max(ids)) if not 0 <= i < V]:
            raise ValueError(f"expected token ids from 0 to {V - 1}, got {wrong[0]}")

    def _bias(self, bias: Mapping[int, float] | Tensor | None) -> Tensor | None:
        if bias is None or isinstance(bias, Tensor):
            return bias
        if not isinstance(bias, Mapping) or not all(isinstance(x, Real) for pair in bias.items() for x in pair):
            raise ValueError(f"expected logit_bias {{token id: bias}} or a tensor (V,), got {bias!r:.80}")
        self._check(list(bias) or [0])
        dense = torch.zeros(self.model.config.vocab_size, device=self.model.device)
        for token, value in bias.items():
            dense[token] = value
        return dense


def _at_least(name: str, value: Any, least: int) -> int:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"expected {name} a whole number of at least {least}, got {value!r}")
    return value


def _stops(stop: Any, vocabulary: int) -> tuple[tuple[str, ...], frozenset[int]]:
    given = list(stop) if isinstance(stop, Sequence | Set) and not isinstance(stop, str) else [stop]
    for s in given:
        if not (0 <= s < vocabulary if isinstance(s, int) else isinstance(s, str) and s):
            raise ValueError(
                f"expected stop to hold strings that aren't empty and token ids from 0 to {vocabulary - 1}, got {s!r}"
            )
    strings = tuple(s for s in given if isinstance(s, str))
    return strings, frozenset(s for s in given if not isinstance(s, str))


def _seeds(seed: int | Sequence[int] | None, prompts: int, n: int) -> list[int]:
    """Of each row: its prompt's seed plus its number among the n. All are below 2^63."""
    if seed is None:
        seed = random.SystemRandom().randrange(2**32)
    each: list[Any] = list(seed) if isinstance(seed, Sequence) and not isinstance(seed, str) else [seed] * prompts
    if len(each) != prompts:
        raise ValueError(f"expected one seed, or one for each of {prompts} prompts, got {len(each)}")
    for s in each:
        if not isinstance(s, int) or not 0 <= s < 2**63 - n:
            raise ValueError(f"expected a seed a whole number from 0 to 2^63 - 1 - n, got {s!r}")
    return [s + j for s in each for j in range(n)]


def _parameters(given: dict[str, Any], prompts: int, n: int) -> dict[str, Any]:
    """The sampling parameters, lists spread over the rows."""
    spread: dict[str, Any] = {}
    for name, value in given.items():
        if name not in NEUTRAL:
            raise TypeError(
                f"generate has no setting {name!r}: expected one of {', '.join(NEUTRAL)} or those of its help"
            )
        if isinstance(value, Tensor):
            value = value.tolist()
        if isinstance(value, Sequence) and not isinstance(value, str):
            if len(value) != prompts:
                raise ValueError(f"expected one {name}, or one for each of {prompts} prompts, got {len(value)}")
            value = [NEUTRAL[name] if v is None else v for v in value for _ in range(n)]
        whole, value = name == "top_k", NEUTRAL[name] if value is None else value
        for v in value if isinstance(value, list) else [value]:
            if not isinstance(v, Integral if whole else Real):
                raise ValueError(f"expected {name} a {'whole ' * whole}number, or a list of them, got {v!r}")
        spread[name] = value
    return spread


def _distinct(contexts: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """For each context its place among the distinct ones, and those: equal prompts are computed once."""
    places: dict[tuple[int, ...], int] = {}
    sources = [places.setdefault(tuple(c), len(places)) for c in contexts]
    return sources, [list(c) for c in places]


def _restart_threads_after_fork() -> None:
    """In a forked child PyTorch's OpenMP threads are gone, and the first parallel op would wait for them for ever."""
    global _process
    if os.getpid() != _process:
        _process = os.getpid()
        torch.set_num_threads(1)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on this system
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
