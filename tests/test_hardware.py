"""The machine's description, its ceilings and their cache, and the roofline made of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from gptfast import hardware
from gptfast.hardware import Cache, Ceilings, Machine, Rate
from gptfast.kernels import reason_missing
from gptfast.ops.spec import Cost

MIB = 1 << 20
needs_cpu = pytest.mark.skipif(reason_missing("cpu") is not None, reason="the C++ kernels are not built")


def some_machine(cores: int = 4, l2: int = MIB, l3: int = 32 * MIB) -> Machine:
    return Machine(
        cpu="Test (R) CPU @ 3 GHz",
        cores=cores,
        isa="avx2",
        isas=("baseline", "avx2"),
        memory=16 << 30,
        caches=(Cache(1, 32 << 10, 1), Cache(2, l2, 1), Cache(3, l3, cores)),
        torch="2",
        threads=cores,
        python="3",
        os="test",
    )


def some_ceilings(cores: int = 4) -> Ceilings:
    """100 units per second and thread for arithmetic and L2; L3 300 and DRAM 150 at most; one thread 100 of each."""
    single = {"fp32": 100, "bf16": 200, "int8": 400, "l2": 100, "l3": 100, "dram": 100, "copy": 100}
    every = {name: rate * cores for name, rate in single.items()} | {"l3": 300, "dram": 150, "copy": 150}
    return Ceilings({name: {1: Rate(50, single[name]), cores: Rate(60, every[name])} for name in hardware.NAMES})


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """A known machine, measured at once, its cache in a folder of the test's own."""
    known = some_machine()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(hardware, "machine", lambda: known)
    monkeypatch.setattr(hardware, "_measure", lambda machine: some_ceilings(machine.cores))
    return known


def test_this_machine() -> None:
    m = hardware.machine()
    assert m.cpu and m.memory > 1 << 28 and 1 <= m.cores <= (os.cpu_count() or 1)
    assert m.threads == torch.get_num_threads()
    assert [c.level for c in m.caches] == sorted(c.level for c in m.caches)
    assert all(c.bytes >= 1024 and 1 <= c.shared_by <= m.cores for c in m.caches)
    assert (m.isa is None) == (reason_missing("cpu") is not None)
    assert m.isa is None or m.isa in m.isas


def test_a_slug_is_a_folder_name() -> None:
    assert some_machine().slug == "test-r-cpu-3-ghz-4-cores"


@pytest.mark.parametrize(
    ("text", "numbers"), [("0-3,8", {0, 1, 2, 3, 8}), ("5", {5}), ("0-1,4-5", {0, 1, 4, 5}), ("", set())]
)
def test_lists_of_cpus(text: str, numbers: set[int]) -> None:
    assert hardware._listed(text) == numbers


def test_cache_bytes_counts_every_instance() -> None:
    m = some_machine(cores=4)
    assert m.cache_bytes(2) == 4 * MIB  # private: one for each core
    assert m.cache_bytes(3) == 32 * MIB  # shared by all four
    assert m.cache_bytes(4) == 0


@needs_cpu
def test_measured_ceilings_make_sense(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = hardware.ceilings()
    cores = hardware.machine().cores
    assert set(found.rates) == set(hardware.NAMES)
    for name, rates in found.rates.items():
        assert set(rates) == {1, cores}, name
        assert all(0 < rate.median <= rate.best for rate in rates.values()), name
        assert found.best(name, cores) >= found.best(name, 1)
    # Any machine of this century: between 0.5 GFLOP/s and 2 TFLOP/s, 0.2 GB/s and 10 TB/s for one core.
    assert 5e8 < found.best("fp32", 1) < 2e12
    assert 2e8 < found.best("dram", 1) < 1e13


@needs_cpu
@pytest.mark.parametrize("what", [0, 1, 2, 3])
def test_the_kernel_counts_its_work(what: int) -> None:
    from gptfast import _cpu

    work, sink = torch.zeros(1, dtype=torch.float64), torch.full((64,), 0.5)
    data = torch.arange(1 << 16, dtype=torch.int64).view(torch.uint8)
    copy = torch.zeros_like(data)

    def units(turns: int) -> float:
        sink.fill_(0.5)
        _cpu.ceilings(
            *(1,),
            work=work.data_ptr(),
            sink=sink.data_ptr(),
            data=data.data_ptr(),
            copy=copy.data_ptr(),
            bytes=data.numel(),
            turns=turns,
            what=what,
        )
        return work.item()

    assert units(3) == 3 * units(1) > 0
    if what >= 2:
        assert units(1) == data.numel() * (what - 1)  # a copy reads and writes each byte
    assert torch.equal(copy, data) == (what == 3)
    assert what != 0 or (sink[:4].isfinite().all() and not sink[:4].eq(0.5).any())  # computed, and neither inf nor nan


def test_measured_once_and_kept(here: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = hardware.ceilings()
    files = list((tmp_path / "gptfast").iterdir())
    assert [f.suffix for f in files] == [".json"], "one file, and no half-written one beside it"
    monkeypatch.setattr(hardware, "_measure", lambda machine: pytest.fail("measured again"))
    assert hardware.ceilings() == first == some_ceilings()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"fp32": {"1": 3}}', '{"fp32": {"1": {"median": "x", "best": 1}}}', "\x00\xff" * 50],
)
def test_a_corrupt_cache_is_measured_again(here: Machine, content: str) -> None:
    path = hardware._cache_file(here)
    path.parent.mkdir(parents=True)
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert hardware.ceilings() == some_ceilings()
    assert set(json.loads(path.read_text())) == set(hardware.NAMES)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), 1e30])
