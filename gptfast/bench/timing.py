"""Interleaved timing. A machine's speed drifts by more than most differences that matter, so rivals take turns: every
round times each of them once, and a ratio is the median of the rounds' own ratios.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

MIN_SAMPLE_S = 3e-3  # a sample repeats its call until it takes this long: the clock and one interruption don't show
# Untimed before each sample: after the pause below the cores' clock is down and weights have left the caches, for every
# contender: a short call needs 20 to 40 ms to be as fast as in a running model. Figures: LOG.md, "A pause's shadow".
WARM_S = 40e-3
# Asleep between contenders. Idle threads of OpenMP spin for some milliseconds after their work, ours for 0.1: without
# the pause they spin on the cores that the next contender wants. Figures: LOG.md, "idle threads that spin". For up to
# 40 ms after ours they don't spin at all (kernels/cpu/openmp.h): PyTorch is timed as it is without us.
SETTLE_S = 50e-3


@dataclass(frozen=True)
class Spread:
    """The median of some samples, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Of at least one sample."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int = 20,
    *,
    min_sample_s: float = MIN_SAMPLE_S,
    warm_s: float = WARM_S,
    settle_s: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds per call of each contender, one sample a round; sample i of all of them is from round i.

    A sample is: pause, untimed calls for `warm_s` and at least one (they wake the threads, fill the caches and raise
    the clock), then enough timed calls to last `min_sample_s`. Each round starts with another contender, so that none
    is always the one after a certain other.
    """
    if rounds < 1:
        raise ValueError(f"interleave: expected at least 1 round, got {rounds}")
    names = list(contenders)
    repeats = dict.fromkeys(names, 1)
    for call in contenders.values():
        call()  # a first call may compile, allocate or page in
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        first = i % len(names) if names else 0
        for name in names[first:] + names[:first]:
            time.sleep(SETTLE_S if settle_s is None else settle_s)
            warm = clock() + warm_s
            contenders[name]()
            while clock() < warm:
                contenders[name]()
            while (taken := _timed(contenders[name], repeats[name], clock)) < min_sample_s:
                repeats[name] = _more(repeats[name], taken, min_sample_s)
            samples[name].append(taken / repeats[name])
    return samples


def ratio(slower: Sequence[float], faster: Sequence[float]) -> Spread:
    """How many times faster, round by round: the samples must be from the same rounds."""
    if len(slower) != len(faster):
        raise ValueError(f"ratio: expected samples of the same rounds, got {len(slower)} and {len(faster)}")
    return Spread.of([a / b for a, b in zip(slower, faster)])


def geometric_mean(values: Sequence[float]) -> float:
    """The mean that ratios have; nan of none."""
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


def _timed(call: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        call()
    return clock() - start


def _more(repeats: int, taken: float, wanted: float) -> int:
    """So many repeats that a sample lasts a quarter longer than wanted, but at most ten times as many as before."""
    return min(10 * repeats, max(repeats + 1, math.ceil(1.25 * repeats * wanted / max(taken, 1e-9))))
