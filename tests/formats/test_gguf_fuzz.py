"""Mutated GGUF files: whatever a file holds, reading it ends soon, in little memory, with a value or a FormatError."""

from __future__ import annotations

import random
import resource
import struct
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from format_samples import write_samples

from gptfast.formats.gguf import FormatError, open_gguf
from gptfast.formats.tokenizer import Tokenizer

SLACK = 64 << 20
EXTREMES = (0, 1, 2, 7, 8, 9, 31, 32, 255, 1 << 16, 1 << 31, (1 << 31) - 1, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)


def field_places(path: Path) -> list[int]:
    """Where counts, lengths, types, dimensions and offsets stand: the header, and around every name."""
    content, file = path.read_bytes(), open_gguf(path)
    places = [4, 8, 16]
    for name in [*file.metadata, *file.tensors]:
        encoded = struct.pack("<Q", len(name.encode())) + name.encode()
        at = content.find(encoded)
        after = at + len(encoded)
        places += [at, after, after + 4, after + 8, after + 12, after + 16, after + 20, after + 28]
    return [p for p in places if p + 8 <= len(content)]


def mutate(content: bytes, places: list[int], rng: random.Random) -> bytes:
    """The content with one to three changes."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(max(1, len(data)))
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            end = at + rng.randrange(1, 64)
            data[at:at] = data[rng.randrange(len(data)) :][: end - at] if data else b""
        elif kind == 3:
            del data[at : at + rng.randrange(1, 64)]
        else:
            width = rng.choice((4, 8))
            place = rng.choice(places) if kind == 5 else at // 4 * 4
            value = rng.choice(EXTREMES) + rng.choice((0, 0, 0, -1, 1))
            if place + width <= len(data):
                data[place : place + width] = (value % (1 << (8 * width))).to_bytes(width, "little")
    return bytes(data)


def read_everything(path: Path) -> str:
    """What a user's code does with a file. Returns how it ended."""
    try:
        file = open_gguf(path)
    except FormatError:
        return "refused"
    for name, tensor in file.tensors.items():
        try:
            assert file.raw(name).numel() == tensor.nbytes
            assert file.float32(name).shape == tensor.shape
        except FormatError:
            continue
    try:
        tokenizer = Tokenizer.from_gguf(file.metadata)
    except FormatError:
        return "opened"
    tokenizer.decode(tokenizer.encode("hello <|im_end|> world 123 🙂") + list(range(tokenizer.vocab_size)))
    return "tokenized"


def cases(samples: list[Path], first: int, count: int) -> Iterator[tuple[int, bytes]]:
    originals = [(path.read_bytes(), field_places(path)) for path in samples]
    for seed in range(first, first + count):
        content, places = originals[seed % len(originals)]
        yield seed, mutate(content, places, random.Random(seed))


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz(tmp_path: Path, first: int, count: int) -> dict[str, int]:
    samples, ends = write_samples(tmp_path), {"refused": 0, "opened": 0, "tokenized": 0}
    for path in samples:
        assert read_everything(path) in ("opened", "tokenized")  # also loads the libraries before anything is measured
    path = tmp_path / "mutant.gguf"
    tracemalloc.start()
    try:
        for seed, content in cases(samples, first, count):
            path.write_bytes(content)
            tracemalloc.reset_peak()
            held, resident, start = tracemalloc.get_traced_memory()[0], peak_memory(), time.process_time()
            try:
                end = read_everything(path)
            except BaseException as error:
                raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
            ends[end] += 1
            assert time.process_time() - start < 1, f"seed {seed} took {time.process_time() - start:.1f} s"
            grown = max(tracemalloc.get_traced_memory()[1] - held, peak_memory() - resident)
            assert grown < len(content) + SLACK, f"seed {seed} took {grown} bytes"
    finally:
        tracemalloc.stop()
    return ends


def test_two_thousand_mutants(tmp_path: Path) -> None:
    ends = fuzz(tmp_path, 0, 2_000)
    assert min(ends.values()) > 100, f"expected mutants that end in each way, got {ends}"


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_a_hundred_thousand_mutants(tmp_path: Path, part: int) -> None:
    print(fuzz(tmp_path, part * 10_000, 10_000))
