"""What is special to Triton's kernels: rows wider than a program's registers, and what a process without a GPU says."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gptfast import ops
from gptfast.bench.check import check
from gptfast.kernels import reason_missing
from gptfast.ops.spec import Case, Inputs, double, gradients, map_tensors, outputs, tolerance, upstream
from tests import where
from tests.ops import test_conformance
from tests.ops.limits import of_gradients, of_outputs

needs_triton = pytest.mark.skipif("triton" not in where.backends(), reason="Triton's kernels don't run in this session")
in_the_first_session = pytest.mark.skipif(not where.on_the_cpu(), reason="the CPU's session does it")


@needs_triton
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("C", [16390, 24576])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_rows_that_are_read_twice(name: str, C: int, dropout: float) -> None:
    more: dict[str, Any] = {"dropout_p": dropout, "seed": -5, "stream": 2} if dropout else {}

    def make(i: Inputs) -> dict[str, Any]:
        arguments = {"x": i.randn(3, C, shift=3.0), "weight": i.randn(C), "residual": i.randn(3, C), **more}
        return arguments | ({"bias": i.randn(C)} if name == "layer_norm" else {})

    op, case = ops.pages()[name], Case(f"{name} {C}", make)
    arguments = case.arguments(torch.float32)
    test_conformance.check(
        test_conformance.call(op, arguments, "triton"), of_outputs(op, case, torch.float32), "triton"
    )
    given = upstream(op, arguments)
    got = gradients(op.function, op, where.here(op, arguments), [u.to(where.device) for u in given], backend="triton")
    limits = of_gradients(op, case, torch.float32, given)
    for key, gradient in got.items():
        limits.check(key, gradient.cpu(), f"d{key}")


@needs_triton
@pytest.mark.parametrize("rows", [1, 2100])
def test_sums_over_many_chunks_of_rows(rows: int) -> None:
    """More than 256 chunks' worth, the last of them ragged."""
    op = ops.pages()["rms_norm"]
    case = Case(str(rows), lambda i: {"x": i.randn(rows, 8), "weight": i.randn(8)})
    arguments = case.arguments(torch.bfloat16)
    given = upstream(op, arguments)
    got = gradients(op.function, op, where.here(op, arguments), [u.to(where.device) for u in given], backend="triton")
    of_gradients(op, case, torch.bfloat16, given).check("weight", got["weight"].cpu(), "dweight")


