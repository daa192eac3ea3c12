"""The block sizes of every kernel: pure functions of shape, dtype and architecture, each line naming the limit that it
touches. No tuner: a result depends on the blocks that it is summed in, so those of a reduction depend on the shape
alone, and the architecture chooses only what changes no order of summation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Tile:
    """What a kernel is compiled with: block sizes by name, a program's warps, the stages of its loops' pipeline."""

    num_warps: int
    num_stages: int = 1
    blocks: Mapping[str, int] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of a launch."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    shared: int  # bytes of shared memory
    lanes: int = 32  # threads of a warp
    registers: int = 65536  # 32-bit registers of one SM, which its programs share
    threads: int = 2048  # of one SM


LIMITS = {
    "sm_80": Limits(163 << 10),
    "sm_86": Limits(99 << 10, threads=1536),
    "sm_89": Limits(99 << 10, threads=1536),
    "sm_90": Limits(227 << 10),
    "sm_100": Limits(227 << 10),
    "sm_103": Limits(227 << 10),
    "sm_120": Limits(99 << 10, threads=1536),
    "gfx90a": Limits(64 << 10, lanes=64),
    "gfx942": Limits(64 << 10, lanes=64),
    "gfx950": Limits(160 << 10, lanes=64),
}


def limits(arch: str) -> Limits:
    """An architecture's limits; of one that isn't listed, the smallest of its maker's."""
    return LIMITS.get(arch) or LIMITS["sm_86" if arch.startswith("sm_") else "gfx90a"]


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def bounded(n: int, low: int, high: int) -> int:
    return max(low, min(n, high))


# --- rows: norms, activations, rope, embedding, the optimizer


# --- the vocabulary: sampling, losses


def sampling_chunk(V: int) -> int:
    """Tokens of a program of sampling, and how many a row may keep in lists: at most 4096, for their places are kept in
    16 bits, the sums of half their weights in 31, and 32 programs read one row of 128k."""
    return bounded(next_power_of_2(V) // 4, 256, 4096)


def sampling_tile(chunk: int, has_history: bool = False) -> Tile:
    """16 tokens of a chunk to a thread: two 128-bit loads of 16-bit logits in flight; 8 where each has two counts."""
    return Tile(bounded(chunk // (256 if has_history else 512), 1, 16), blocks={"CHUNK": chunk})


def sampling_choose_tile(chunk: int) -> Tile:
    """A row's cuts: 512 x 16 masses of 64 bits at a time take 64 of the 255 registers of each thread."""
    return Tile(8, blocks={"CHUNK": chunk, "BLOCK": 512, "GROUP": 32})


def product_tile(M: int, N: int, itemsize: int, adds: bool, arch: str) -> Tile:
    """K in blocks of 64 16-bit or 32 fp32 numbers, always: 128 bytes, one swizzled line of shared memory."""
    if itemsize == 4:  # no tensor cores: 32 sums in the registers of each of 256 threads
        return Tile(8, 2, blocks={"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32, "GROUP": 8})
    roomy = limits(arch).shared >= 163 << 10 and limits(arch).lanes == 32
    # What is added to takes as many registers as the sums: 128 x 256 of both would spill.
    wide = roomy and N > 2048 and not adds
    blocks = {"BLOCK_M": 128, "BLOCK_N": 256 if wide else 128, "BLOCK_K": 64, "GROUP": 8}
    stage = (blocks["BLOCK_M"] + blocks["BLOCK_N"]) * blocks["BLOCK_K"] * itemsize
    return Tile(8, bounded(limits(arch).shared // stage, 2, 4 if arch != "sm_80" else 3), blocks)


def vocabulary_tile(V: int) -> Tile:
    """A row's columns at a time: 16 for each thread of 8 warps."""
    block = bounded(next_power_of_2(V), 64, 4096)
    return Tile(bounded(block // 512, 1, 8), blocks={"BLOCK": block})


def logits_rows(V: int) -> int:
    """Rows whose logits exist at a time: a quarter of a gigabyte of them in fp32."""
    return bounded(next_power_of_2((1 << 26) // V) // 2, 128, 8192)


def sequence_tile(T: int) -> Tile:
    """A sequence's tokens at a time, 8 to a thread: sums in fp64 and a scan's two numbers take 4 registers each."""
    block = bounded(next_power_of_2(T), 64, 1024)
    return Tile(bounded(block // 256, 1, 4), blocks={"BLOCK": block})
