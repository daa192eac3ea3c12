"""Triton's kernels compiled for machines that aren't here: no spills, shared memory within the part, wide accesses.

`make test` compiles a sample; `make test-aot` everything that ships, on every architecture.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptfast.profile import aot, sass, shipped, table
from tests import where

pytest.importorskip("triton")
if not where.on_the_cpu():
    pytest.skip("kernels are compiled in the CPU's session", allow_module_level=True)

SAMPLE = {
    "sm_80": ["rms_norm 4096 bf16"],
    "sm_90": ["layer_norm 4096 bf16", "swiglu 11008 bf16", "rope 32/8 128 bf16", "adamw bf16", "attention 128 bf16"],
    "sm_100": ["layer_norm 768 fp32"],
    "sm_120": ["rms_norm 8192 bf16"],
    "gfx942": ["rms_norm 4096 bf16", "swiglu 11008 bf16"],
}
TABLE = Path(__file__).parent / "data" / "kernels.csv"
EVERYTHING = [pytest.param(arch, shipped.names(), id=f"{arch}-all", marks=pytest.mark.slow) for arch in aot.TARGETS]
# Every tensor's rows are read and written once, as wide as the machine can. What isn't a row's element: two statistics.
ROWS = ("_layer_norm_kernel", "_bias_gelu_kernel", "_gated_kernel", "_gated_backward_kernel", "_rope_kernel")


@pytest.mark.parametrize(
    ("arch", "names"), [*(pytest.param(*item, id=item[0]) for item in SAMPLE.items()), *EVERYTHING]
)
def test_what_ships_compiles_well(arch: str, names: list[str]) -> None:
    found = list(aot.survey(names, [arch]))
    assert {c.call for c in found} == set(names)
    assert not [problem for c in found for problem in problems(c)]
    by, kept = table.read(TABLE)
    if by != table.compiler():
        pytest.skip(f"the kernels compile well; {TABLE.name} was written with {by}, here is {table.compiler()}")
    said = table.differences(kept, found)
    assert not said, "if that is meant: gptfast kernels --table tests/data/kernels.csv\n" + "\n".join(said)


def test_the_table_has_everything_and_no_spills() -> None:
    _, kept = table.read(TABLE)
    has = {(call, arch) for (call, _, _), cells in kept.items() for arch in cells}
    assert has == {(call, arch) for arch in aot.TARGETS for call in shipped.names()}
    assert not [(key, arch, c) for key, cells in kept.items() for arch, c in cells.items() if c.split()[1] != "0"]


def test_a_table_says_what_changed(tmp_path: Path) -> None:
    def compiled(call: str, arch: str, **changed: Any) -> aot.Compiled:
        numbers = {"registers": 96, "spills": 0, "shared": 1024, "occupancy": 0.625, "limit": "registers", **changed}
        return aot.Compiled(call, arch, "k", {}, numbers)

    first, second = shipped.names()[:2]
    file = tmp_path / "t.csv"
    table.write(file, [compiled(first, "sm_90"), compiled(first, "sm_90", registers=40), compiled(second, "sm_80")])
    by, kept = table.read(file)
    assert by == table.compiler() and kept[first, "k", "1"] == {"sm_90": "96 0 1024 62.5% registers"}
    assert not table.differences(kept, [compiled(second, "sm_80")])
    now = [compiled(first, "sm_90", registers=128, occupancy=0.5)]
    assert table.differences(kept, now) == [
        f"{first}, sm_90, k 1: registers 96 -> 128, occupancy 62.5% -> 50%",
        f"{first}, sm_90, k 2: all of it 40 0 1024 62.5% registers -> none",
    ]
    table.write(file, now)  # the rest stays
    assert table.read(file)[1] == {
        (first, "k", "1"): {"sm_90": "128 0 1024 50% registers"},
        (second, "k", "1"): {"sm_80": "96 0 1024 62.5% registers"},
    }
    file.write_text("a,b\n")
    with pytest.raises(ValueError, match="expected a table of sm_80"):
        table.read(file)


def problems(c: aot.Compiled) -> list[str]:
    what = f"{c.call}, {c.arch}, {c.kernel} {c.options}"
    r = c.resources
    if r is None:
        return [f"{what}: {c.error}"]
    said = []
    if r["spills"]:
        said.append(f"{what}: {r['spills']} instructions spill registers ({r['registers']} are in use)")
    if not r["fits"]:
        said.append(f"{what}: {r['shared']} bytes of shared memory are more than a program may have")
    if c.kernel in ROWS and int(c.options.get("BLOCK_C", c.options.get("BLOCK_R", "0"))) >= 64:
        narrow = {
            w: n for w, n in (*r["loads"].items(), *r["stores"].items()) if int(w) < (128 if "bf16" in c.call else 64)
        }
        allowed = 0
        if c.kernel == "_layer_norm_kernel":  # a row's mean, rstd; weight and bias, where threads have more bytes
            allowed = 2 + 2 * (int(c.options["BLOCK_C"]) * 2 < 16 * r["threads"])
        if not c.arch.startswith("gfx") and sum(narrow.values()) > allowed:
            said.append(f"{what}: accesses of fewer than 128 bits: {narrow}")
    return said


@pytest.mark.parametrize("C", [4096, 8192])
def test_layer_norm_moves_no_byte_twice(C: int) -> None:
    """bf16 with a residual: x, residual, weight and bias in; y and the sum out."""
    [kernel] = [c for c in aot.survey([f"layer_norm {C} bf16"], ["sm_90"]) if c.kernel == "_layer_norm_kernel"][:1]
    r = kernel.resources
    assert r is not None
    assert not r["loops"]  # each access is made once
    assert bytes_of(r["loads"], r["threads"]) == 4 * C * 2
    assert bytes_of(r["stores"], r["threads"]) == 2 * C * 2
    assert set(r["loads"]) == set(r["stores"]) == {"128"}


# Triton's tutorial 06, its kernel with descriptors (fp16, causal, 128x64, D = 128, 8 warps, 3 stages), compiled by
# Triton 3.9.0 in the same way: instructions outside of its loops, of a full block, of a masked one.
TUTORIAL = (961, 362, 469)


def test_attention_on_hopper_issues_less_than_triton_s_tutorial() -> None:
    [forward, *_] = [c for c in aot.survey(["attention 128 bf16"], ["sm_90"]) if c.kernel == "_attention_kernel"]
    assert (forward.options["BLOCK_M"], forward.options["BLOCK_N"], forward.options["num_warps"]) == ("128", "64", "8")
    r = forward.resources
    assert r is not None
    full, masked = r["loops"]
    # 64 x 64 x 128 and 64 x 128 x 64 of a group of four warps, by 16: 8 and 4 of wgmma; keys and values by TMA.
    assert full["HGMMA"] == masked["HGMMA"] == 12 and full["UTMALDG"] == masked["UTMALDG"] == 2
    assert sass.slots(full) <= 340
    once = r["instructions"] - sass.slots(full) - sass.slots(masked)
    for S in (2048, 4096, 16384):
        assert issued(S, once, sass.slots(full), sass.slots(masked)) <= issued(S, *TUTORIAL)


def issued(S: int, once: int, full: int, masked: int) -> int:
    """Instructions of a warp for each block of 128 queries, together: of a causal head of S tokens, whose useful FLOPs
    are the same for any kernel."""
    blocks = S // 128
    return blocks * (once + 2 * masked) + full * blocks * (blocks - 1)


def bytes_of(widths: dict[str, int], threads: int) -> int:
    return sum(int(bits) // 8 * n for bits, n in widths.items()) * threads


def test_a_launch_s_options_can_be_changed() -> None:
    import gptfast.kernels.triton as backend
    from gptfast.kernels.triton.tiles import Tile

    def kernel() -> None: ...

    with backend.recording("sm_80") as launches:
        with backend.changed("kernel", num_warps=16):
            backend.launch(kernel, (1,), tile=Tile(4, 2))
        backend.launch(kernel, (1,), tile=Tile(4, 2))
    assert [(n.named["num_warps"], n.named["num_stages"]) for n in launches] == [(16, 2), (4, 2)]
    for c in aot.compiled_apart([("rope 9/3 64 bf16", "sm_80", "_rope_kernel", {"num_warps": 8})]):
        assert c.options["num_warps"] == "8" and c.resources is not None and c.resources["threads"] == 256


def test_the_search_finds_the_tile_that_ships() -> None:
    from rich.progress import Progress

    from benchmarks import tiles

    found = tiles.search("rope 9/3 64 bf16", "sm_80", "_rope_kernel", Progress(disable=True))
    [ours] = [c for c in found if c.ships]
    assert ours.cycles == 1 and len(found) > 4 and all(c.cycles >= 0.5 for c in found)
    assert [round(c.cycles, 2) for c in found] == sorted(round(c.cycles, 2) for c in found)
    tile = {"num_warps": 8, "num_stages": 2, "BLOCK_M": 128}
    around = list(tiles.neighbours(tile, "_attention_kernel"))
    assert tile in around and {t["BLOCK_M"] for t in around} == {64, 128, 256}
    assert not {"BLOCK_N", "BLOCK_D"} & set(around[0])  # which decide the order of summation


def test_a_compiler_that_dies_costs_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "WORKER", DYING)
    found = list(aot.survey(["first", "deadly", "last"], ["sm_90"]))
    assert [(c.call, c.error is None) for c in found] == [("first", True), ("deadly", False), ("last", True)]
    assert "the compiler died" in (found[1].error or "") and "assertion" in (found[1].error or "")


DYING = """
import json, os, sys
for name, arch in json.load(sys.stdin):
    if name == "deadly":
        print("assertion", file=sys.stderr, flush=True)
        os.abort()
    print(json.dumps(dict(call=name, arch=arch, kernel="k", options={}, resources=None)))
    print("done", name, flush=True)
