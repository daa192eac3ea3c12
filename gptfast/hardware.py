"""This machine and its ceilings: what no kernel can beat, measured once and cached; public figures of GPUs.

Rates are in units per second: floating-point operations ("fp32", and "bf16" into fp32 sums, which is fp32's where the
machine has no instruction of its own for it; a multiply-add counts two), 8-bit integer operations into 32-bit sums
("int8", likewise) and bytes ("l2", "l3", "dram" reading; "copy" counts bytes read and bytes written).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import re
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

if TYPE_CHECKING:  # this file stands on the ground: it imports no op
    from gptfast.ops.spec import Cost

NAMES = ("fp32", "bf16", "int8", "l2", "l3", "dram", "copy")
ROUNDS = 12  # timings of each ceiling: the best is the ceiling, the median says how quiet the machine was
SAMPLE_S = 4e-3  # what one timing takes: far above the clock's step and a launch, far below a scheduler's time slice
DRAM_BYTES = 256 << 20  # read for the DRAM ceiling where the caches don't ask for more


@dataclass(frozen=True)
class Cache:
    """One level of the data caches: bytes of one instance, and how many of this process's cores share it."""

    level: int
    bytes: int
    shared_by: int


@dataclass(frozen=True)
class Machine:
    """What this process runs on."""

    cpu: str  # the model's name
    cores: int  # that this process may use
    isa: str | None  # in use by the CPU kernels; None where they are not built
    isas: tuple[str, ...]  # that this machine and build can run, the narrowest first
    memory: int  # bytes
    caches: tuple[Cache, ...]  # the smallest first; empty where the system doesn't tell
    torch: str
    threads: int  # torch.get_num_threads()
    python: str
    os: str

    @property
    def slug(self) -> str:
        """A folder name for this kind of machine: the CPU's model and the number of cores."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.cpu} {self.cores} cores".lower()).strip("-")

    def cache_bytes(self, level: int) -> int:
        """Bytes of all instances of a cache level that this process's cores reach; 0 where there is none."""
        found = [c for c in self.caches if c.level == level]
        return found[0].bytes * max(1, self.cores // found[0].shared_by) if found else 0


@dataclass(frozen=True)
class Rate:
    """Units per second over several timings."""

    median: float
    best: float


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do at most: rates[name][threads], names as at the top of this file."""

    rates: dict[str, dict[int, Rate]]

    def best(self, name: str, threads: int) -> float:
        """The most that so many threads can have, in units per second: never less than fewer threads had."""
        measured = self.rates[name]
        most = max(rate.best for n, rate in measured.items() if n <= threads)
        if threads in measured:
            return most
        return max(most, min(measured[1].best * threads, measured[max(measured)].best))


@dataclass(frozen=True)
class Gpu:
    """A GPU's public figures: dense bf16 matrix FLOP/s with fp32 sums, bytes/s of its memory, multiprocessors."""

    name: str
    bf16_flops: float
    bytes_per_s: float
    multiprocessors: int


GPUS = {  # the vendors' data sheets; dense, not sparse; boost clock
    gpu.name: gpu
    for gpu in (
        Gpu("A100-SXM-80GB", 312e12, 2.039e12, 108),
        Gpu("H100-SXM", 989e12, 3.35e12, 132),
        Gpu("H200-SXM", 989e12, 4.8e12, 132),
        Gpu("RTX 4090", 165e12, 1.008e12, 128),
        Gpu("RTX 5090", 209.5e12, 1.792e12, 170),
        Gpu("MI300X", 1307e12, 5.3e12, 304),
    )
}


def machine() -> Machine:
    """This machine, as the process sees it now."""
    try:
        from gptfast import _cpu

        isa, isas = _cpu.isa(), tuple(_cpu.isas())
    except ImportError:
        isa, isas = None, ()
    return Machine(
        cpu=_cpu_model(),
        cores=_cores(),
        isa=isa,
        isas=isas,
        memory=_memory(),
        caches=_caches(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        os=platform.platform(terse=True),
    )


def ceilings(refresh: bool = False) -> Ceilings:
    """This machine's ceilings, for one thread and for all cores.

    Measured in a second or two at the first call on a kind of machine (CPU model, cores, instruction set) and kept in
    the user's cache folder. `refresh` measures again and keeps the better figure of each: a loud neighbour can hide a
    ceiling but not raise it. An unreadable cache is measured again. Raises RuntimeError where the CPU kernels are not
    built.
    """
    here = machine()
    if here.isa is None:
        raise RuntimeError("the ceilings are measured by gptfast._cpu, which is not built: see gptfast.backends()")
    path = _cache_file(here)
    kept = _read(path, here)
    if kept is not None and not refresh:
        return kept
    measured = _measure(here)
    if kept is not None:
        measured = _better(measured, kept)
    _write(path, measured)
    return measured


def read_rate(threads: int) -> float:
    """Bytes/s that the DRAM ceiling's program reads just now: one timing, nothing kept. To be compared with what else
    was measured in the same minutes. Raises RuntimeError where the CPU kernels are not built."""
    here = machine()
    if here.isa is None:
        raise RuntimeError("memory is read by gptfast._cpu, which is not built: see gptfast.backends()")
    global _reader
    _reader = _reader or _Probe(here)
    return _reader.rate("dram", threads, _reader.bytes)


def roofline(cost: Cost, threads: int | None = None, limits: Ceilings | None = None) -> float:
    """Seconds below which a call of this cost can't come: its arithmetic and its traffic, whichever takes longer.

    Traffic is bounded by the innermost of L2, L3 and DRAM that holds all the bytes; work barely too large for a cache
    still finds part of itself there and may beat its bound a little. `threads` defaults to PyTorch's setting.
    """
    here, limits = machine(), limits or ceilings()
    threads = min(threads or here.threads, here.cores)
    arithmetic = cost.flops / limits.best(cost.unit, threads)
    return max(arithmetic, cost.bytes / limits.best(_home(cost.bytes, here), threads))


def _home(size: float, here: Machine) -> str:
    """The innermost level that holds so many bytes."""
    for level in (2, 3):
        if 0 < size <= here.cache_bytes(level):
            return f"l{level}"
    return "dram"


def _cpu_model() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^([^\t:]+?)\s*: (.*)$", info, re.MULTILINE))
    name = fields.get("model name", platform.machine())
    family, model = fields.get("cpu family"), fields.get("model")  # a hypervisor may hide the name, hardly these
    return f"{name} (family {family}, model {model})" if family and model and not re.search(r"\d", name) else name


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _caches() -> tuple[Cache, ...]:
    """The data caches of the first core that this process may use, from /sys."""
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}
    found = []
    for index in sorted(Path(f"/sys/devices/system/cpu/cpu{min(mine)}/cache").glob("index*")):
        try:
            kind, size = (index / "type").read_text().strip(), (index / "size").read_text().strip()
            level, sharers = int((index / "level").read_text()), (index / "shared_cpu_list").read_text().strip()
        except (OSError, ValueError):
            continue
        if kind != "Instruction" and (digits := re.fullmatch(r"(\d+)([KMG]?)", size)):
            scale = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[digits[2]]
            found.append(Cache(level, int(digits[1]) * scale, max(1, len(mine & _listed(sharers)))))
    return tuple(sorted(found, key=lambda c: c.level))


def _listed(ranges: str) -> set[int]:
    """The numbers of a list such as 0-3,8."""
    ends = [part.partition("-") for part in ranges.split(",") if part]
    return {n for first, _, last in ends for n in range(int(first), int(last or first) + 1)}


def _measure(here: Machine) -> Ceilings:
    """Times every ceiling once a round, so that a loud moment costs each of them one timing and none of them all."""
    probe = _Probe(here)
    private = (here.cache_bytes(2) or here.cores << 20) // here.cores // 2  # bytes for each thread: half of its L2
    shared = here.cache_bytes(3) // 2 or 4 * private * here.cores
    arithmetic = {"fp32": 0, "bf16": 0, "int8": 0}
    sizes = arithmetic | {"l2": private, "l3": shared, "dram": probe.bytes, "copy": probe.bytes // 2}
    jobs = [
        (name, threads, sizes[name] * threads if name == "l2" else sizes[name])
        for name in NAMES
        for threads in sorted({1, here.cores})
    ]
    rounds = [[probe.rate(*job) for job in jobs] for _ in range(ROUNDS)]
    rates: dict[str, dict[int, Rate]] = {name: {} for name in NAMES}
    for (name, threads, _), found in zip(jobs, zip(*rounds)):
        rates[name][threads] = Rate(statistics.median(found), max(found))
    return Ceilings(rates)


class _Probe:
    """Runs the ceilings kernel on buffers of its own."""

    KINDS: ClassVar = {"fp32": 0, "bf16": 4, "int8": 1, "l2": 2, "l3": 2, "dram": 2, "copy": 3}  # Ceilings, kernels.h

    def __init__(self, here: Machine) -> None:
        self.bytes = min(max(DRAM_BYTES, 4 * here.cache_bytes(3)), here.memory // 8)
        self.data = torch.zeros(self.bytes, dtype=torch.uint8)
        self.copy = torch.zeros(self.bytes // 2, dtype=torch.uint8)
        self.work = torch.zeros(1, dtype=torch.float64)
        self.sink = torch.zeros(2 * 16 * here.cores)
        self.turns: defaultdict[str, int] = defaultdict(lambda: 1)

    def rate(self, name: str, threads: int, size: int) -> float:
        """Units per second of one timing. One thread alone says how many turns last: the wait for a second one, whose
        core a neighbour has taken, would look like work."""
        seconds = self._run(name, threads, size, self.turns[name])
        while threads == 1 and seconds < SAMPLE_S / 2:
            self.turns[name] *= 2
            seconds = self._run(name, threads, size, self.turns[name])
        return self.work.item() / seconds

    def _run(self, name: str, threads: int, size: int, turns: int) -> float:
        from gptfast import _cpu

        self.sink.fill_(0.5)  # acc * 0.5 + 0.5 stays near 1
        start = time.perf_counter()
        _cpu.ceilings(
            *(threads,),
            work=self.work.data_ptr(),
            sink=self.sink.data_ptr(),
            data=self.data.data_ptr(),
            copy=self.copy.data_ptr(),
            bytes=size,
            turns=turns,
            what=self.KINDS[name],
        )
        return time.perf_counter() - start


_reader: _Probe | None = None  # its buffers are kept: new ones cost page faults


def _better(a: Ceilings, b: Ceilings) -> Ceilings:
    """Of each rate the one with the higher best."""
    return Ceilings(
        {
            name: {n: max(rate, b.rates[name][n], key=lambda r: r.best) for n, rate in of_name.items()}
            for name, of_name in a.rates.items()
        }
    )


def _cache_file(here: Machine) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "gptfast" / f"ceilings-{here.slug}-{here.isa}.json"


def _read(path: Path, here: Machine) -> Ceilings | None:
    """The ceilings kept in a file; None unless all of them are there and make sense."""
    counts = sorted({1, here.cores})
    try:
        kept = json.loads(path.read_text())
        rates = {
            name: {n: Rate(float(kept[name][str(n)]["median"]), float(kept[name][str(n)]["best"])) for n in counts}
            for name in NAMES
        }
    except (OSError, ValueError, TypeError, KeyError):
        return None
    sound = all(0 < rate.median <= rate.best < 1e18 for of_name in rates.values() for rate in of_name.values())
    return Ceilings(rates) if sound else None


def _write(path: Path, measured: Ceilings) -> None:
    """Whole or not at all; a folder that can't be written just means measuring again next time."""
    part = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(dataclasses.asdict(measured)["rates"], indent=1))
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
