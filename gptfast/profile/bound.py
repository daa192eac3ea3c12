"""What bounds a stretch of machine code on one multiprocessor: the cycles that each of its units needs for it, from the
instructions' names and the vendors' peak rates. The largest is the least that the stretch can take: its roofline. What
of its bytes lies in a cache the code doesn't say, so that memory stands beside it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rates:
    """Of one SM or compute unit, a clock. Peak rates of the data sheets, at the boost clock."""

    matrix: float  # FLOP of 16-bit matrix instructions, dense, summed in fp32
    fp32: float  # FLOP of vector instructions
    special: float  # exp2, reciprocals and their like
    issue: float  # instructions of a warp
    memory: float  # bytes of DRAM, its share of the whole
    lanes: int = 32


RATES = {
    "sm_80": Rates(2048, 128, 16, 4, 10.2),  # A100: 312 TFLOP/s, 108 SMs at 1.41 GHz, 1,555 GB/s
    "sm_90": Rates(4096, 256, 16, 4, 13.9),  # H100 SXM: 989 TFLOP/s, 132 at 1.83 GHz, 3,350 GB/s
    "sm_100": Rates(8192, 256, 16, 4, 29.2),  # B200: 2,250 TFLOP/s, 148 at 1.85 GHz, 8,000 GB/s
    "sm_120": Rates(1024, 256, 16, 4, 3.7),  # RTX PRO 6000: 504 TFLOP/s, 188 at 2.6 GHz, 1,792 GB/s; GeForce half of it
    # MI300X: 1,307 TFLOP/s, 304 at 2.1 GHz, 5,300 GB/s. 64 lanes take one of its four vector units for 4 clocks.
    "gfx942": Rates(2048, 256, 16, 1, 8.3, lanes=64),
}
UNITS = ("matrix", "fp32", "special", "issue")  # on the chip
NVIDIA_MATRIX = re.compile(r"^(?:HGMMA|IGMMA|QGMMA)\.(\d+)x(\d+)x(\d+)|^[HIQ]MMA\.(16816|1688|16832|16864)\b")
AMD_MATRIX = re.compile(r"^v_mfma_\w+?_(\d+)x(\d+)x(\d+)")
NVIDIA_FLOPS = {"FFMA": 2, "FADD": 1, "FMUL": 1, "FFMA2": 4, "FADD2": 2, "FMUL2": 2, "HFMA2": 4, "HADD2": 2, "HMUL2": 2}
AMD_FLOPS = re.compile(r"^v_(pk_)?(fma|fmac|add|sub|mul)_f32")
# What an instruction is there for, by the first pattern that it matches.
PATTERNS = {
    kind: re.compile(f"^(?:{'|'.join(patterns)})")
    for kind, patterns in {
        "matrix": ("[HIQBD]G?MMA", r"UTC\w*MMA", "v_mfma"),
        "special": ("MUFU", "v_(exp|log|rcp|rsq|sqrt|sin|cos)_"),
        "fp32": (
            "[FHD](FMA|ADD|MUL|MNMX|SET|SEL|CHK|SWZADD)",
            "FHADD",
            r"v_(pk_)?(fma|fmac|add|sub|mul|max|min|max3|div)\w*_f(32|16|64)",
        ),
        "global memory": (r"LDG(STS)?(\.|$)", "STG", "UTMA", "RED", "ATOM", "(global|buffer|flat)_"),
        "shared memory": ("LDS", "STS", "LDTM", "STTM", "SHFL", "ds_"),
        "conversions and moves": (
            "F2|I2F|PRMT|U?MOV|U?SEL|CS2R|R2UR|S2U?R|U?P2R|R2P",
            r"IMAD\.MOV",
            "v_(mov|cvt|perm|cndmask|accvgpr)|s_mov",
        ),
        "control": (
            "BRA|BAR|EXIT|NOP|SYNCS|WARP|DEPBAR|LDGDEPBAR|FENCE|MEMBAR|BSSY|BSYNC|ELECT|VOTE|UTCBAR|CALL|RET",
            "s_(c?branch|barrier|waitcnt|nop|endpgm|sleep)",
        ),
    }.items()
}


def kind(name: str) -> str:
    """What an instruction is there for, one of PATTERNS; "integers" if none of them matches."""
    return next((k for k, pattern in PATTERNS.items() if pattern.match(name)), "integers")


def mix(names: Iterable[str]) -> dict[str, int]:
    """Issue slots by what they are for, the most first."""
    return dict(Counter(map(kind, names)).most_common())


def matrix_flops(name: str) -> int | None:
    """FLOP that one warp adds by one matrix instruction; 0 of another; None where the name doesn't say the shape (the
    fifth generation's, tcgen05, has it in a register)."""
    if found := AMD_MATRIX.match(name):
        return 2 * int(found[1]) * int(found[2]) * int(found[3])
    if found := NVIDIA_MATRIX.match(name):
        if found[1]:  # of a group of four warps
            return 2 * int(found[1]) * int(found[2]) * int(found[3]) // 4
        return 2 * 16 * 8 * int(found[4][2:].removeprefix("8"))
    return None if PATTERNS["matrix"].match(name) else 0


def vector_flops(name: str) -> int:
    """FLOP of one lane of a vector instruction."""
    if found := AMD_FLOPS.match(name):
        return (2 if found[1] else 1) * (2 if found[2] in ("fma", "fmac") else 1)
    return NVIDIA_FLOPS.get(name.partition(".")[0], 0)


def _times_as_slow(name: str) -> float:
    """A matrix instruction's FLOP, in those of 16-bit numbers that take as long."""
    if name.startswith("v_"):
        return 8 if name.endswith("_f32") else 1
    return 2 if "TF32" in name else 0.5 if name.startswith(("I", "Q")) else 1


@dataclass(frozen=True)
class Turn:
    """One turn of a kernel's hottest loop, or all of a kernel without loops, for one program."""

    flops: float | None  # None where matrix instructions don't say their shape
    bytes: int  # asked of global memory
    cycles: dict[str, float]  # that each unit of one multiprocessor needs, were it alone; "matrix" may be missing
    dram: float  # cycles, if nothing of it lies in a cache
    mix: dict[str, int]  # issue slots of a warp by what they are for

    @property
    def bound(self) -> str:
        """The unit that needs the longest: what is on the chip can't be faster."""
        return max(self.cycles, key=lambda unit: self.cycles[unit])


def turn(resources: Mapping[str, Any], arch: str) -> Turn:
    """Of a kernel's gptfast.profile.sass.Resources, as a dictionary."""
    rates = RATES[arch]
    names = [name for name, count in resources["hot"].items() for _ in range(count)]
    warps = resources["threads"] // rates.lanes
    lanes = warps * rates.lanes
    shapes = [matrix_flops(name) for name in names]
    matrix = [(flops or 0) * warps for flops in shapes]
    vector = lanes * sum(map(vector_flops, names))
    special = lanes * sum(kind(name) == "special" for name in names)
    issued = warps * sum(rates.lanes == 32 or name.startswith("v_") for name in names)
    cycles = {
        "matrix": sum(flops * _times_as_slow(name) for flops, name in zip(matrix, names)) / rates.matrix,
        "fp32": vector / rates.fp32,
        "special": special / rates.special,
        "issue": issued / rates.issue,
    }
    known = None not in shapes
    if not known:
        del cycles["matrix"]
    return Turn(
        flops=float(sum(matrix) + vector) if known else None,
        bytes=resources["hot_bytes"],
        cycles=cycles,
        dram=resources["hot_bytes"] / rates.memory,
        mix=mix(names),
    )
