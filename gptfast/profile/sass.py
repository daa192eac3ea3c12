"""What compiled kernels use and do, read from their machine code: NVIDIA's by the disassembler that Triton brings,
AMD's from the listing that its compiler writes."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Per SM: registers, shared memory in KiB, of which one program may have, warps, programs.
SM = {
    "sm_80": (65536, 164, 163, 64, 32),
    "sm_86": (65536, 100, 99, 48, 16),
    "sm_89": (65536, 100, 99, 48, 24),
    "sm_90": (65536, 228, 227, 64, 32),
    "sm_100": (65536, 228, 227, 64, 32),
    "sm_120": (65536, 100, 99, 48, 24),
}
AMD_SHARED = 64  # KiB of LDS, of a CDNA 3 compute unit and of one program there
TENSOR = re.compile(r"^([HIQBOD]G?MMA|UTC\w*MMA)")
LABEL = re.compile(r"^(\.L_[\w$.]+):")
SHORTEST = 16  # instructions of a loop that is more than a wait
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_.]+)?)\s*([^;]*);")


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel."""

    registers: int  # of a thread
    spills: int  # instructions that move registers to memory or back
    shared: int  # bytes
    threads: int  # of a program
    instructions: int
    tensor: int  # matrix instructions
    loads: dict[str, int]  # of global memory, by their bits for one thread
    stores: dict[str, int]
    occupancy: float  # resident warps, of those that an SM has room for
    limit: str  # what keeps it from being higher: "registers", "shared", "warps"
    fits: bool  # its shared memory is what the machine has
    # The loops without loops of their own, in the order of the code: the instructions of one turn by name, "HGMMA".
    # Every instruction takes an issue slot of its warp.
    loops: list[dict[str, int]] = field(default_factory=list)
    # The loop of most instructions, or the whole program if there is none: its instructions by full name, and the bytes
    # of global memory that a program asks for in it.
    hot: dict[str, int] = field(default_factory=dict)
    hot_bytes: int = 0


def slots(loop: dict[str, int]) -> int:
    """Issue slots of one warp in one turn of a loop."""
    return sum(loop.values())


def resources(compiled: Any, arch: str, described: int = 0) -> Resources:
    """What a kernel that Triton compiled for `arch` uses. described: bytes of the blocks that it copies by descriptors,
    each once a turn: the instruction doesn't say how many."""
    return _amd(compiled) if arch.startswith("gfx") else _nvidia(compiled, arch, described)


def _nvidia(compiled: Any, arch: str, described: int) -> Resources:
    text, usage = _disassembled(compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage[-500:]
    registers, stack = int(found[1]), int(found[2])
    names = [m[1] for m in INSTRUCTION.finditer(text)]
    shared = compiled.metadata.shared
    required = re.search(r"\.reqntid (\d+)", compiled.asm["ptx"])
    threads = int(required[1]) if required else 32 * compiled.metadata.num_warps
    occupancy, limit = _occupancy(arch, registers, shared, threads)
    turns = _loops(text)
    hot = max(turns, key=len, default=names)
    asked = (_widths(hot, ("LDG", "LDGSTS")), _widths(hot, ("STG",)))
    by_descriptor = described if any(name.startswith("UTMALDG") for name in hot) else 0
    return Resources(
        registers=registers,
        spills=sum(name.startswith(("LDL", "STL")) for name in names) + (stack > 0),
        shared=shared,
        threads=threads,
        instructions=len(names),
        tensor=sum(bool(TENSOR.match(name)) for name in names),
        loads=_widths(names, ("LDG", "LDGSTS")),
        stores=_widths(names, ("STG",)),
        occupancy=occupancy,
        limit=limit,
        fits=shared <= SM[arch][2] << 10,
        loops=[_by_short_name(turn) for turn in turns],
        hot=dict(Counter(hot)),
        hot_bytes=threads * sum(_bytes(widths) for widths in asked) + by_descriptor,
    )


def _bytes(widths: dict[str, int]) -> int:
    """Of one thread's accesses by their bits."""
    return sum(int(bits) // 8 * count for bits, count in widths.items())


def loops(text: str) -> list[dict[str, int]]:
    """Resources.loops of a listing."""
    return [_by_short_name(turn) for turn in _loops(text)]


def _by_short_name(names: list[str]) -> dict[str, int]:
    return dict(Counter(name.partition(".")[0] for name in names))


def _loops(text: str) -> list[list[str]]:
    """The instructions of each inner loop of NVIDIA's listing."""
    names: list[str] = []
    labels: dict[str, int] = {}
    branches: dict[int, str] = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(names)
        elif found := INSTRUCTION.search(line):
            if found[1].startswith("BRA") and (target := re.search(r"(\.L_[\w$.]+)", found[2])):
                branches[len(names)] = target[1]
            names.append(found[1])
    return _turns(names, labels, branches, "EXIT")


def _turns(names: list[str], labels: dict[str, int], branches: dict[int, str], end: str) -> list[list[str]]:
    """A loop is what lies between a branch backwards and its target. What holds the end of the program is none: there a
    wait that took longer returns to where it was left."""
    ends = {n for n, name in enumerate(names) if name == end}
    spans = []
    for n, target in branches.items():
        first = labels.get(target, n + 1)
        if n - first >= SHORTEST and not any(first <= at <= n for at in ends):
            spans.append((first, n))
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [names[first : last + 1] for first, last in inner]


def _disassembled(cubin: bytes) -> tuple[str, str]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run: Any = {"capture_output": True, "text": True, "timeout": 120}
        listing = subprocess.run([tools / "nvdisasm", "-c", file.name], **run)
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], **run)
    return listing.stdout, usage.stdout + usage.stderr


