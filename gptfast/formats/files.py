"""What the readers and writers of model files share: the error, JSON from strangers, and files that appear whole."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class FormatError(ValueError):
    """A file is malformed or holds what gptfast does not read: one sentence that says what and where."""


def read_json(path: Path, limit: int = 256 << 20) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes. Raises FormatError for anything else."""
    size = path.stat().st_size
    if size > limit:
        raise FormatError(f"{path.name}: expected at most {limit} bytes of JSON, got {size}")
    try:
        value = json.loads(path.read_bytes())
    except RecursionError:
        raise FormatError(f"{path.name}: expected JSON that is not nested thousands deep") from None
    except ValueError as error:  # json.JSONDecodeError and UnicodeDecodeError
        raise FormatError(f"{path.name}: expected valid JSON, got {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path.name}: expected a JSON object, got {type(value).__name__}")
    return value


# The temporary names of `replacing`, which a process that is killed leaves behind.
REPLACING = re.compile(r"\..+\.[0-9a-f]{16}\.part")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; on success it is flushed to disk and renamed to `path`, else removed.

    A crash or a full disk leaves an older file at `path` as it was. A device or a pipe is itself written to.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
