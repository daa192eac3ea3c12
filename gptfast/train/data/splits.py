"""Which documents are held out: decided by the documents alone, the same on every machine and in any order."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from gptfast.train.data.types import Document

SPLITS = ("train", "validation")
HELD_OUT = 10  # one of so many


def check_split(split: str) -> None:
    """Raises ValueError unless the split is one of ours."""
    if split not in SPLITS:
        raise ValueError(f"expected a split of {' or '.join(SPLITS)}, got {split!r}")


def number(*parts: str) -> int:
    """A number of 64 bits that depends on the texts alone."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()[:8], "big")


def same(text: str) -> str:
    """What two copies of a text have in common: letters without case, words without the spaces between."""
    return re.sub(r"\s+", " ", text).strip().casefold()


def divide(documents: Iterable[Document], split: str, every: int = 0) -> list[Any]:
    """The items of one split, each once, in their order.

    Args:
        documents: all of a source.
        split: "train" or "validation".
        every: hold out every so many-th document; 0: those whose key's hash says so, about one in ten.

    A validation item whose content also stands in the training split is left out.
    """
    check_split(split)
    parts: dict[bool, list[tuple[str, Any]]] = {False: [], True: []}
    seen: dict[bool, set[str]] = {False: set(), True: set()}
    for i, document in enumerate(documents):
        held = i % every == every - 1 if every else number(same(document.key)) % HELD_OUT == 0
        content = same(document.content)
        if content not in seen[held]:
            seen[held].add(content)
            parts[held].append((content, document.item))
    if split == "train":
        return [item for _, item in parts[False]]
    return [item for content, item in parts[True] if content not in seen[False]]


def chosen(options: Sequence[str], *parts: str) -> str:
    """One of the options, picked by a hash."""
    return options[number(*parts) % len(options)]