def _widths(names: list[str], kinds: tuple[str, ...]) -> dict[str, int]:
    """How many accesses of each width: LDG.E.128, LDG.E.U16, LDG.E (32 bits), LDGSTS.E.BYPASS.128."""
    found: Counter[str] = Counter()
    for name in names:
        kind, *parts = name.split(".")
        if kind in kinds:
            sizes = [re.sub(r"^[US]", "", p) for p in parts if re.fullmatch(r"[US]?(8|16)|64|128|256", p)]
            found[sizes[0] if sizes else "32"] += 1
    return dict(found)


def _occupancy(arch: str, registers: int, shared: int, threads: int) -> tuple[float, str]:
    total, shared_kib, _, warps, programs = SM[arch]
    mine = -(-threads // 32)
    by = {  # of equals the first is named
        "warps": min(warps // mine, programs),
        "registers": total // (-(-registers * 32 // 256) * 256) // mine if registers else programs,
        "shared": (shared_kib << 10) // (-(-(shared + 1024) // 128) * 128),  # a program costs 1 KiB of its own
    }
    limit = min(by, key=lambda name: by[name])
    return by[limit] * mine / warps, limit


def _amd(compiled: Any) -> Resources:
    listing = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"{name}:?\s+(\d+)", listing)
        return int(found[1]) if found else 0

    def widths(kind: str) -> dict[str, int]:
        found: Counter[str] = Counter()
        for m in re.finditer(rf"\b(?:global|buffer|flat)_{kind}_(dwordx?(\d?)|\w*short\w*|\w*byte\w*)", listing):
            word = m[1]
            found[str(32 * int(m[2] or 1)) if word.startswith("dword") else "16" if "short" in word else "8"] += 1
        return dict(found)

    names, turns = _amd_loops(listing)
    hot = max(turns, key=len, default=names)

    def asked(name: str) -> int:
        """Bytes of one lane's access."""
        found = re.match(r"(?:global|buffer|flat)_(?:load|store)_(dwordx?(\d?)|\w*short|\w*byte)", name)
        return 0 if not found else 4 * int(found[2] or 1) if found[1].startswith("dword") else 1 + ("short" in found[1])

    registers, threads = number(r"\.vgpr_count"), 64 * compiled.metadata.num_warps
    waves = number("Occupancy")
    return Resources(
        registers=registers,
        # Scalar registers that move to lanes of vector registers (.sgpr_spill_count) reach no memory.
        spills=len(re.findall(r"^\s+scratch_(?:load|store)_", listing, re.MULTILINE)) + (number("ScratchSize") > 0),
        shared=compiled.metadata.shared,
        threads=threads,
        instructions=len(re.findall(r"^\s+[vs]_\w+|^\s+(?:global|buffer|ds)_\w+", listing, re.MULTILINE)),
        tensor=len(re.findall(r"\bv_mfma", listing)),
        loads=widths("load"),
        stores=widths("store"),
        occupancy=waves / 8,
        limit="registers",
        fits=compiled.metadata.shared <= AMD_SHARED << 10,
        loops=[dict(Counter(turn)) for turn in turns],
        hot=dict(Counter(hot)),
        hot_bytes=threads * sum(map(asked, hot)),
    )


def _amd_loops(listing: str) -> tuple[list[str], list[list[str]]]:
    """All instructions of AMD's listing, and those of each inner loop."""
    names: list[str] = []
    labels: dict[str, int] = {}
    branches: dict[int, str] = {}
    for line in listing.splitlines():
        if label := re.match(r"^(\.LBB\w+):", line):
            labels[label[1]] = len(names)
        elif found := re.match(r"^\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)\s*(\.LBB\w+)?", line):
            if found[2]:
                branches[len(names)] = found[2]
            names.append(found[1])
    return names, _turns(names, labels, branches, "s_endpgm")
