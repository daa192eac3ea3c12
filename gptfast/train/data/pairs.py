"""From sentences with ratings to pairs, of which people liked one better."""

from __future__ import annotations

from collections.abc import Sequence

from gptfast.train.data.splits import chosen, number
from gptfast.train.data.types import Preference, Rated

LEAST = 1.0  # between two means: with some twenty raters of standard deviation about 1, four standard errors
PAIRINGS = {"train": 4, "validation": 1}  # times that each sentence may be paired


def pair(sentences: Sequence[Rated], asked: Sequence[str], seed: int, times: int) -> list[Preference]:
    """Neighbours in an order drawn by hash, where their means differ by LEAST and more; `times` such orders."""
    pairs: dict[tuple[str, str], Preference] = {}
    for turn in range(times):
        order = sorted(sentences, key=lambda s: number(str(seed), str(turn), s.text))
        for a, b in zip(order[::2], order[1::2]):
            better, worse = (a, b) if a.score > b.score else (b, a)
            margin = round(better.score - worse.score, 6)
            if margin >= LEAST:
                prompt = [{"role": "user", "content": chosen(asked, better.text, worse.text)}]
                made = Preference(prompt, better.text, worse.text, better.language, better.source, margin)
                pairs.setdefault((better.text, worse.text), made)
    return list(pairs.values())