@needs_triton
@pytest.mark.parametrize("name", ["linear_cross_entropy", "token_logprobs"])
def test_rows_that_do_not_count_add_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph holds them, for none can know how many there will be."""
    module = importlib.import_module("gptfast.kernels.triton.cross_entropy")
    monkeypatch.setattr(module, "_captured", lambda t: True)
    op, target = ops.pages()[name], torch.arange(40) % 7
    target[::3] = -100

    def make(i: Inputs) -> dict[str, Any]:
        x = i.randn(40, 24)
        x[::3] = torch.nan
        return {"x": x, "weight": i.randn(70, 24), "target": target}

    case = Case("ignored", make)
    arguments = case.arguments(torch.bfloat16)
    assert check(op, where.here(op, arguments), "triton").passed
    given = upstream(op, arguments)
    got = gradients(op.function, op, where.here(op, arguments), [u.to(where.device) for u in given], backend="triton")
    limits = of_gradients(op, case, torch.bfloat16, given)
    for key, gradient in got.items():
        limits.check(key, gradient.cpu(), f"d{key}")


@needs_triton
def test_a_row_that_many_places_took() -> None:
    i = Inputs(torch.float32)
    arguments = {"ids": torch.zeros(300, dtype=torch.int64), "weight": i.randn(2, 5)}
    op = ops.pages()["embedding"]
    assert check(op, where.here(op, arguments), "triton").passed
    given = upstream(op, arguments)
    got = gradients(op.function, op, where.here(op, arguments), [u.to(where.device) for u in given], backend="triton")
    exact = given[0].double().sum(0)
    assert torch.allclose(
        got["weight"][0].cpu().double(), exact, rtol=0, atol=300 * 2**-24 * given[0].abs().sum().item()
    )
    assert not got["weight"][1].any()


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize(
    ("name", "case"),
    [
        *(("linear", "17x48x3072"), ("linear", "7x70x576-q4_0"), ("linear", "8x33x160-q4_1+bias")),
        *((name, "2x3x64") for name in ("layer_norm", "rms_norm", "swiglu")),
    ],
)
def test_sums_of_16_bit_numbers_are_fp32(name: str, case: str, dtype: torch.dtype) -> None:
    """Of each element: half a unit of its own last place, and what the same sums in fp32 may be wrong by. The largest
    error of all elements, which conformance looks at, is so much rounding that it hides sums of 8 bits."""
    op = ops.pages()[name]
    [arguments] = [c.arguments(dtype) for c in op.cases() if c.name == case]
    exact = outputs(op.reference(**double(arguments)))
    wide = map_tensors(lambda t: t.float() if t.is_floating_point() else t, arguments)
    plain = outputs((op.plain or op.baseline or op.reference)(**wide))
    got = test_conformance.call(op, arguments, "triton")
    for y, e, p in zip(got, exact, plain, strict=True):
        slack = tolerance(p, e)
        unit = torch.finfo(dtype).eps * 2.0 ** (e.abs() + slack).log2().floor()
        assert ((y.double() - e).abs() <= unit / 2 + slack).all()


def said(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )
    return done.stdout + done.stderr


@in_the_first_session
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_so() -> None:
    pytest.importorskip("triton")
    reason = reason_missing("triton")
    assert reason is not None and reason.startswith("Triton is here but no GPU: ") and "\n" not in reason
    x = torch.randn(2, 8)
    with pytest.raises(ops.BackendError, match="Triton is here but no GPU"):
        ops.rms_norm(x, torch.ones(8), backend="triton")
    assert ops.explain("rms_norm", x, torch.ones(8)).backend in ("cpu", "reference")


@in_the_first_session
def test_without_triton_one_sentence_says_so() -> None:
    code = "import sys; sys.modules['triton'] = None; import gptfast; print(gptfast.backends()['triton'])"
    assert "pip install triton" in said(code)


@in_the_first_session
def test_an_interpreted_process_takes_tensors_of_the_cpu() -> None:
    pytest.importorskip("triton")
    code = (
        "import torch, gptfast; x, w = torch.randn(3, 8), torch.ones(8);"
        "print(gptfast.ops.explain('rms_norm', x, w).backend);"
        "print(gptfast.ops.explain('rms_norm', x, w, backend='triton').backend)"
    )
    automatic, explicit = said(code, TRITON_INTERPRET="1").split()
    assert automatic in ("cpu", "reference") and explicit == "triton"


@needs_triton
@pytest.mark.parametrize("int8", [False, True])
def test_lengths_beyond_a_cache_write_and_read_nothing_there(int8: bool) -> None:
    """Under a CUDA graph nobody looks at lengths before a kernel does."""
    from gptfast.kernels.triton.attention_kvcache import attention_kvcache

    device = where.device
    i = Inputs(torch.float32, "full caches", device)
    B, room, Hk, D = 3, 300, 1, 16
    q, k, v = i.randn(B, 1, 2, D), i.randn(B, 1, Hk, D), i.randn(B, 1, Hk, D)
    caches = [i.randn(B, room, Hk, D) for _ in range(2)]
    scales: list[Any] = [None, None]
    if int8:
        caches = [(100 * t).clamp(-127, 127).to(torch.int8) for t in caches]
        scales = [torch.full((B, room, Hk), 0.01, device=device) for _ in range(2)]
    before = [t.clone() for t in caches]
    terms: dict[str, Any] = dict(
        k_scale=scales[0], v_scale=scales[1], block_table=None, causal=True, scale=None, window=(-1, -1), softcap=0.0,
        alibi_slopes=None, sinks=None, cos=None, sin=None, interleaved=False, cache_batch_idx=None, cache_leftpad=None,
        return_lse=False, activations="exact",
    )  # fmt: skip
    lengths = torch.tensor([room - 1, room, 5000], dtype=torch.int32, device=device)
    found = attention_kvcache(q, caches[0], caches[1], lengths, k=k, v=v, **terms)
    for cache, old in zip(caches, before):
        assert not torch.equal(cache[0, -1], old[0, -1])
        assert torch.equal(cache[0, :-1], old[0, :-1]) and torch.equal(cache[1:], old[1:])
    expected = attention_kvcache(q, caches[0], caches[1], torch.full_like(lengths, room), k=None, v=None, **terms)
    assert isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor) and torch.equal(found, expected)


@in_the_first_session
def test_no_kernel_returns_none() -> None:
    """Triton 3.6 refuses that, 3.9 takes it; the gate compiles with one of them."""
    folder, seen = Path(ops.__file__).parents[2] / "kernels" / "triton", 0
    for path in folder.glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and "jit" in map(_name, function.decorator_list):
                seen += 1
                returned = [r.value for r in ast.walk(function) if isinstance(r, ast.Return)]
                nothing = [r for r in returned if isinstance(r, ast.Constant) and r.value is None]
                assert not nothing, f"{path.name}: {function.name}"
    assert seen > 50


def _name(decorator: ast.expr) -> str:
    call = decorator.func if isinstance(decorator, ast.Call) else decorator
    return call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "")