"""


def test_the_disassembly_is_read_right() -> None:
    names = [
        "LDG.E.128",
        "LDG.E.U16",
        "LDG.E",
        "LDG.E.64.CONSTANT",
        "LDGSTS.E.BYPASS.128",
        "STG.E.U8",
        "LDS.128",
        "LDL",
    ]
    assert sass._widths(names, ("LDG", "LDGSTS")) == {"128": 2, "16": 1, "32": 1, "64": 1}
    assert sass._widths(names, ("STG",)) == {"8": 1}
    text = """
        /*0010*/                   LDG.E.128 R4, [R2.64] ;            /* 0x0 */
        /*0020*/              @!P0 STL [R1+0x4], R7 ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4] ;
    """
    assert [m[1] for m in sass.INSTRUCTION.finditer(text)] == ["LDG.E.128", "STL", "HGMMA.64x64x16.F32.BF16"]
    assert (
        sass.TENSOR.match("HGMMA.64x64x16.F32.BF16") and sass.TENSOR.match("UTCHMMA") and not sass.TENSOR.match("HFMA2")
    )


def test_amd_s_spills_are_those_that_reach_memory() -> None:
    def spills(*lines: str) -> int:
        listing = "\n".join(f"\t{line}" for line in (*lines, ".vgpr_count: 40", "; Occupancy: 8"))
        metadata = SimpleNamespace(num_warps=4, shared=0)
        return sass._amd(SimpleNamespace(asm={"amdgcn": listing}, metadata=metadata)).spills

    assert spills("v_writelane_b32 v1, s4, 0", ".sgpr_spill_count: 9", "; ScratchSize: 0") == 0
    assert spills("scratch_store_dword off, v1, s32", "scratch_load_dwordx2 v[1:2], off, s32", "; ScratchSize: 8") == 3


def test_loops_are_found() -> None:
    """One in another: the inner one counts. A wait goes on after the program's end, and is no loop."""

    def code(*lines: str) -> str:
        return "\n".join(f"        /*{16 * n:04x}*/   {x} ;" if x[0] != "." else x for n, x in enumerate(lines))

    work = ["FADD R0, R0, R1"] * 20
    text = code(
        ".L_x_0:", *work, ".L_x_1:", *work, "@!P2 BRA `(.L_x_3)", ".L_x_2:", "MUFU.EX2 R1, R1", "@P0 BRA `(.L_x_1)",
        "@P1 BRA `(.L_x_0)", "EXIT", ".L_x_3:", "@!P2 BRA `(.L_x_3)", "BRA `(.L_x_2)",
    )  # fmt: skip
    assert sass.loops(text) == [{"FADD": 20, "BRA": 2, "MUFU": 1}]


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "occupancy", "limit"),
    [(32, 0, 128, 1.0, "warps"), (64, 0, 256, 0.5, "registers"), (32, 100 << 10, 128, 8 / 64, "shared")],
)
def test_occupancy(registers: int, shared: int, threads: int, occupancy: float, limit: str) -> None:
    """Of an H100's SM: 65,536 registers, 228 KiB, 64 warps."""
    assert sass._occupancy("sm_90", registers, shared, threads) == (occupancy, limit)


def test_every_shipped_call_is_one_that_its_page_takes() -> None:
    for name in shipped.names():
        call, _, dtype = name.rpartition(" ")
        page, make = shipped.CALLS[call]
        from gptfast import ops
        from gptfast.ops.spec import Inputs

        arguments: dict[str, Any] = make(Inputs(shipped.DTYPES[dtype], name))
        assert ops.explain(ops.pages()[page].function, **arguments, backend="reference").backend == "reference"
