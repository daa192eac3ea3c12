"""What bounds a kernel, from the names of its instructions: the arithmetic by hand, the picture, and the comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gptfast.profile import aot, bound, sass


def of(hot: dict[str, int], threads: int = 256, hot_bytes: int = 0) -> dict[str, Any]:
    return {"hot": hot, "threads": threads, "hot_bytes": hot_bytes}


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("HGMMA.64x128x16.F32.BF16", 64 * 128 * 16 * 2 // 4),  # of four warps
        ("HMMA.16816.F32.BF16", 16 * 8 * 16 * 2),
        ("HMMA.1688.F32.TF32", 16 * 8 * 8 * 2),
        ("IMMA.16832.S8.S8", 16 * 8 * 32 * 2),
        ("v_mfma_f32_32x32x8_bf16", 32 * 32 * 8 * 2),
        ("UTCHMMA", None),
        ("FFMA", 0),
    ],
)
def test_a_matrix_instruction_s_flops(name: str, flops: int | None) -> None:
    assert bound.matrix_flops(name) == flops


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("HGMMA.64x128x16.F32.BF16", "matrix"),
        ("MUFU.EX2", "special"),
        ("FMNMX", "fp32"),
        ("LDGSTS.E.BYPASS.128", "global memory"),
        ("LDSM.16.M88.4", "shared memory"),
        ("F2FP.BF16.F32.PACK_AB", "conversions and moves"),
        ("IMAD.MOV.U32", "conversions and moves"),
        ("IMAD.WIDE", "integers"),
        ("LDGDEPBAR", "control"),
        ("BAR.SYNC.DEFER_BLOCKING", "control"),
        ("SHF.R.S32.HI", "integers"),
        ("SHFL.BFLY", "shared memory"),
        ("v_exp_f32_e32", "special"),
        ("v_pk_fma_f32", "fp32"),
        ("buffer_load_dwordx4", "global memory"),
        ("s_cbranch_scc1", "control"),
    ],
)
def test_what_an_instruction_is_for(name: str, kind: str) -> None:
    assert bound.kind(name) == kind


def test_a_turn_s_cycles_are_counted_by_unit() -> None:
    """Eight warps on an H100's SM: 4,096 FLOP of matrices and 256 of fp32, 16 values and 4 instructions a clock."""
    hot = {"HGMMA.64x64x16.F32.BF16": 8, "FFMA": 50, "MUFU.EX2": 40, "IMAD": 20}
    turn = bound.turn(of(hot, hot_bytes=1390), "sm_90")
    matrix, vector = 8 * 8 * 64 * 64 * 16 * 2 / 4, 256 * 100
    assert turn.flops == matrix + vector
    assert turn.cycles == {"matrix": matrix / 4096, "fp32": vector / 256, "special": 640, "issue": 8 * 118 / 4}
    assert turn.bound == "special" and turn.dram == pytest.approx(100)
    assert turn.mix == {"fp32": 50, "special": 40, "integers": 20, "matrix": 8}


def test_a_shape_in_a_register_is_not_known() -> None:
    turn = bound.turn(of({"UTCHMMA": 4, "FADD2": 8}), "sm_100")
    assert turn.flops is None and "matrix" not in turn.cycles and turn.bound in turn.cycles


def test_fp32_matrices_take_eight_times_as_long_on_amd() -> None:
    fast, slow = (bound.turn(of({f"v_mfma_f32_32x32x{k}": 1}), "gfx942").cycles["matrix"] for k in ("8_bf16", "2_f32"))
    assert slow == fast * 8 / 4


def test_amd_s_loops_are_found() -> None:
    body = [f"\tv_add_f32_e32 v{n}, v0, v1" for n in range(20)]
    listing = "\n".join(
        ["k:", "\ts_cbranch_scc1 .LBB0_3", ".LBB0_2:  ; the loop", *body, "\ts_cbranch_scc1 .LBB0_2", ".LBB0_3:",
         "\tbuffer_store_dwordx4 v[0:3], v4, s[0:3], 0 offen", "\ts_endpgm"]
    )  # fmt: skip
    names, turns = sass._amd_loops(listing)
    assert len(names) == 24 and [len(turn) for turn in turns] == [21]


def test_the_picture_shows_each_kernel(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from gptfast.profile import picture

    kernels = [
        aot.Compiled("a call", arch, "_k_kernel", {}, of(hot, hot_bytes=4096))
        for arch, hot in (("sm_90", {"FFMA": 100}), ("sm_100", {"UTCHMMA": 2, "FADD": 300}))
    ]
    picture.draw(kernels, file := tmp_path / "k.png")
    assert file.read_bytes()[:4] == b"\x89PNG" and file.stat().st_size > 10_000
    with pytest.raises(ValueError, match="expected a kernel that compiles"):
        picture.draw([aot.Compiled("a call", "sm_90", "_k_kernel", {}, None, "an error")], file)
