"""Files of one's own: texts, chats and preferences, each mistake named by file and line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptfast.formats.files import FormatError
from gptfast.train.data.types import Chat, Document, Message, Preference, Text

MAX_FILE = 4 << 30  # bytes of one file: all of it is held in memory
MAX_LINE = 16 << 20  # bytes of one line of JSON
ROLES = ("system", "user", "assistant")


def read_texts(path: Path, name: str) -> list[Document]:
    """A .txt file (documents between blank lines; one document if there are none), a folder of .txt files (one document
    a file), or a .jsonl file of {"text"} or chats or preferences.

    Raises FormatError with the file and the line; FileNotFoundError for a folder without texts.
    """
    if path.is_dir():
        files = sorted(p for p in path.rglob("*.txt") if p.is_file())
        if not files:
            raise FileNotFoundError(f"expected .txt files in {path}, got none")
        documents = [_document(text, name) for file in files if (text := _read(file).strip())]
    elif path.suffix == ".jsonl":
        documents = [_document(_text_of(value, where), name) for where, value in _objects(path)]
    elif path.suffix == ".txt":
        parts = re.split(r"\n[ \t]*\n\s*", _read(path))
        documents = [_document(part.strip(), name) for part in parts if part.strip()]
    else:
        raise FormatError(f"{path}: expected a .txt or .jsonl file, or a folder of .txt files")
    return _some(documents, path)


def read_chats(path: Path, name: str) -> list[Document]:
    """A .jsonl file of {"messages": [{"role", "content"}, ...]} or {"prompt", "response"}. Raises FormatError."""
    documents = []
    for where, value in _objects(_jsonl(path)):
        turns = _conversation(value, where)
        content = "\n".join(turn["content"] for turn in turns)
        question = next(turn["content"] for turn in turns if turn["role"] == "user")
        documents.append(Document(question, content, Chat(turns, language_of(content), name)))
    return _some(documents, path)


def read_preferences(path: Path, name: str) -> list[Document]:
    """A .jsonl file of {"prompt", "chosen", "rejected"}, perhaps with "margin" (a number of at least 0); the prompt is
    text or a list of messages that ends with the user's. Raises FormatError."""
    documents = []
    for where, value in _objects(_jsonl(path)):
        _names(value, ("prompt", "chosen", "rejected"), ("margin",), where)
        prompt = _prompt(value["prompt"], where)
        chosen, rejected = (_content(value[key], f'"{key}"', where) for key in ("chosen", "rejected"))
        if chosen == rejected:
            raise FormatError(f'{where}: expected "chosen" and "rejected" to differ, got the same text')
        margin = value.get("margin")
        if margin is not None and (isinstance(margin, bool) or not isinstance(margin, (int, float)) or not margin >= 0):
            raise FormatError(f'{where}: expected "margin" as a number of at least 0, got {margin!r:.80}')
        question = next(message["content"] for message in prompt if message["role"] == "user")
        content = "\n".join([*(message["content"] for message in prompt), chosen, rejected])
        number = None if margin is None else float(margin)
        item = Preference(prompt, chosen, rejected, language_of(chosen), name, number)
        documents.append(Document(question, content, item))
    return _some(documents, path)


def language_of(text: str) -> str:
    """ "zh" where a tenth of the letters and more are Chinese characters, else "en"."""
    sample = text[:10_000]
    chinese = len(re.findall(r"[\u3400-\u9fff]", sample))
    return "zh" if 10 * chinese >= max(1, sum(c.isalpha() for c in sample)) else "en"


def _document(text: str, name: str) -> Document:
    return Document(text, text, Text(text, language_of(text), name))


def _some(documents: list[Document], path: Path) -> list[Document]:
    if not documents:
        raise FormatError(f"{path}: expected at least one document, got an empty file")
    return documents


def _jsonl(path: Path) -> Path:
    if path.suffix != ".jsonl" or path.is_dir():
        raise FormatError(f"{path}: expected a .jsonl file")
    return path


