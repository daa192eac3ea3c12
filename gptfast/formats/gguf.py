"""GGUF files, versions 2 and 3, little-endian: a reader that treats the file as hostile, and a writer.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md):

    "GGUF" | version u32 | tensor count u64 | key count u64 | key-values | tensor infos | padding | tensor data

Every count is compared with the bytes that are left before anything is made from it, the Python objects made from the
metadata may take the file's size plus 64 MiB, and tensors must lie inside the file without overlapping. A malformed
file raises FormatError and nothing else. Tensor data is mapped, not read.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptfast.formats import blocks
from gptfast.formats.files import FormatError, replacing

__all__ = ["GGUF", "FormatError", "GGUFTensor", "Typed", "open_gguf", "write_gguf"]

MAGIC = b"GGUF"
HEADER = struct.Struct("<4sIQQ")
SLACK = 48 << 20  # bytes that the metadata's objects may take beyond the file's size; 16 MiB stay for passing needs
MAX_DIMS = 4  # ggml's
MAX_DEPTH = 4  # arrays in arrays
MAX_NAME = 65535  # bytes of a key or of a tensor's name
MAX_STRING = 4 << 20  # bytes of any other string
ALIGNMENTS = (8, 1 << 20)

SCALARS = {  # GGUF's number of a metadata type -> its struct code; 8 is a string and 9 an array
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"},
    **{10: "Q", 11: "q", 12: "d"},
}
BOOL, STRING, ARRAY = 7, 8, 9
TYPE_NAMES = (
    *("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string", "array"),
    *("uint64", "int64", "float64"),
)

# ggml's tensor types that gptfast can list but not compute with: number -> (name, values in a block, bytes of a block).
LISTED = {
    **{6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110)},
    **{12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292)},
    **{16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50)},
    **{20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136)},
    **{24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8)},
    **{29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17)},
}
TENSOR_TYPES = LISTED | {f.code: (f.name, f.elements, f.nbytes) for f in blocks.FORMATS.values()}


class GGUFTensor(NamedTuple):
    """Where a tensor lies and what it is."""

    name: str
    shape: tuple[int, ...]  # in PyTorch's order: the reverse of the file's
    type: str  # a name in blocks.FORMATS, another of ggml's names, or "type 99"
    offset: int  # bytes from the start of the file
    nbytes: int  # 0 for a type whose size is unknown


@dataclass(frozen=True)
class GGUF:
    """An open file. Tensors stay valid after this object is gone: they keep the mapping alive."""

    path: Path
    version: int
    metadata: dict[str, Any]  # str, bool, int, float, or lists of them
    tensors: dict[str, GGUFTensor]
    map: mmap.mmap = field(repr=False)

    def raw(self, name: str) -> Tensor:
        """(nbytes,) uint8: the stored blocks, without a copy. Writing to it changes private memory, never the file.

        Raises:
            KeyError: no tensor of that name.
            FormatError: a type that gptfast does not compute with.
        """
        if name not in self.tensors:
            raise KeyError(f"{self.path.name} has no tensor {name!r}")
        tensor = self.tensors[name]
        if tensor.type not in blocks.FORMATS:
            raise FormatError(
                f"{self.path.name}: expected tensor {name!r} in one of {', '.join(blocks.FORMATS)}, got {tensor.type}"
            )
        return torch.frombuffer(self.map, dtype=torch.uint8, count=tensor.nbytes, offset=tensor.offset)

    def forget(self, name: str) -> None:
        """Gives the memory of a tensor's bytes back to the system, and with it what was written to them: what comes
        next reads the file again."""
        tensor, page = self.tensors[name], mmap.PAGESIZE
        begin, end = -(-tensor.offset // page) * page, (tensor.offset + tensor.nbytes) // page * page
        if begin < end and hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def float32(self, name: str) -> Tensor:
        """The tensor's values as fp32, in a new tensor of its shape. Raises as `raw` does."""
        raw, tensor = self.raw(name), self.tensors[name]
        return blocks.dequantize(raw, tensor.type, tensor.shape)


