"""From a package's files to documents: one reader a source."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from gptfast.formats.extras import need
from gptfast.formats.files import FormatError
from gptfast.train.data.archives import read_wanted
from gptfast.train.data.types import Chat, Document, Message, Preference, Rated, Text

Files = dict[str, bytes]
Reader = Callable[[Files, str, str], Iterator[Document]]  # files, language, source's name
NEWS_LINES = 20  # of the news make a document: where an article ends isn't marked
NAMES = {"{{name}}": "gptfast", "{{author}}": "the gptfast project"}  # who the identity chats speak of


def _text(files: Files, path: str) -> str:
    """A file that ends so, as text with plain line ends."""
    found = next((data for name, data in files.items() if name.endswith(path)), None)
    if found is None:
        raise FormatError(f"expected a file {path} in the package, got none")
    return found.decode("utf-8", "replace").replace("\r\n", "\n")


def speeches(files: Files, language: str, source: str) -> Iterator[Document]:
    """One address a file, by year."""
    for path in sorted(files):
        if path.endswith(".txt"):
            text = _text(files, path).strip()
            yield Document(path, text, Text(text, language, source))


def lines(path: str) -> Reader:
    """A document a line."""

    def read(files: Files, language: str, source: str) -> Iterator[Document]:
        for line in _text(files, path).split("\n"):
            if text := line.strip():
                yield Document(text, text, Text(text, language, source))

    return read


def news(files: Files, language: str, source: str) -> Iterator[Document]:
    """The People's Daily of January 1998 without its tags of words."""
    tagged = _text(files, "tag/199801.txt").split("\n")
    plain = ["".join(re.sub(r"/[A-Za-z]+$", "", word) for word in line.split()) for line in tagged]
    for start in range(0, len(plain), NEWS_LINES):
        if text := "\n".join(filter(None, plain[start : start + NEWS_LINES])):
            yield Document(text, text, Text(text, language, source))


def poetry(files: Files, language: str, source: str) -> Iterator[Document]:
    """Song ci and classics: a title, the author, and the paragraphs below."""
    for path in sorted(files):
        if path.endswith(".json"):
            for title, paragraphs in _works(json.loads(files[path]), ""):
                text = "\n".join([title, *paragraphs] if title else paragraphs)
                body = "\n".join(paragraphs)
                yield Document(body, body, Text(text, language, source))


def _works(value: Any, title: str) -> Iterator[tuple[str, list[str]]]:
    """Every list of paragraphs in chinese-poetry's JSON, whose books each have names of their own for things."""
    if isinstance(value, list):
        if value and all(isinstance(part, str) for part in value):
            if paragraphs := [part.strip() for part in value if part.strip()]:
                yield title, paragraphs
        else:
            for part in value:
                yield from _works(part, title)
    elif isinstance(value, dict):
        name = next((value[k] for k in ("title", "chapter", "rhythmic") if isinstance(value.get(k), str)), "")
        author = value.get("author")
        title = f"{name} {author}".strip() if isinstance(author, str) and len(author) < 10 else name or title
        for key in ("paragraphs", "content", "para"):
            part = value.get(key)
            yield from _works([part] if isinstance(part, str) else part, title)


def _chat(turns: list[Message], language: str, source: str) -> Document:
    question = next(turn["content"] for turn in turns if turn["role"] == "user")
    content = "\n".join(turn["content"] for turn in turns)
    return Document(question, content, Chat(turns, language, source))


def chatterbot(folder: str) -> Reader:
    """Conversations of two and more lines, user and assistant in turn; an answer nobody asked for is left out."""

    def read(files: Files, language: str, source: str) -> Iterator[Document]:
        yaml = need("yaml", "train")
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        for path in sorted(files):
            if f"/{folder}/" not in path:
                continue
            for said in yaml.load(files[path], Loader=loader)["conversations"]:
                texts = [str(line).strip() for line in said]
                texts = texts[: len(texts) // 2 * 2]
                if texts and all(texts):
                    roles = ("user", "assistant")
                    yield _chat([{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)], language, source)

    return read


def alpaca(path: str) -> Reader:
    """Instruction, perhaps an input, and the output."""

    def read(files: Files, language: str, source: str) -> Iterator[Document]:
        for entry in json.loads(_text(files, path)):
            asked = "\n\n".join(filter(None, (entry["instruction"].strip(), entry["input"].strip())))
            answer = entry["output"].strip()
            for mark, name in NAMES.items():
                asked, answer = asked.replace(mark, name), answer.replace(mark, name)
            if asked and answer:
                turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
                its = "zh" if re.search(r"[\u4e00-\u9fff]", answer) else "en"
                yield _chat(turns, language if language != "en, zh" else its, source)

    return read


def dpo(path: str) -> Reader:
    """A conversation that ends with the user, a better and a worse answer."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}

    def read(files: Files, language: str, source: str) -> Iterator[Document]:
        for entry in json.loads(_text(files, path)):
            prompt = [{"role": roles[c["from"]], "content": c["value"].strip()} for c in entry["conversations"]]
            prompt = [message for message in prompt if message["content"]]
            chosen, rejected = entry["chosen"]["value"].strip(), entry["rejected"]["value"].strip()
            question = next((message["content"] for message in prompt if message["role"] == "user"), "")
            if question and chosen and rejected and chosen != rejected:
                content = "\n".join([*(m["content"] for m in prompt), chosen, rejected])
                yield Document(question, content, Preference(prompt, chosen, rejected, language, source, None))

    return read


def ratings(path: str) -> Reader:
    """Sentences with the mean of at least twenty people's ratings (Hutto & Gilbert 2014)."""

    def read(files: Files, language: str, source: str) -> Iterator[Document]:
        name = next(n for n in files if n.endswith("hutto_ICWSM_2014.tar.gz"))
        inner = dict(read_wanted(files[name], (f"hutto_ICWSM_2014/{path}",), name))
        for line in _text(inner, path).split("\n"):
            parts = line.split("\t", 2)
            if len(parts) == 3 and parts[2].strip():
                text = html.unescape(parts[2]).replace("''", '"').strip()
                # Sentences 17_1, 17_2 ... are from one review or editorial and stay in one split.
                key = f"{path} {parts[0].split('_')[0]}" if "_" in parts[0] else text
                yield Document(key, text, Rated(text, float(parts[1]), language, source))

    return read


def labelled(files: Files, language: str, source: str) -> Iterator[Document]:
    """Chinese reviews that are good (1) or bad (-1); those that are both are left out."""
    sides = {score: _text(files, f"sentiment/{name}.txt").split("\n") for name, score in (("pos", 1.0), ("neg", -1.0))}
    both = {line.strip() for line in sides[1.0]} & {line.strip() for line in sides[-1.0]}
    for score, found in sides.items():
        for line in found:
            if (text := line.strip()) and text not in both:
                yield Document(text, text, Rated(text, score, language, source))
