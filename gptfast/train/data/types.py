"""What data is made of: texts, chats, preferences, and texts with a mean rating."""

from __future__ import annotations

from typing import Any, NamedTuple

Message = dict[str, str]  # role ("system", "user" or "assistant") and content


class Text(NamedTuple):
    """A document to continue."""

    text: str
    language: str
    source: str


class Chat(NamedTuple):
    """A conversation: perhaps a system message, then user and assistant in turn; the assistant has the last word."""

    messages: list[Message]
    language: str
    source: str


class Preference(NamedTuple):
    """Two answers to one prompt. `margin` is how much better people found the first, None where nobody said."""

    prompt: list[Message]
    chosen: str
    rejected: str
    language: str
    source: str
    margin: float | None


class Rated(NamedTuple):
    """A text and the mean of people's ratings: -4 (worst) to 4 for the English ones, -1 or 1 for labelled reviews."""

    text: str
    score: float
    language: str
    source: str


class Document(NamedTuple):
    """An item on its way to a split.

    Attributes:
        key: items of one key share their split: the question of a chat, the review that a sentence is from.
        content: what makes it the same item as another, wherever it stands.
        item: a Text, Chat, Preference or Rated.
    """

    key: str
    content: str
    item: Any
