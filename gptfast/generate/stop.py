"""From tokens to text: whole UTF-8 characters only, cut before the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    """Turns tokens into text as they come, holding back what isn't yet a whole character."""

    def push(self, token: int, /) -> str: ...
    def flush(self) -> str: ...


class NoText:
    """The decoder of a model without a tokenizer."""

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class Text:
    """One row's text as it grows.

    A stop string is found wherever token boundaries fall: of several, the one that is complete first wins, the longest
    where two end together. Text that may be the beginning of a stop string is held back until that is decided.
    """

    def __init__(self, decoder: Decoder, stops: Sequence[str] = ()) -> None:
        self.decoder, self.stops = decoder, tuple(stops)
        self.pieces: list[str] = []
        self.held = ""
        self.stopped = False

    def push(self, token: int, *, match: bool = True) -> str:
        """Takes the next token and returns the text that is now certain. With match=False no stop string is seen."""
        return self._add(self.decoder.push(token), match)

    def flush(self) -> str:
        """The end: the text that was held back."""
        if self.stopped:
            return ""
        piece = self._add(self.decoder.flush(), True)
        if not self.stopped:
            piece, self.held = piece + self._keep(self.held), ""
        return piece

    def __str__(self) -> str:
        return "".join(self.pieces)

    def _add(self, text: str, match: bool) -> str:
        if not self.stops or not match:
            text, self.held = self.held + text, ""
            return self._keep(text)
        window = self.held + text
        cut = first_stop(window, self.stops)
        if cut is not None:
            self.stopped, self.held = True, ""
            return self._keep(window[:cut])
        safe = len(window) - longest_beginning(window, self.stops)
        self.held = window[safe:]
        return self._keep(window[:safe])

    def _keep(self, text: str) -> str:
        if text:
            self.pieces.append(text)
        return text


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop string that is complete first begins, or None."""
    found = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def longest_beginning(text: str, stops: Sequence[str]) -> int:
    """The length of the longest end of `text` that is the beginning of a stop string."""
    longest = min(len(text), max(map(len, stops)) - 1)
    for n in range(longest, 0, -1):
        end = text[-n:]
        if any(stop.startswith(end) for stop in stops):
            return n
    return 0
