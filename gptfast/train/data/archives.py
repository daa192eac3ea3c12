"""Reading archives from strangers: only the files asked for, only plain ones, only so many bytes.

Nothing of an archive decides where a byte lands: its members are matched with patterns of ours, and a member that tries
to leave the folder, or is a link where a file is expected, is an error rather than something to work around.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO

from gptfast.formats.files import FormatError

MAX_FILE = 64 << 20  # bytes of one file
MAX_WANTED = 256 << 20  # bytes of all files asked for
MAX_ARCHIVE = 2 << 30  # bytes of everything that is unpacked on the way to them
MAX_MEMBERS = 100_000


def read_wanted(archive: Path | bytes, patterns: Sequence[str], name: str) -> Iterator[tuple[str, bytes]]:
    """The files of a .tar.gz, .tgz, .whl or .zip whose paths match one of the patterns.

    Args:
        archive: a path, or the archive's bytes.
        patterns: as fnmatch has them, for the whole path; * crosses folders.
        name: what messages call the archive; its ending says which kind it is.

    Yields:
        (path inside the archive, bytes), in the archive's order.

    Raises:
        FormatError: damaged, too large, a path that leaves its folder, or a link where a file is expected.
    """
    read = _read_zip if name.endswith((".whl", ".zip")) else _read_tar
    total = 0
    try:
        with archive.open("rb") if isinstance(archive, Path) else io.BytesIO(archive) as file:
            for path, data in read(file, patterns, name):
                total += len(data)
                if total > MAX_WANTED:
                    raise FormatError(f"{name}: expected at most {MAX_WANTED} bytes of data, got more")
                yield path, data
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{name}: expected an archive that can be unpacked, got: {error}") from None
    except OSError as error:  # gzip.BadGzipFile has no number of the system's
        if error.errno is not None:
            raise
        raise FormatError(f"{name}: expected an archive that can be unpacked, got: {error}") from None


def _wanted(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _check_path(path: str, name: str) -> None:
    """A relative path of plain names, on any system."""
    parts = PurePosixPath(path).parts
    if path.startswith("/") or "\\" in path or ":" in path or "\0" in path or ".." in parts or not parts:
        raise FormatError(f"{name}: expected paths inside the archive's own folder, got {path!r:.200}")


def _read_tar(file: IO[bytes], patterns: Sequence[str], name: str) -> Iterator[tuple[str, bytes]]:
    unpacked = 0
    with tarfile.open(fileobj=file, mode="r:gz") as tar:
        for count, member in enumerate(tar):
            unpacked += max(member.size, 0)
            if count >= MAX_MEMBERS or unpacked > MAX_ARCHIVE:
                raise FormatError(f"{name}: expected at most {MAX_MEMBERS} files and {MAX_ARCHIVE} bytes, got more")
            if not _wanted(member.name, patterns):
                continue
            _check_path(member.name, name)
            if member.isdir():
                continue
            if not member.isreg():
                raise FormatError(f"{name}: expected {member.name!r:.200} to be a file, got a link or a device")
            if hasattr(tarfile, "data_filter"):  # Python's own rules for data (PEP 706), where it is new enough
                member = tarfile.data_filter(member, "/nowhere")
            source = tar.extractfile(member)
            assert source is not None  # a regular file has contents
            yield member.name, _read(source, member.size, member.name, name)


def _read_zip(file: IO[bytes], patterns: Sequence[str], name: str) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if len(members) > MAX_MEMBERS:
            raise FormatError(f"{name}: expected at most {MAX_MEMBERS} files, got {len(members)}")
        for member in members:
            if not _wanted(member.filename, patterns):
                continue
            _check_path(member.orig_filename, name)
            if member.is_dir():
                continue
            if (kind := member.external_attr >> 28 & 0xF) not in (0, 8):  # Unix file types: unset, regular
                raise FormatError(f"{name}: expected {member.filename!r:.200} to be a file, got type {kind}")
            with archive.open(member) as source:
                yield member.filename, _read(source, member.file_size, member.filename, name)


def _read(source: IO[bytes], size: int, path: str, name: str) -> bytes:
    """All of a member, which must be as long as the archive says."""
    if size > MAX_FILE:
        raise FormatError(f"{name}: expected {path!r:.200} of at most {MAX_FILE} bytes, got {size}")
    data = source.read(size + 1)
    if len(data) != size:
        raise FormatError(f"{name}: expected {size} bytes of {path!r:.200}, got {len(data)}")
    return data