def test_a_senseless_cache_is_measured_again(here: Machine, value: float) -> None:
    hardware.ceilings()
    path = hardware._cache_file(here)
    kept = json.loads(path.read_text())
    kept["dram"]["1"] = {"median": value, "best": value}
    path.write_text(json.dumps(kept))
    assert hardware.ceilings() == some_ceilings()


def test_a_folder_that_cannot_be_written(here: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert hardware.ceilings() == some_ceilings()


def test_refresh_keeps_the_better_figure(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    hardware.ceilings()
    known = some_ceilings().rates
    other = {name: {n: Rate(r.median, r.best / 2) for n, r in rates.items()} for name, rates in known.items()}
    other["fp32"] = {n: Rate(r.median, r.best * 2) for n, r in known["fp32"].items()}
    monkeypatch.setattr(hardware, "_measure", lambda machine: Ceilings(other))
    better = hardware.ceilings(refresh=True)
    assert better.best("fp32", 1) == 200 and better.best("dram", 1) == 100
    assert hardware.ceilings() == better


def test_without_the_kernels_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    m = some_machine()
    monkeypatch.setattr(hardware, "machine", lambda: Machine(**{**vars(m), "isa": None, "isas": ()}))
    with pytest.raises(RuntimeError, match="not built"):
        hardware.ceilings()


def test_best_between_the_measured_counts() -> None:
    c = some_ceilings(cores=4)
    assert [c.best("fp32", n) for n in (1, 2, 3, 4)] == [100, 200, 300, 400]
    assert [c.best("dram", n) for n in (1, 2, 3, 4)] == [100, 150, 150, 150]
    contended = Ceilings({"fp32": {1: Rate(90, 100), 4: Rate(20, 30)}})
    assert contended.best("fp32", 4) == contended.best("fp32", 2) == 100  # four can have what one had


@pytest.mark.parametrize(
    ("cost", "threads", "seconds"),
    [
        (Cost(flops=1e9, bytes=64), 1, 1e7),  # arithmetic
        (Cost(flops=1e9, bytes=64), 4, 2.5e6),
        (Cost(flops=1e9, bytes=64, unit="int8"), 1, 2.5e6),
        (Cost(flops=1e9, bytes=64, unit="bf16"), 4, 1.25e6),
        (Cost(flops=0, bytes=2 * MIB), 4, 2 * MIB / 400),  # all in L2
        (Cost(flops=0, bytes=20 * MIB), 4, 20 * MIB / 300),  # all in L3
        (Cost(flops=0, bytes=200 * MIB), 4, 200 * MIB / 150),  # memory
        (Cost(flops=0, bytes=200 * MIB), 64, 200 * MIB / 150),  # no more threads than cores
        (Cost(flops=0, bytes=0), 1, 0.0),
    ],
)
def test_the_roofline_by_hand(here: Machine, cost: Cost, threads: int, seconds: float) -> None:
    assert hardware.roofline(cost, threads, some_ceilings()) == pytest.approx(seconds)


@pytest.mark.parametrize("gpu", hardware.GPUS.values(), ids=hardware.GPUS)
def test_gpu_figures_are_in_units_of_one(gpu: hardware.Gpu) -> None:
    """FLOP/s and bytes/s, not tera and giga; and a ratio that no GPU of these generations leaves."""
    assert 1e14 < gpu.bf16_flops < 1e16 and 5e11 < gpu.bytes_per_s < 1e13 and 64 <= gpu.multiprocessors <= 512
    assert 100 < gpu.bf16_flops / gpu.bytes_per_s < 400


@needs_cpu
def test_an_instruction_set_has_all_kernels_or_says_which() -> None:
    from gptfast import _cpu

    every = set(_cpu.own_kernels("baseline"))
    own = {isa: set(_cpu.own_kernels(isa)) for isa in _cpu.isas()}
    training = {"attention_backward", "product", "vocabulary_logits", "vocabulary_gradients"}
    some = {"avx512vnni": {"linear_int8"}, "avx512bf16": training | {"attention", "linear", "linear_packed"}}
    assert own == {isa: some.get(isa, every) for isa in own}
    with pytest.raises(ValueError, match="instruction set 'mmx' was asked for"):
        _cpu.own_kernels("mmx")