def _read(path: Path) -> str:
    size = path.stat().st_size
    if size > MAX_FILE:
        raise FormatError(f"{path}: expected at most {MAX_FILE} bytes, got {size}: divide it into several files")
    return _decode(path.read_bytes(), path).replace("\r\n", "\n")


def _decode(data: bytes, path: Path, line: int | None = None) -> str:
    try:
        return data.decode("utf-8-sig" if line in (None, 1) else "utf-8")
    except UnicodeDecodeError as error:
        at = line if line is not None else data[: error.start].count(b"\n") + 1
        raise FormatError(f"{path}:{at}: expected UTF-8, got byte 0x{data[error.start]:02x}") from None


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's JSON object, with "file:line" for messages. Blank lines are skipped."""
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            where = f"{path}:{number}"
            if len(line) > MAX_LINE:
                raise FormatError(f"{where}: expected a line of at most {MAX_LINE} bytes, got more")
            text = _decode(line, path, number)
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except RecursionError:
                raise FormatError(f"{where}: expected JSON that is not nested thousands deep") from None
            except ValueError as error:
                raise FormatError(f"{where}: expected JSON, got {error}") from None
            if not isinstance(value, dict):
                raise FormatError(f"{where}: expected a JSON object, got {type(value).__name__}")
            yield where, value


def _names(value: dict[str, Any], needed: tuple[str, ...], allowed: tuple[str, ...], where: str) -> None:
    missing = [name for name in needed if name not in value]
    if missing:
        raise FormatError(f"{where}: expected {', '.join(needed)}, got {', '.join(map(repr, value)) or 'nothing'}")


def _content(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str):
        raise FormatError(f"{where}: expected {what} as text, got {type(value).__name__}")
    if not value.strip():
        raise FormatError(f"{where}: expected {what} with text, got an empty one")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise FormatError(f"{where}: expected {what} of valid Unicode, got a lone surrogate") from None
    return value.strip()


def _messages(value: Any, where: str) -> list[Message]:
    """Messages in order: perhaps a system message, then user and assistant in turn."""
    if not isinstance(value, list) or not value:
        raise FormatError(f'{where}: expected "messages" as a list with at least one message, got {value!r:.80}')
    turns = []
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise FormatError(f"{where}: expected messages with a role of {', '.join(ROLES)}, got {message!r:.80}")
        turns.append({"role": message["role"], "content": _content(message.get("content"), '"content"', where)})
    spoken = turns[1:] if turns[0]["role"] == "system" else turns
    for i, turn in enumerate(spoken):
        expected = ("user", "assistant")[i % 2]
        if turn["role"] != expected:
            place = len(turns) - len(spoken) + i + 1
            raise FormatError(f"{where}: expected message {place} from {expected}, got one from {turn['role']}")
    if not spoken:
        raise FormatError(f"{where}: expected a message from user, got a system message alone")
    return turns


def _conversation(value: dict[str, Any], where: str) -> list[Message]:
    if "messages" in value:
        turns = _messages(value["messages"], where)
        if turns[-1]["role"] != "assistant":
            raise FormatError(f"{where}: expected the last message from assistant, got one from {turns[-1]['role']}")
        return turns
    _names(value, ("prompt", "response"), (), where)
    prompt = _prompt(value["prompt"], where)
    return [*prompt, {"role": "assistant", "content": _content(value["response"], '"response"', where)}]


def _prompt(value: Any, where: str) -> list[Message]:
    if not isinstance(value, list):
        return [{"role": "user", "content": _content(value, '"prompt"', where)}]
    turns = _messages(value, where)
    if turns[-1]["role"] != "user":
        raise FormatError(f"{where}: expected the prompt's last message from user, got one from {turns[-1]['role']}")
    return turns


def _text_of(value: dict[str, Any], where: str) -> str:
    if "text" in value:
        return _content(value["text"], '"text"', where)
    if "chosen" in value:
        prompt = [m["content"] for m in _prompt(value.get("prompt"), where)]
        return "\n\n".join([*prompt, _content(value["chosen"], '"chosen"', where)])
    return "\n\n".join(turn["content"] for turn in _conversation(value, where))
