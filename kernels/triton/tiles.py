"""The block sizes of every kernel: pure functions of shape, dtype and architecture, each line naming the limit that it
touches. No tuner: a result depends on the blocks that it is summed in, so those of a reduction depend on the shape
alone, and the architecture chooses only what changes no order of summation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


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


AMPERE = ("sm_80", "sm_86", "sm_89")  # and Ada: mma.sync, no copies of blocks by descriptor


def limits(arch: str) -> Limits:
    """An architecture's limits; of one that isn't listed, the smallest of its maker's."""
    return LIMITS.get(arch) or LIMITS["sm_86" if arch.startswith("sm_") else "gfx90a"]


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def bounded(n: int, low: int, high: int) -> int:
    return max(low, min(n, high))


# --- rows: norms, activations, rope, embedding, the optimizer


CHUNKS, SMALLEST = 256, 8  # chunks of rows, at most, that a sum over rows is made in; their sizes' common factor


def chunk_of(N: int, BLOCK_R: int) -> int:
    """How many rows a chunk of a sum over N rows has. 256 chunks are two programs on each of an H100's 132 SMs; their
    sums are 1/16 of what rows of 64 or more read."""
    return max(-(-N // (CHUNKS * SMALLEST)) * SMALLEST, SMALLEST, BLOCK_R)


def layer_norm(C: int, arch: str) -> Tile:
    """Rows of up to 16,384 columns fit in registers: 32 fp32 values in each of 512 threads. Narrow rows share a program
    so that it has a whole warp's 16-byte accesses to make. Wider rows go in blocks."""
    BLOCK_C = bounded(next_power_of_2(C), 1, 16384 if C <= 16384 else 8192)
    BLOCK_R = bounded(1024 // BLOCK_C, 1, 16)
    lanes = limits(arch).lanes
    return Tile(
        num_warps=bounded(BLOCK_R * BLOCK_C // (16 * lanes), 1, 512 // lanes),  # 16 values a thread
        blocks={"BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C},
    )


def layer_norm_backward(C: int, arch: str, dropout: bool = False) -> Tile:
    """Seven values of each element are live at once (dy, s, weight, two sums, products): rows of up to 8,192 columns
    fit in the registers of 1,024 threads. Wider rows go in blocks of columns. Philox's four words need registers, too:
    512 threads of 64 spill, half as many don't."""
    BLOCK_C = bounded(next_power_of_2(C), 1, 8192 if C <= 8192 else 1024)
    BLOCK_R = bounded(1024 // BLOCK_C, 1, 16)
    lanes = limits(arch).lanes
    return Tile(
        num_warps=bounded(BLOCK_R * BLOCK_C // ((16 if dropout else 8) * lanes), 1, 512 // lanes),  # values a thread
        blocks={"BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C, "STAGES": 1},
    )


def layer_norm_means(C: int, arch: str) -> Tile:
    """Blocks of 4,096: 16 values of each tensor in each of 256 threads."""
    return Tile(num_warps=256 // limits(arch).lanes, blocks={"BLOCK_C": 4096})


def column_sums() -> Tile:
    """64 columns are a cache line of 256 bytes of each chunk; 32 chunks at once, 16 values a thread."""
    return Tile(num_warps=4, blocks={"BLOCK_R": 32, "BLOCK_C": 64})


def elementwise(C: int, arch: str) -> Tile:
    """2,048 elements a program: each of 128 threads has two 16-byte accesses of 16-bit numbers to each tensor on their
    way, and a row of a usual width leaves little of its last block empty."""
    BLOCK_C = bounded(next_power_of_2(C), 1, 1024)
    lanes = limits(arch).lanes
    return Tile(num_warps=128 // lanes, blocks={"BLOCK_R": 2048 // BLOCK_C, "BLOCK_C": BLOCK_C})


def bias_gelu_backward(C: int, arch: str) -> Tile:
    """Four rows of 256 columns at a time: 8 values of each tensor in each of 128 threads, beside as many sums."""
    BLOCK_C = bounded(next_power_of_2(C), 1, 256)
    return Tile(num_warps=128 // limits(arch).lanes, blocks={"BLOCK_R": 1024 // BLOCK_C, "BLOCK_C": BLOCK_C})


def bias_gelu_chunk(N: int, tile: Tile) -> int:
    """Rows of a chunk: 64 chunks at most, since its blocks of columns are programs too."""
    BLOCK_R = tile.blocks["BLOCK_R"]
    return max(-(-N // (64 * BLOCK_R)) * BLOCK_R, BLOCK_R)


def rope(H: int, D: int, R: int, arch: str) -> Tile:
    """1,024 pairs a program: 8 of them in each of 128 threads, one 16-byte access of 16-bit numbers to either half."""
    BLOCK_R = next_power_of_2(max(R // 2, 1))
    BLOCK_H = bounded(1024 // BLOCK_R, 1, next_power_of_2(H))
    blocks = {"BLOCK_H": BLOCK_H, "BLOCK_R": BLOCK_R, "BLOCK_REST": next_power_of_2(D - R) if D > R else 0}
    return Tile(num_warps=bounded(BLOCK_H * BLOCK_R // 256, 1, 4) * 32 // limits(arch).lanes or 1, blocks=blocks)


def embedding_backward(C: int, arch: str) -> Tile:
    """Four rows of 256 columns at a time, so that four reads are on their way to a row that many places took."""
    BLOCK_C = bounded(next_power_of_2(C), 1, 256)
    return Tile(num_warps=128 // limits(arch).lanes, blocks={"BLOCK_R": 4, "BLOCK_C": BLOCK_C})


def adamw(count: int, arch: str) -> Tile:
    """1,024 elements at a time: 8 of each tensor in each of 128 threads, so that 16-bit numbers too are read 16 bytes
    at a time. BLOCK_T holds the table's tensors."""
    return Tile(num_warps=128 // limits(arch).lanes, blocks={"BLOCK_T": next_power_of_2(count), "BLOCK_N": 1024})


def total_norm() -> Tile:
    return Tile(num_warps=4, blocks={"BLOCK_N": 1024})


# --- the vocabulary: sampling, losses


def sampling_chunk(V: int) -> int:
    """Tokens of a program of sampling, and how many a row may keep in lists: at most 4096, for their places are kept in
    16 bits, the sums of half their weights in 31, and 32 programs read one row of 128k."""
    return bounded(next_power_of_2(V) // 4, 256, 4096)


def sampling_process_tile(V: int) -> Tile:
    """A histogram keeps its bins / 32 counts in the registers of each thread: 32 of them, twice."""
    return Tile(4, blocks={"BLOCK": bounded(next_power_of_2(V), 128, 1024), "BLOCK_L": 512})


def sampling_tile(chunk: int) -> Tile:
    """16 tokens of a chunk to a thread: two 128-bit loads of 16-bit logits in flight, 8 masses in registers."""
    return Tile(bounded(chunk // 512, 1, 16), blocks={"CHUNK": chunk})


def sampling_choose_tile(chunk: int) -> Tile:
    """A row's cuts: 512 x 16 masses of 64 bits at a time take 64 of the 255 registers of each thread."""
    return Tile(8, blocks={"CHUNK": chunk, "BLOCK": 512, "GROUP": 32})


def product_tile(M: int, N: int, itemsize: int, adds: bool, arch: str) -> Tile:
    """K in blocks of 64 16-bit or 32 fp32 numbers, always: 128 bytes, one swizzled line of shared memory."""
    if itemsize == 4:  # no tensor cores: 32 sums, and as many of a block, in the registers of each of 256 threads
        # For 2 stages ptxas makes room for three programs on sm_90, and spills; on sm_80 it spills from 16 sums on.
        m, n = (32, 64) if arch == "sm_80" else (64, 128)
        blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": 32, "GROUP": 8}
        return Tile(8, 3 if arch == "sm_90" else 2, blocks=blocks)
    roomy = limits(arch).shared >= 163 << 10 and limits(arch).lanes == 32
    # What is added to takes as many registers as the sums: 128 x 256 of both would spill; sm_100 spills without it.
    wide = roomy and N > 2048 and not adds and arch not in ("sm_100", "sm_103")
    blocks = {"BLOCK_M": 128, "BLOCK_N": 256 if wide else 128, "BLOCK_K": 64, "GROUP": 8}
    stage = (blocks["BLOCK_M"] + blocks["BLOCK_N"]) * blocks["BLOCK_K"] * itemsize
    return Tile(8, bounded(limits(arch).shared // stage, 2, 4 if arch != "sm_80" else 3), blocks)


SPLIT_ROWS = 8  # up to which linear's chunks of K are programs of their own: their sums are 1/4 of 4-bit weights then


def linear(M: int, itemsize: int, arch: str) -> Tile:
    """64 outputs are the least that Hopper's matrix instruction has, 16 rows what loads and stores of one warp fill.
    CHUNK is the order of summation: of fp32 as long as a plain sum stays accurate, of 16-bit numbers 16 blocks of K."""
    few = M <= 16
    if itemsize == 4:  # no tensor cores: up to 32 sums, and as many of a block and of all, in each thread's registers
        many = 32 if arch in ("sm_80", "sm_100", "sm_103") else 64  # which spills there
        blocks = {"BLOCK_N": 64, "BLOCK_R": 16 if few else many, "BLOCK_K": 16, "CHUNK": 256}
        stages = 3 if arch == "sm_120" and not few else 2  # for 2 ptxas makes room for two programs there, and spills
        return Tile(4 if few else 8, stages, _one_instruction(blocks, arch))
    # sm_120 has mma.sync's operands in registers beside two tiles of 64 sums: half of the outputs fit.
    wide = 64 if few or arch == "sm_120" else 128
    blocks = {"BLOCK_N": wide, "BLOCK_R": 16 if few else 128, "BLOCK_K": 64, "CHUNK": 1024}
    stage = (blocks["BLOCK_N"] + blocks["BLOCK_R"]) * blocks["BLOCK_K"] * itemsize
    return Tile(4 if few else 8, bounded(limits(arch).shared // stage, 1, 4), _one_instruction(blocks, arch))


def linear_quantised(M: int, itemsize: int, minimum: bool, arch: str) -> Tile:
    """Three tiles of sums (a group's, a chunk's, all) are in registers: 32 of each in 256 threads. `minimum`: and those
    of x, as many, so that half of the outputs fit in fp32. A group takes a program about a microsecond, one after
    another: chunks are as short as their sums' way through memory allows."""
    few = M <= 16
    blocks = {"BLOCK_N": 64 if few or (itemsize == 4 and minimum) else 128, "BLOCK_R": 16 if few else 64, "CHUNK": 128}
    # For 3 stages ptxas makes room for two programs there, and spills.
    stages = 2 if arch in AMPERE and itemsize == 2 and minimum and not few else 3
    return Tile(4 if few else 8, stages, _one_instruction(blocks, arch))


def _one_instruction(blocks: dict[str, int], arch: str) -> dict[str, int]:
    """AMD's compiler takes another matrix instruction, of another order, for a wide tile than for a narrow one unless
    it is told which."""
    return blocks | ({"matrix_instr_nonkdim": 16} if arch.startswith("gfx") else {})


def linear_merge(N: int) -> Tile:
    """4 values to a thread of 128, so that a chunk's sums come 16 bytes at a time."""
    return Tile(4, blocks={"BLOCK": bounded(next_power_of_2(N), 64, 512)})


def vocabulary_tile(V: int) -> Tile:
    """A row's columns at a time: 16 for each thread of 8 warps."""
    block = bounded(next_power_of_2(V), 64, 4096)
    return Tile(bounded(block // 512, 1, 8), blocks={"BLOCK": block})


def logits_rows(V: int) -> int:
    """Rows whose logits exist at a time: a quarter of a gigabyte of them in fp32."""
    return bounded(next_power_of_2((1 << 26) // V) // 2, 128, 8192)


def sequence_tile(T: int) -> Tile:
    """A sequence's tokens at a time, 4 to a thread: sums in fp64 and a scan's two numbers take 4 registers each, and
    with 8 to a thread sm_80 and sm_100 spill two of them."""
    block = bounded(next_power_of_2(T), 64, 512)
    return Tile(bounded(block // 128, 1, 4), blocks={"BLOCK": block})


def flat_tile() -> Tile:
    """1,024 elements a program, 8 to a thread: 16 bytes of 16-bit numbers."""
    return Tile(num_warps=4, blocks={"BLOCK": 1024})


def group_tile(n: int) -> Tile:
    """Groups of n as rows, 1,024 elements a program and at most as many of a group at a time."""
    block = bounded(next_power_of_2(n), 1, 1024)
    return Tile(num_warps=4, blocks={"BLOCK_R": 1024 // block, "BLOCK_C": block})


# --- attention


def attention(D: int, dtype: torch.dtype, arch: str, plain: bool = True, reads: bool = False) -> Tile:
    """D = 128: 128 rows by 8 warps hold 64 sums, 64 scores and 32 packed probabilities in each thread, of 255
    registers; 2 stages of 128 keys and values are 128 KiB of shared memory beside 32 KiB of queries. Hopper holds the
    queries in 32 registers more, unless terms of scores need them (not `plain`): read from shared memory with 64 keys
    they would take all of its 128 bytes a clock. `reads`: a bias or a mask is among the terms. The order of summation
    is that of BLOCK_N, which no architecture changes, in COLUMNS sums of a row: 8, a matrix instruction's, of which a
    thread has two."""
    BLOCK_D = bounded(next_power_of_2(D), 16, 256)
    if dtype.itemsize == 4:
        blocks = {"BLOCK_M": 64 if BLOCK_D <= 64 else 32, "BLOCK_N": 32 if BLOCK_D <= 128 else 16}
        warps = 8 if plain or limits(arch).lanes == 32 else 4  # of four each may have 512 registers
        stages = 2
        if not plain and limits(arch).lanes == 32 and BLOCK_D <= 128:  # what spills with neither 2 nor the other number
            stages = 3 if reads or BLOCK_D <= 64 else 1
        return Tile(warps, stages, {**blocks, "BLOCK_D": BLOCK_D, "HOLDS_Q": 0, "JOINS": 0, "COLUMNS": 1})
    blocks = {"BLOCK_M": 128, "BLOCK_N": 64 if BLOCK_D <= 128 else 32, "BLOCK_D": BLOCK_D}
    hopper = arch == "sm_90"
    more = {"HOLDS_Q": int(hopper and plain and BLOCK_D <= 128), "JOINS": int(hopper), "COLUMNS": 8 if hopper else 1}
    if limits(arch).lanes == 64:  # 3 stages don't fit in 64 KiB, and 2 are kept in registers: 255 of 256 at D = 128
        warps = 8 if plain or BLOCK_D <= 64 else 4  # of four each may have 512 registers
        return Tile(warps, 2 if BLOCK_D > 128 and plain else 1, {**blocks, **more})
    crowded = arch not in ("sm_90", "sm_100", "sm_103")  # sums and operands share 255 registers
    if crowded and (BLOCK_D > 128 or (BLOCK_D > 64 and not plain)):
        blocks["BLOCK_M"] = 64
    stages = 3 if BLOCK_D <= 128 else 2
    if reads and BLOCK_D == 128:  # a bias is fetched ahead as keys are, and its addresses need what registers are left
        blocks["BLOCK_M"], stages = 64, 1 if arch in ("sm_100", "sm_103") else 2
    return Tile(num_warps=8, num_stages=stages, blocks={**blocks, **more})


def attention_dq(D: int, dtype: torch.dtype, arch: str, plain: bool = True, reads: bool = False) -> Tile:
    """Three products: dq's sums and two tiles of scores, all in registers. Hopper reads both operands from shared
    memory and later datacentre chips keep sums in a memory of their own; elsewhere operands need registers too, and
    half of the rows fit, as they do beside terms of scores (not `plain`). BLOCK_N is the order of summation."""
    BLOCK_D = bounded(next_power_of_2(D), 16, 256)
    if dtype.itemsize == 4:
        blocks = {"BLOCK_M": 32, "BLOCK_N": 32 if BLOCK_D <= 64 else 16, "BLOCK_D": BLOCK_D}
        if limits(arch).lanes == 64:
            return Tile(8 if plain or not reads else 4, 2, blocks)  # of four each may have 512 registers
        # For 2 stages ptxas takes as many registers as let more programs in, and spills: beside terms, on sm_90, and on
        # sm_120, which has no room for those programs' memory.
        third = BLOCK_D == 128 and (arch in ("sm_90", "sm_120") or not plain)
        return Tile(num_warps=8, num_stages=2 + third, blocks=blocks)
    if limits(arch).lanes == 64:  # from D = 80 on 255 registers are too few, and only four warps may have 512
        blocks = {"BLOCK_M": 64, "BLOCK_N": 64 if BLOCK_D <= 128 else 32, "BLOCK_D": BLOCK_D}
        return Tile(num_warps=8 if plain and BLOCK_D <= 64 else 4, blocks=blocks)
    small = arch in AMPERE and reads  # what else a pair has is read into registers, too
    if (arch == "sm_120" or small) and BLOCK_D <= 64:  # ptxas spills with more rows, at 255 registers
        warps = 4 if plain or reads else 8  # beside dropout's words it spills at 168, too
        return Tile(warps, num_stages=2, blocks={"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_D": BLOCK_D})
    if arch == "sm_90" and BLOCK_D <= 128:  # two programs to a multiprocessor: 1.2x at D = 64 on an H200, 1.02x at 128
        warps = 8 if reads and BLOCK_D == 128 else 4
        return Tile(warps, num_stages=3, blocks={"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": BLOCK_D})
    roomy = arch in ("sm_100", "sm_103") and (BLOCK_D <= 64 or (plain and BLOCK_D == 128))
    BLOCK_M = 128 if roomy else 64
    full = BLOCK_D > 128 and limits(arch).shared < 100 << 10  # what 64 rows of q and dout, and two stages, take
    if small or full:
        BLOCK_M = 32
    blocks = {"BLOCK_M": BLOCK_M, "BLOCK_N": 64 if BLOCK_D <= 128 else 32, "BLOCK_D": BLOCK_D}
    # For 2 stages ptxas makes room for three programs on sm_100, and spills beside terms; 3 have room for one.
    third = arch in ("sm_100", "sm_103") and BLOCK_D == 128 and not plain and not reads
    return Tile(num_warps=8, num_stages=2 + third, blocks=blocks)


def attention_dkdv(
    D: int, dtype: torch.dtype, arch: str, plain: bool = True, reads: bool = False, varlen: bool = False
) -> Tile:
    """Four products: D = 128 and 128 keys are 128 sums of dk and dv in each of 256 threads, beside 16 scores of each
    kind for 32 queries; with 64 queries it spills. 64 keys in 128 threads are as many sums: at D = 64 1.17x on an H200,
    at 128 as well, but there it spills. Elsewhere than on Hopper half of the keys fit. `plain`: without terms of
    scores; `reads`: a bias or a mask is among them; `varlen`: the ends of sequences are in registers, too, and half of
    the keys. BLOCK_M is the order of summation."""
    BLOCK_D = bounded(next_power_of_2(D), 16, 256)
    if dtype.itemsize == 4:
        blocks = {"BLOCK_M": 32 if BLOCK_D <= 128 else 16, "BLOCK_N": 32, "BLOCK_D": BLOCK_D}
        if limits(arch).lanes == 64:  # AMD's matrix instructions want tiles in registers: four warps may have 512
            return Tile(4, blocks=blocks)
        # D = 128: 32 sums of dk and dv in each of 256 threads spill where ptxas leaves room for two programs, and 16 in
        # each of 512 beside terms of scores.
        stages = 1
        if not plain and (BLOCK_D == 128 or (BLOCK_D <= 64 and reads)):
            # The number of stages with which ptxas doesn't make room for a second program, and spill.
            blocks["BLOCK_N"], stages = 16, 1 if BLOCK_D == 128 and reads else 2
        if BLOCK_D > 128 and limits(arch).shared < 100 << 10:  # 32 keys, their values and what they have are 100 KiB
            blocks["BLOCK_N"] = 16
        wide = BLOCK_D == 128 and (plain or arch == "sm_120")  # which has no memory for the second program
        return Tile(16 if wide else 8, stages, blocks)
    if limits(arch).lanes == 64:  # as for dq; keys of which every thread has 256 sums, at D = 256 too
        blocks = {"BLOCK_M": 32, "BLOCK_N": 64 if BLOCK_D <= 128 else 16, "BLOCK_D": BLOCK_D}
        return Tile(num_warps=8 if plain and BLOCK_D <= 64 else 4, blocks=blocks)
    if not plain:  # with 64 keys all spill
        stages = 3 if arch == "sm_90" and BLOCK_D <= 64 else 2
        if BLOCK_D > 128 and arch in AMPERE:  # these with 32 too, if anything is fetched ahead
            stages = 1
        return Tile(4 if BLOCK_D <= 64 else 8, stages, {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_D": BLOCK_D})
    if arch == "sm_120" and BLOCK_D <= 64:  # ptxas spills with more keys, at 255 registers
        return Tile(num_warps=4, num_stages=2, blocks={"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_D": BLOCK_D})
    if arch == "sm_90" and BLOCK_D <= 64:
        return Tile(num_warps=4, num_stages=3, blocks={"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_D": BLOCK_D})
    BLOCK_N = 32 if BLOCK_D > 128 or varlen else 128 if arch == "sm_90" else 64
    return Tile(num_warps=8, num_stages=2, blocks={"BLOCK_M": 32, "BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D})


def attention_kvcache(R: int, D: int, dtype: torch.dtype, arch: str, int8: bool = False, paged: bool = False) -> Tile:
    """R: rows of a KV head, its query heads times the queries. Chunks of 256 keys: one sequence of 8,192 tokens with 8
    KV heads is 256 programs for an H100's 132 SMs, and what the chunks leave is 1/64 of the keys and values in bf16."""
    BLOCK_D = bounded(next_power_of_2(D), 16, 256)
    BLOCK_M = bounded(next_power_of_2(R), 16, 64 if dtype.itemsize == 2 else 16)
    BLOCK_N = (64 if dtype.itemsize == 2 else 32) // (2 if BLOCK_D > 128 else 1)
    blocks = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D, "CHUNK": 256}
    if arch == "sm_120" and BLOCK_M == 64 and BLOCK_D > 64:  # 64 sums, 32 scores: what is fetched ahead would spill
        return Tile(num_warps=4, blocks=blocks)
    if dtype.itemsize == 4:  # bytes that are fetched ahead are made numbers ahead, too, in registers: they would spill
        return Tile(num_warps=8, num_stages=1 if int8 else 2, blocks=blocks)
    crowded = paged and arch == "sm_90" and BLOCK_D <= 64  # for 3 ptxas makes room for seven programs, and spills
    return Tile(num_warps=4, num_stages=2 if crowded else 3, blocks=blocks)


def attention_append(D: int) -> Tile:
    """A head a warp."""
    return Tile(num_warps=1)


def attention_merge(D: int) -> Tile:
    """16 chunks at a time: 16 values of 128 dimensions in each of 128 threads."""
    return Tile(num_warps=4, blocks={"BLOCK_S": 16})