class _Cursor:
    """A place in the mapped bytes. Every step is checked against the end, and every object made is counted."""

    def __init__(self, data: mmap.mmap, name: str) -> None:
        self.data, self.name, self.size, self.at = data, name, len(data), 0
        self.budget = self.size + SLACK

    def error(self, message: str) -> FormatError:
        return FormatError(f"{self.name} at byte {self.at}: {message}")

    def check_count(self, count: int, bytes_each: int, what: str) -> None:
        left = self.size - self.at
        if count * bytes_each > left:
            raise self.error(f"expected at most {left // bytes_each} {what} in the {left} bytes left, got {count}")

    def spend(self, cost: int) -> None:
        self.budget -= cost
        if self.budget < 0:
            raise self.error(f"expected metadata whose objects fit in {self.size + SLACK} bytes of memory")

    def number(self, code: str, what: str) -> Any:
        width = struct.calcsize("<" + code)
        self.check_count(1, width, what)
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += width
        return value

    def numbers(self, code: str, count: int, what: str) -> list[Any]:
        width = struct.calcsize("<" + code)
        self.check_count(count, width, what)
        self.spend(count * (9 if width == 1 else 41))  # a list's slot, and an int or float that is not cached
        values: list[Any] = []
        for start in range(0, count, 1 << 16):
            n = min(1 << 16, count - start)
            values += struct.unpack_from(f"<{n}{code}", self.data, self.at)
            self.at += n * width
        return values

    def string(self, what: str, longest: int = MAX_STRING) -> str:
        length = self.number("Q", f"lengths of {what}")
        if length > longest:
            raise self.error(f"expected {what} of at most {longest} bytes, got {length}")
        self.check_count(length, 1, f"bytes of {what}")
        self.spend(4 * length)  # the most that the text can take, until it is known
        try:
            text = self.data[self.at : self.at + length].decode()
        except UnicodeDecodeError as problem:
            raise self.error(f"expected {what} in UTF-8, got {problem.reason} at its byte {problem.start}") from None
        self.at += length
        self.spend(sys.getsizeof(text) + 16 - 4 * length)  # the allocator rounds up to 16 bytes
        return text

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings. Opening a file spends its time here, so short ones are read many at a time."""
        self.check_count(count, 8, f"strings of {what}")
        self.spend(9 * count)
        out: list[str] = []
        while len(out) < count:
            some = min(count - len(out), 1024)
            out += self._short_strings(some) or [self.string(what) for _ in range(some)]
        return out

    def _short_strings(self, count: int) -> list[str] | None:
        """`count` strings; None, with nothing read, where one is malformed or longer than 255 bytes, or where they
        might take too much."""
        raw, at, ends = self.data[self.at : self.at + 264 * count], 0, [0]
        try:
            for _ in range(count):
                at += 8 + raw[at]
                ends.append(at)
            found = [raw[begin + 8 : end].decode() for begin, end in pairwise(ends)]
        except (IndexError, UnicodeDecodeError):
            return None
        # Of each length only the lowest byte was read: the zeros must be the seven above it and those of the texts.
        zeros = 7 * count + found.count("") + "".join(found).count("\0")
        cost = 72 * count + (at if raw.isascii() else 4 * at)
        if at > len(raw) or raw.count(0, 0, at) != zeros or cost > self.budget:
            return None
        self.budget -= cost
        self.at += at
        return found

    def array(self, what: str, depth: int) -> list[Any]:
        kind, count = self.number("I", f"element types of {what}"), self.number("Q", f"lengths of {what}")
        if kind == STRING:
            return self.strings(count, what)
        if kind == BOOL:
            return [self.boolean(b, what) for b in self.numbers("B", count, f"elements of {what}")]
        if kind in SCALARS:
            return self.numbers(SCALARS[kind], count, f"elements of {what}")
        if kind != ARRAY:
            raise self.error(f"expected {what} to hold elements of type 0 to 12, got {kind}")
        if depth == MAX_DEPTH:
            raise self.error(f"expected {what} to nest at most {MAX_DEPTH} arrays, got more")
        self.check_count(count, 12, f"arrays of {what}")
        self.spend(count * 80)
        return [self.array(what, depth + 1) for _ in range(count)]

    def boolean(self, byte: int, what: str) -> bool:
        if byte > 1:
            raise self.error(f"expected {what} to be 0 or 1, got {byte}")
        return byte == 1

    def value(self, what: str) -> Any:
        kind = self.number("I", f"types of {what}")
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self.array(what, 1)
        if kind == BOOL:
            return self.boolean(self.number("B", what), what)
        if kind not in SCALARS:
            raise self.error(f"expected {what} of type 0 to 12, got {kind}")
        self.spend(40)
        return self.number(SCALARS[kind], what)


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    cursor.check_count(count, 13, "keys")
    for _ in range(count):
        key = cursor.string("a key", MAX_NAME)
        if key in metadata:
            raise cursor.error(f"expected each key once, got {key!r} again")
        cursor.spend(200)  # a dict's entry, at its emptiest
        metadata[key] = cursor.value(f"{key!r}")
    return metadata


def _tensor_info(cursor: _Cursor) -> tuple[GGUFTensor, int]:
    """A tensor with its offset from the start of the tensor data, and the same offset."""
    name = cursor.string("a tensor's name", MAX_NAME)
    dims = cursor.number("I", f"dimension counts of {name!r}")
    if dims > MAX_DIMS:
        raise cursor.error(f"expected tensor {name!r} of at most {MAX_DIMS} dimensions, got {dims}")
    shape = tuple(reversed(cursor.numbers("Q", dims, f"dimensions of {name!r}")))
    if any(n == 0 or n >= 1 << 63 for n in shape):
        raise cursor.error(f"expected tensor {name!r} with dimensions of 1 to 2^63 - 1, got {shape}")
    code, offset = cursor.number("I", f"types of {name!r}"), cursor.number("Q", f"offsets of {name!r}")
    cursor.spend(600)  # the tuples and the dict's entry
    if code not in TENSOR_TYPES:
        return GGUFTensor(name, shape, f"type {code}", offset, 0), offset
    type, elements, width = TENSOR_TYPES[code]
    if elements > 1 and (not shape or shape[-1] % elements):
        raise cursor.error(f"expected rows of tensor {name!r} in multiples of {elements} for {type}, got shape {shape}")
    nbytes = prod(shape) // elements * width
    if nbytes > cursor.size:
        raise cursor.error(f"expected tensor {name!r} to fit the file's {cursor.size} bytes, got shape {shape}")
    return GGUFTensor(name, shape, type, offset, nbytes), offset


def _alignment(cursor: _Cursor, metadata: Mapping[str, Any]) -> int:
    value = metadata.get("general.alignment", 32)
    if type(value) is not int or not ALIGNMENTS[0] <= value <= ALIGNMENTS[1] or value & (value - 1):
        low, high = ALIGNMENTS
        raise cursor.error(f"expected general.alignment to be a power of two from {low} to {high}, got {value!r:.40}")
    return value


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, GGUFTensor]:
    cursor.check_count(count, 24, "tensors")
    infos: dict[str, GGUFTensor] = {}
    for _ in range(count):
        tensor, offset = _tensor_info(cursor)
        if tensor.name in infos:
            raise cursor.error(f"expected each tensor once, got {tensor.name!r} again")
        if offset % alignment:
            raise cursor.error(f"expected tensor {tensor.name!r} at a multiple of {alignment}, got offset {offset}")
        infos[tensor.name] = tensor
    start = -(-cursor.at // alignment) * alignment
    placed = {name: t._replace(offset=start + t.offset) for name, t in infos.items()}
    end, before = start, ""
    for tensor in sorted(placed.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset + tensor.nbytes > cursor.size:
            raise cursor.error(
                f"expected tensor {tensor.name!r} ({tensor.nbytes} bytes at {tensor.offset}) inside the file's "
                f"{cursor.size} bytes"
            )
        if tensor.offset < end:
            raise cursor.error(f"expected tensors that do not overlap, got {before!r} and {tensor.name!r}")
        end, before = tensor.offset + tensor.nbytes, tensor.name
    return placed


def _map(path: Path) -> mmap.mmap:
    """The file's bytes as private memory, so that torch may have a writable view that never reaches the file."""
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size < HEADER.size:
            raise FormatError(f"{path.name}: expected a GGUF file of at least {HEADER.size} bytes")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def open_gguf(path: str | os.PathLike[str]) -> GGUF:
    """Reads the metadata of a GGUF file and maps its tensors.

    Raises:
        FormatError: the file is malformed, big-endian, or of another version.
        OSError: it cannot be opened.
    """
    path = Path(path)
    data = _map(path)
    cursor = _Cursor(data, path.name)
    magic, version, tensor_count, key_count = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise cursor.error(f"expected the magic {MAGIC!r}, got {magic!r}")
    if version not in (2, 3):
        known = "a big-endian file" if version & 0xFFFF == 0 and version else f"version {version}"
        raise cursor.error(f"expected GGUF version 2 or 3, little-endian, got {known}")
    cursor.at = HEADER.size
    metadata = _metadata(cursor, key_count)
    tensors = _tensors(cursor, tensor_count, _alignment(cursor, metadata))
    return GGUF(path, version, metadata, tensors, data)


