"""The GGUF reader and writer: against the gguf package, and against files that lie."""

from __future__ import annotations

import gc
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from format_samples import every_scalar, tensors, tokenizer_metadata, write_samples
from gguf import GGUFReader
from gguf import dequantize as gguf_dequantize

from gptfast.formats import gguf
from gptfast.formats.gguf import FormatError, Typed, open_gguf, write_gguf
from gptfast.formats.registry import find_preset_file


def plain(value: Any) -> Any:
    return value.value if isinstance(value, Typed) else value


def header(tensor_count: int = 0, key_count: int = 0, version: int = 3) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, tensor_count, key_count)


def text(s: str | bytes) -> bytes:
    raw = s.encode() if isinstance(s, str) else s
    return struct.pack("<Q", len(raw)) + raw


def info(name: str, shape: tuple[int, ...], code: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, code, offset)


def same_as_the_gguf_package(path: Path, dequantised: tuple[str, ...] = ("",)) -> None:
    """Compares everything but the values of tensors whose names start otherwise (the package is slow at them)."""
    mine, theirs = open_gguf(path), GGUFReader(path)
    keys = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert mine.metadata == keys
    assert list(mine.tensors) == [t.name for t in theirs.tensors]
    for t in theirs.tensors:
        got = mine.tensors[t.name]
        assert got.shape == tuple(int(n) for n in reversed(t.shape)) and got.type == t.tensor_type.name
        assert (got.offset, got.nbytes) == (t.data_offset, t.n_bytes)
        raw = torch.from_numpy(t.data.copy()).reshape(-1).view(torch.uint8)
        assert mine.raw(t.name).equal(raw)
        if not t.name.startswith(dequantised):
            continue
        values = torch.from_numpy(gguf_dequantize(t.data, t.tensor_type).copy())
        assert mine.float32(t.name).equal(values.reshape(got.shape))


def test_synthetic_files_read_as_the_gguf_package_reads_them(tmp_path: Path) -> None:
    metadata = {k: v for k, v in every_scalar().items() if k not in ("a.nested", "a.nothing")}  # beyond GGUFReader
    write_gguf(tmp_path / "a.gguf", metadata | tokenizer_metadata() | {"general.alignment": 64}, tensors())
    same_as_the_gguf_package(tmp_path / "a.gguf")


@pytest.mark.model
def test_the_real_file_reads_as_the_gguf_package_reads_it() -> None:
    path = find_preset_file("smollm2", check_sha256=True)
    same_as_the_gguf_package(path, ("blk.0.", "blk.29.attn", "output_norm"))
    start = time.process_time()
    open_gguf(path)
    assert time.process_time() - start < 0.3


def test_round_trip(tmp_path: Path) -> None:
    metadata, made = every_scalar() | tokenizer_metadata(), tensors()
    for version in (2, 3):
        write_gguf(tmp_path / "a.gguf", metadata, made, version=version)
        file = open_gguf(tmp_path / "a.gguf")
        assert file.version == version
        assert file.metadata == {k: plain(v) for k, v in metadata.items()}
        for name, entry in made.items():
            if isinstance(entry, torch.Tensor):
                assert file.float32(name).equal(entry.float())
            else:
                assert file.raw(name).equal(entry[0]) and file.tensors[name].shape == entry[2]


ODD_STRINGS = (
    "",
    "\0",
    "\0" * 7,
    "a\0\0\0\0\0\0\0b",
    "x" * 255,
    "x" * 256,
    "é" * 128,
    "🙂" * 70,
    "\0" * 300,
    "x" * 70_000,
)


def test_strings_of_every_length(tmp_path: Path) -> None:
    """Beside each odd one, so many plain ones that they are read in one go; and all beside each other."""
    lists = [[f"{i} Ġé" for i in range(1_500)] + [odd] + ["ab"] * 1_500 for odd in ODD_STRINGS]
    metadata = {str(i): strings for i, strings in enumerate([*lists, list(ODD_STRINGS), [""] * 3_000])}
    write_gguf(tmp_path / "a.gguf", metadata, {})
    assert open_gguf(tmp_path / "a.gguf").metadata == metadata


