"""From sentences with ratings to pairs, of which people liked one better."""

from __future__ import annotations

from collections.abc import Sequence

from gptfast.train.data.splits import chosen, number
from gptfast.train.data.types import Preference, Rated
from gptfast.train.logs import patiently

LEAST = 1.0  # between two means: with some twenty raters of standard deviation about 1, four standard errors
PAIRINGS = {"train": 4, "validation": 1}  # times that each sentence may be paired


def pair(sentences: Sequence[Rated], asked: Sequence[str], seed: int, times: int) -> list[Preference]:
    """Pairs whose means differ by LEAST and more: in an order drawn by hash, each sentence with the first one before it
    that is free and differs enough. `times` such orders, so a sentence stands in at most so many pairs."""
    pairs: dict[tuple[str, str], Preference] = {}
    for turn in range(times):
        free: list[Rated] = []
        ordered = sorted(sentences, key=lambda s: number(str(seed), str(turn), s.text))
        for a in patiently(ordered, "pairing sentences"):
            b = next((b for b in free if abs(a.score - b.score) >= LEAST), None)
            if b is None:
                free.append(a)
                continue
            free.remove(b)
            better, worse = (a, b) if a.score > b.score else (b, a)
            prompt = [{"role": "user", "content": chosen(asked, better.text, worse.text)}]
            margin = round(better.score - worse.score, 6)
            made = Preference(prompt, better.text, worse.text, better.language, better.source, margin)
            pairs.setdefault((better.text, worse.text), made)
    return list(pairs.values())