class Typed(NamedTuple):
    """A metadata value with its GGUF type spelled out; a list with the type of its elements."""

    type: str  # a name in TYPE_NAMES
    value: Any


def _guess_type(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return (
            "uint32" if 0 <= value < 1 << 32 else "uint64" if value > 0 else "int32" if value >= -1 << 31 else "int64"
        )
    names = {float: "float32", str: "string", list: "array", tuple: "array"}
    for kind, name in names.items():
        if isinstance(value, kind):
            return name
    raise TypeError(f"expected metadata of str, bool, int, float or lists of them, got {type(value).__name__}")


def _guess_element_type(values: Any) -> str:
    """One type that holds every element; int32 for a list without elements."""
    names = {_guess_type(v) for v in values} or {"int32"}
    if len(names) == 1:
        return names.pop()
    if names <= {"uint32", "int32", "uint64", "int64"}:
        return "uint64" if all(v >= 0 for v in values) else "int64"
    raise TypeError(f"expected a list of one type, got {' and '.join(sorted(names))}")


def _encode(value: Any, name: str) -> bytes:
    """The bytes of a value without its type."""
    if name == "string":
        raw = value.encode()
        return struct.pack("<Q", len(raw)) + raw
    if name == "array":
        typed = value if isinstance(value, Typed) else Typed(_guess_element_type(value), value)
        code = TYPE_NAMES.index(typed.type)
        head = struct.pack("<IQ", code, len(typed.value))
        if code in SCALARS:
            return head + struct.pack(f"<{len(typed.value)}{SCALARS[code]}", *typed.value)
        return head + b"".join(_encode(v, typed.type) for v in typed.value)
    return struct.pack("<" + SCALARS[TYPE_NAMES.index(name)], value)


def _encode_value(value: Any) -> bytes:
    """The bytes of a value after those of its type."""
    if isinstance(value, Typed) and not isinstance(value.value, (list, tuple)):
        name, value = value
    else:
        name = "array" if isinstance(value, Typed) else _guess_type(value)
    return struct.pack("<I", TYPE_NAMES.index(name)) + _encode(value, name)


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor | tuple[Tensor, str, tuple[int, ...]]],
    *,
    version: int = 3,
) -> None:
    """Writes a GGUF file, whole or not at all.

    Args:
        path: replaced if it exists, once the new file is complete.
        metadata: str, bool, int, float, lists of them, or `Typed` values. An int is stored as the first of uint32,
            int32, uint64, int64 that holds it, a float as float32. `general.alignment` is honoured; 32 without it.
        tensors: fp32, fp16 or bf16 tensors; or (blocks, type, shape) with `blocks` from `blocks.quantize`.
        version: 2 or 3; their layouts are the same.

    Raises:
        ValueError, TypeError: a value or tensor that the format cannot hold. Nothing is written.
    """
    names = {f.dtype: f.name for f in blocks.FORMATS.values() if f.dtype is not None}
    value = metadata.get("general.alignment", 32)
    alignment = value.value if isinstance(value, Typed) else value
    infos, stored, offset = [], [], 0
    for name, entry in tensors.items():
        if isinstance(entry, Tensor):
            if entry.dtype not in names:
                raise ValueError(f"expected tensor {name!r} in fp32, fp16 or bf16, got {entry.dtype}")
            entry = (entry.detach().cpu().contiguous().reshape(-1).view(torch.uint8), names[entry.dtype], entry.shape)
        raw, type, shape = entry
        if raw.dtype != torch.uint8 or raw.numel() != blocks.nbytes(type, shape) or len(shape) > MAX_DIMS:
            raise ValueError(
                f"expected tensor {name!r} as uint8 blocks of {type} for shape {tuple(shape)} of at most {MAX_DIMS} "
                f"dimensions, got {raw.numel()} of {raw.dtype}"
            )
        info = struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), blocks.FORMATS[type].code, offset)
        infos.append(_encode(name, "string") + info)
        stored.append(raw.contiguous())
        offset += -(-raw.numel() // alignment) * alignment
    keys = [_encode(key, "string") + _encode_value(value) for key, value in metadata.items()]
    head = HEADER.pack(MAGIC, version, len(infos), len(keys)) + b"".join(keys) + b"".join(infos)
    with replacing(Path(path)) as temporary, open(temporary, "wb") as file:
        file.write(head)
        for raw in stored:
            file.write(bytes(-file.tell() % alignment))
            file.write(memoryview(_bytes(raw)))
        file.write(bytes(-file.tell() % alignment))


def _bytes(raw: Tensor) -> Any:
    """The memory of a contiguous uint8 tensor as a Python buffer, without NumPy and without a copy."""
    return (ctypes.c_char * raw.numel()).from_address(raw.data_ptr())