@pytest.mark.parametrize("place", range(1, 8))
def test_a_length_may_lie_in_each_of_its_bytes(tmp_path: Path, place: int) -> None:
    """Also where zeros in a text make up for it."""
    lie = struct.pack("<Q", 2 | 1 << 8 * place) + b"ab"
    for texts in ([text("\0")], [text(""), text("\0\0")], [text("cd")]):
        content = header(0, 1) + key("x", 9, struct.pack("<IQ", 8, 1 + len(texts)) + b"".join(texts) + lie)
        (tmp_path / "a.gguf").write_bytes(content)
        with pytest.raises(FormatError, match=r"bytes of 'x' in the 2 bytes left|'x' of at most 4194304 bytes"):
            open_gguf(tmp_path / "a.gguf")


def test_views_are_no_copies_and_outlive_the_file_object(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", {}, {"x": torch.arange(8.0)})
    before = (tmp_path / "a.gguf").read_bytes()
    file = open_gguf(tmp_path / "a.gguf")
    first, second = file.raw("x"), file.raw("x")
    assert first.data_ptr() == second.data_ptr()
    del file
    gc.collect()
    assert first.view(torch.float32).equal(torch.arange(8.0))
    first.zero_()
    assert (tmp_path / "a.gguf").read_bytes() == before


def test_what_was_forgotten_is_read_again(tmp_path: Path) -> None:
    weight = torch.randn(64, 256)
    write_gguf(tmp_path / "a.gguf", {}, {"before": torch.ones(3), "weight": weight, "after": torch.ones(3)})
    gguf = open_gguf(tmp_path / "a.gguf")
    for name in gguf.tensors:
        gguf.forget(name)
    assert torch.equal(gguf.float32("weight"), weight) and torch.equal(gguf.float32("after"), torch.ones(3))


def test_other_types_are_listed_but_not_read(tmp_path: Path) -> None:
    infos = info("k", (256,), 12, 0) + info("odd", (5,), 99, 160)
    (tmp_path / "a.gguf").write_bytes((header(2) + infos).ljust(256, b"\0") + bytes(512))
    file = open_gguf(tmp_path / "a.gguf")
    assert (file.tensors["k"].type, file.tensors["k"].nbytes) == ("Q4_K", 144)
    assert (file.tensors["odd"].type, file.tensors["odd"].nbytes) == ("type 99", 0)
    for name, kind in (("k", "Q4_K"), ("odd", "type 99")):
        with pytest.raises(FormatError, match=rf"expected tensor '{name}' in one of F32, .*, got {kind}"):
            file.float32(name)
    with pytest.raises(KeyError, match="no tensor 'missing'"):
        file.raw("missing")


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


BIG = struct.pack("<Q", 1 << 63)
LIES = {
    "empty": (b"", "at least 24 bytes"),
    "short": (b"GGUF\3\0\0", "at least 24 bytes"),
    "magic": (b"GGML" + header()[4:], "expected the magic"),
    "version 1": (header(version=1), "version 2 or 3, little-endian, got version 1"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(16), "got a big-endian file"),
    "keys": (header(0, 1 << 63), r"expected at most 0 keys in the 0 bytes left, got 9223372036854775808"),
    "tensors": (header(1 << 62) + bytes(48), "expected at most 2 tensors in the 48 bytes left"),
    "key length": (header(0, 1) + BIG + bytes(8), "a key of at most 65535 bytes"),
    "key cut": (header(0, 1) + text("abcdefgh")[:13], "expected at most 5 bytes of a key"),
    "key not text": (header(0, 1) + key("x", 4, bytes(4)).replace(b"x", b"\xff"), "a key in UTF-8"),
    "value type": (header(0, 1) + key("x", 13, bytes(8)), "'x' of type 0 to 12, got 13"),
    "bool": (header(0, 1) + key("x", 7, b"\2"), "'x' to be 0 or 1, got 2"),
    "twice": (header(0, 2) + 2 * key("x", 4, bytes(4)), "each key once, got 'x' again"),
    "string length": (header(0, 1) + key("x", 8, BIG), "'x' of at most 4194304 bytes"),
    "array length": (header(0, 1) + key("x", 9, struct.pack("<I", 4) + BIG), "expected at most 0 elements of 'x'"),
    "strings": (header(0, 1) + key("x", 9, struct.pack("<I", 8) + BIG), "expected at most 0 strings of 'x'"),
    "arrays": (header(0, 1) + key("x", 9, struct.pack("<I", 9) + BIG), "expected at most 0 arrays of 'x'"),
    "deep": (header(0, 1) + key("x", 9, struct.pack("<IQ", 9, 1) * 9 + bytes(99)), "nest at most 4 arrays"),
    "string in array": (
        header(0, 1) + key("x", 9, struct.pack("<IQ", 8, 2) + text("ok") + struct.pack("<Q", 99)),
        "expected at most 0 bytes of 'x' in the 0 bytes left, got 99",
    ),
    "not text in array": (header(0, 1) + key("x", 9, struct.pack("<IQ", 8, 1) + text(b"\xff")), "'x' in UTF-8"),
    "alignment": (header(0, 1) + key("general.alignment", 4, struct.pack("<I", 24)), "power of two from 8 to"),
    "alignment's type": (header(0, 1) + key("general.alignment", 8, text("32")), "power of two from 8 to"),
    "dimensions": (header(1) + text("t") + struct.pack("<I", 5) + bytes(99), "at most 4 dimensions, got 5"),
    "zero": (header(1) + info("t", (0,), 0, 0), "dimensions of 1 to"),
    "product": (header(1) + info("t", (1 << 32, 1 << 32), 0, 0) + bytes(99), "to fit the file's"),
    "rows": (header(1) + info("t", (33, 2), 2, 0) + bytes(99), "multiples of 32 for Q4_0"),
    "offset": (header(1) + info("t", (4,), 0, 8) + bytes(99), "a multiple of 32, got offset 8"),
    "outside": (header(1) + info("t", (4,), 0, 1 << 40) + bytes(99), "inside the file's"),
    "end": (header(1) + info("t", (32,), 0, 0) + bytes(99), "inside the file's"),
    "same name": (header(2) + 2 * info("t", (4,), 0, 0) + bytes(99), "each tensor once, got 't' again"),
    "overlap": (header(2) + info("t", (16,), 0, 0) + info("u", (4,), 0, 32) + bytes(99), "overlap, got 't' and 'u'"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused_with_one_sentence(tmp_path: Path, lie: str) -> None:
    content, message = LIES[lie]
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        open_gguf(tmp_path / "a.gguf")
    assert str(caught.value).startswith("a.gguf") and "\n" not in str(caught.value)


def test_metadata_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slack, count = 1 << 20, 1 << 15  # strings of two characters: ten bytes each in the file, seventy in memory
    monkeypatch.setattr(gguf, "SLACK", slack)
    content = header(0, 1) + key("x", 9, struct.pack("<IQ", 8, count) + text("ab") * count)
    (tmp_path / "a.gguf").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="expected metadata whose objects fit"):
            open_gguf(tmp_path / "a.gguf")
        assert len(content) < tracemalloc.get_traced_memory()[1] < len(content) + slack
    finally:
        tracemalloc.stop()


def test_writing_refuses_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, {"x": 1}, {})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"in fp32, fp16 or bf16, got torch\.int64"):
        write_gguf(path, {}, {"t": torch.zeros(2, dtype=torch.int64)})
    with pytest.raises(ValueError, match="as uint8 blocks of Q8_0"):
        write_gguf(path, {}, {"t": (torch.zeros(33, dtype=torch.uint8), "Q8_0", (32,))})
    with pytest.raises(TypeError, match="expected metadata of str"):
        write_gguf(path, {"x": object()}, {})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


def test_every_sample_opens(tmp_path: Path) -> None:
    for path in write_samples(tmp_path):
        file = open_gguf(path)
        assert file.metadata and path.stat().st_size < 16 << 10
