"""Randomness as a function of numbers: what a step draws depends on (seed, step, place) and on nothing that ran before.

So a run that is resumed draws what the uninterrupted one would have, and there is no generator's state to save.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

MASK = (1 << 64) - 1


def seed_of(*numbers: int) -> int:
    """One number below 2^62 made of several whole ones, far from those of neighbouring numbers.

    SplitMix64's finaliser over each in turn (Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators).
    """
    state = 0
    for number in numbers:
        state = (state + (number & MASK) + 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return state >> 2


def generator(*numbers: int) -> torch.Generator:
    """A generator on the CPU that starts at seed_of(...)."""
    return torch.Generator().manual_seed(seed_of(*numbers))


@functools.lru_cache(maxsize=8)
def shuffled(count: int, *numbers: int) -> Tensor:
    """The numbers 0 .. count - 1 in an order made of these numbers, (count,) int64. Not to be written to."""
    return torch.randperm(count, generator=generator(*numbers))


def batch_of(count: int, size: int, step: int, seed: int) -> list[int]:
    """Which `size` of `count` items step number `step` takes, all being gone through in a new order each epoch.

    Items are taken without gaps: a batch may hold the end of one epoch and the beginning of the next.
    """
    if count < 1 or size < 1:
        raise ValueError(f"batch_of: expected at least one item and a batch of at least 1, got {count} and {size}")
    first = step * size
    return [int(shuffled(count, seed, at // count)[at % count]) for at in range(first, first + size)]
