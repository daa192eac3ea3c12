"""How many tokens to look at in one step: as many as promise the most tokens a second."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# A guess is more often right the more guesses in a row were right before it: rates are kept by the length of that row,
# 0, 1, 2-3, 4-7, 8-15, 16 and more. Each begins as if RATES had been seen in SEEN guesses, and forgets by MEMORY.
RATES = (0.2, 0.4, 0.6, 0.75, 0.9, 0.95)
SEEN = 3.0
MEMORY = 0.98

SLOPE = 0.35  # what a further token adds to a step, in steps of one token, until it has been measured
WORTH = 1.1  # a longer step must promise so much more: estimates err, and a loss is worse than a missed gain
UNLIKELY = 0.1  # a guess that is reached so seldom pays for no longer step
LITTLE = 0.03  # of a step: guesses that cost no more are asked for in every step, if only to see how good they'd be
PATIENCE = 64  # steps at most between two looks at guesses that aren't worth their cost


class Pace:
    """Learns from one text how good its guesses are, and from its steps what they and the guesses cost.

    sizes    tokens that a step can feed, ascending from 1
    seconds  what a step of a size takes; None where that isn't known
    """

    def __init__(self, sizes: Sequence[int], seconds: Callable[[int], float | None]) -> None:
        self.sizes, self._seconds = sizes, seconds
        self._hits, self._seen = [r * SEEN for r in RATES], [SEEN] * len(RATES)
        self._streak = 0  # guesses in a row that were right, up to now
        self._guess_s = 0.0  # seconds for each guess
        self._wait, self._pause = 0, 1

    def wanted(self, most: int) -> int:
        """How many guesses to ask for, of at most `most`."""
        one = self._cost(1)
        if one is None or self._guess_s * most <= LITTLE * one:
            return most
        size = self.size(most + 1)
        if size > 1:
            self._wait, self._pause = 0, 1
            return size - 1
        if self._wait > 0:
            self._wait -= 1
            return 0
        self._wait = self._pause
        self._pause = min(2 * self._pause, PATIENCE)
        return min(most, 1)

    def size(self, most: int) -> int:
        """How many tokens, of at most `most`, the next step had best feed, if all but the first are guesses."""
        best, best_rate, expected, likely, fed = 1, 1.0, 1.0, 1.0, 1
        one = (self._cost(1) if most > 1 else None) or 1.0
        for size in self.sizes[1:]:
            if size > most or likely < UNLIKELY:
                break
            while fed < size:
                row = _row(self._streak + fed - 1)
                likely *= self._hits[row] / self._seen[row]
                expected, fed = expected + likely, fed + 1
            known = self._cost(size)
            cost = _slope(size) if known is None else (known + self._guess_s * (size - 1)) / one
            if expected > cost * best_rate * (WORTH if best == 1 else 1.0):
                best, best_rate = size, expected / cost
        return best

    def learn(self, guesses: Sequence[int], drawn: Sequence[int], guessing_s: float) -> int:
        """Compares guesses with the tokens drawn in their places; how many were right before the first that wasn't.

        guessing_s: seconds that the guesses took
        """
        if guesses:
            each = guessing_s / len(guesses)
            self._guess_s = min(each, 1.02 * self._guess_s) if self._guess_s else each
        right = 0
        for guess, token in zip(guesses, drawn):
            row, hit = _row(self._streak), guess == token
            self._hits[row], self._seen[row] = self._hits[row] * MEMORY + hit, self._seen[row] * MEMORY + 1
            if not hit:
                self._streak = 0
                break
            self._streak, right = self._streak + 1, right + 1
        return right

    def _cost(self, size: int) -> float | None:
        """Seconds of a step: measured, or else judged by another size's; None where nothing was measured."""
        if (known := self._seconds(size)) is not None:
            return known
        other = next(((n, s) for n in self.sizes if (s := self._seconds(n)) is not None), None)
        return None if other is None else other[1] * _slope(size) / _slope(other[0])


def _row(streak: int) -> int:
    return min(streak.bit_length(), len(RATES) - 1)


def _slope(size: int) -> float:
    return 1 + SLOPE * (size - 1)
