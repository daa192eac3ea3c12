"""SmolLM2-135M with prompt lookup against its own plain decoding, in turns in one process.

Two answers copy most of the text they are given, but not all of it: a rewrite, which the small model does by joining
sentences here and there, and a correction of four spelling mistakes, of which it finds some. The third, a story, has
nothing to copy; it is sampled at temperature 1, since the model's greedy text goes in circles. Both ways must write the
same tokens with the same log-probs, bit for bit, before anything is timed. The prompts' keys and values are kept: only
decoding is timed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import gptfast
from gptfast import Generation, LanguageModel, hardware
from gptfast.bench import Spread, ratio, threads_set
from gptfast.bench.record import append_csv, results_file
from gptfast.bench.timing import SETTLE_S

STORY = """\
The lighthouse stood at the end of a long stone pier. Every evening, just before sunset, Martha climbed the narrow \
stairs to light the lamp. She had done so for thirty years, and her father had done it before her. In winter the waves \
reached the windows, and the whole tower shook. In summer the children of the village came to fish from the rocks and \
to hear her stories. She told them about the ship that lost its mast in the great storm, and about the captain who \
brought her a parrot from Brazil. The parrot spoke only Portuguese, and nobody in the village understood a word. One \
day a letter came from the city. It said that the lamp would be replaced by an electric one, which would need no \
keeper. Martha read the letter twice, folded it and put it in the drawer with the others. Then she climbed the stairs, \
for the sun was already low, and lit the lamp.

The next morning she walked down to the harbour. The boats had come back early, and the fishermen stood in a circle \
and talked about the weather. Old Peter asked her what she would do without the lamp. She said that she did not know \
yet, but that a tower with two hundred steps would always need somebody to sweep it. They laughed, and he gave her two \
herrings wrapped in newspaper. At noon a man in a grey suit arrived by bicycle. He carried a leather case full of \
drawings, and he measured the stairs, the windows and the lamp itself. He wrote every number into a small green book. \
Martha made tea for him, because the road from the city was long and the wind was cold. He told her that the new light \
could be seen from forty miles away, and that it would turn itself on when the sky grew dark. She asked him who would \
tell the stories. He thought about it for a while, closed the green book and said that this had not been written in \
the plan."""
MISTAKES = {"evening": "evning", "sunset": "sunsett", "village": "vilage", "bicycle": "bycicle"}


@dataclass(frozen=True)
class Workload:
    """A message, and how its answer is written."""

    name: str
    message: str
    temperature: float
    new: int  # tokens at most


def misspelled(text: str) -> str:
    for right, wrong in MISTAKES.items():
        text = text.replace(right, wrong)
    return text


CORRECT = "Correct the spelling in the following text and write out the whole corrected text"
WORKLOADS = (
    Workload("rewrite", f"Rewrite the following text, keeping every sentence:\n\n{STORY}", 0.0, 160),
    Workload("correct", f"{CORRECT}:\n\n{misspelled(STORY)}", 0.0, 160),
    Workload("story", "Write a story about a clockmaker who travels to the sea for the first time.", 1.0, 128),
)


def answer(lm: LanguageModel, w: Workload, speculation: str | None, **more: Any) -> Generation:
    options: dict[str, Any] = dict(max_new_tokens=w.new, temperature=w.temperature, seed=1)
    return lm.chat([{"role": "user", "content": w.message}], speculation=speculation, **options, **more)


def differs(lm: LanguageModel, w: Workload) -> str | None:
    """What the two ways don't agree on, or None."""
    one, other = (answer(lm, w, way, return_logprobs=True) for way in (None, "prompt-lookup"))
    names = ("token_ids", "logprobs", "text", "finish_reason")
    return next((name for name in names if getattr(one, name) != getattr(other, name)), None)


def measure(lm: LanguageModel, w: Workload, rounds: int) -> dict[str, Any]:
    """One row: tokens/s of both ways, and how many times as fast speculation is, round by round."""
    ways = (None, "prompt-lookup")
    caches = {way: lm.new_cache() for way in ways}
    for way in ways:
        answer(lm, w, way, cache=caches[way])  # computes the prompt, and steps of every size are recorded
    runs: dict[str | None, list[Generation]] = {way: [] for way in ways}
    for i in range(rounds):
        for way in ways if i % 2 == 0 else ways[::-1]:
            time.sleep(SETTLE_S)
            runs[way].append(answer(lm, w, way, cache=caches[way]))
    plain, quick = ([run.stats.decode_s for run in runs[way]] for way in ways)
    over, steps = ratio(plain, quick), len(runs[None][0].token_ids) - 1
    drafted, accepted = (sum(getattr(run.stats, name) for run in runs[ways[1]]) for name in ("drafted", "accepted"))
    return {
        "workload": w.name,
        "temperature": w.temperature,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "prompt_tokens": runs[None][0].prompt_tokens,
        "new_tokens": steps + 1,
        "plain_tokens_per_s": round(steps / Spread.of(plain).median, 1),
        "tokens_per_s": round(steps / Spread.of(quick).median, 1),
        "over_plain": round(over.median, 3),
        "over_plain_low": round(over.low, 3),
        "over_plain_high": round(over.high, 3),
        "drafted": round(drafted / rounds, 1),
        "accepted": round(accepted / rounds, 1),
    }


def show(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    headings = ("prompt", "tokens", "plain tok/s", "prompt lookup tok/s", "times", "quartiles", "guesses", "right")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "prompt" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            *(row["workload"], f"{row['prompt_tokens']} + {row['new_tokens']}", f"{row['plain_tokens_per_s']:.1f}"),
            *(f"{row['tokens_per_s']:.1f}", f"{row['over_plain']:.2f}x"),
            f"{row['over_plain_low']:.2f}-{row['over_plain_high']:.2f}",
            *(f"{row['drafted']:.0f}", f"{row['accepted']:.0f}"),
        )
    Console(width=120).print(table)


def main(argv: Sequence[str] = ()) -> int:
    """Returns 0; 1 if the two ways wrote different texts: then nothing is timed."""
    p = argparse.ArgumentParser(prog="python -m benchmarks speculation", description=__doc__)
    p.add_argument("--rounds", type=int, default=30)
    p.add_argument("--quick", action="store_true", help="3 rounds")
    p.add_argument("--only", choices=[w.name for w in WORKLOADS], help="one of the prompts")
    p.add_argument("--threads", type=int)
    args = p.parse_args(argv)
    rows: list[dict[str, Any]] = []
    with threads_set(args.threads):
        lm = gptfast.load("smollm2")
        for w in WORKLOADS:
            if args.only not in (None, w.name):
                continue
            print(f"SmolLM2-135M, {w.name} ...", file=sys.stderr, flush=True)
            if (what := differs(lm, w)) is not None:
                print(f"{w.name}: speculation and plain decoding have other {what}", file=sys.stderr)
                return 1
            rows.append(measure(lm, w, 3 if args.quick else args.rounds))
        show(rows, f"SmolLM2-135M, {hardware.machine().cpu}, {torch.get_num_threads()} threads")
    append_csv(results_file("speculation"), rows)
    return 0
