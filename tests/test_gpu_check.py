"""What of `make gpu-check` can be seen without a GPU: which calls other libraries are given, and what is read of
compute-sanitizer's log."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import gpu_check, gpu_rivals


def installed(monkeypatch: pytest.MonkeyPatch, module: str, **functions: Any) -> None:
    for n in range(1, module.count(".") + 2):
        name = ".".join(module.split(".")[:n])
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, function in functions.items():
        setattr(sys.modules[module], name, function)


def test_without_them_there_are_no_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("flash_attn", "liger_kernel", "flashinfer"):
        monkeypatch.setitem(sys.modules, module, None)
    x = torch.randn(2, 8)
    assert gpu_rivals.rivals("rms_norm", {"x": x, "weight": x[0]}) == {}
    assert gpu_rivals.rivals("no such op", {}) == {}


def test_flash_attn_is_given_what_it_means_the_same_by(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def flash_attn_func(q: Any, k: Any, v: Any, causal: bool, softmax_scale: float | None) -> Any:
        asked.append((causal, softmax_scale))
        return q

    installed(monkeypatch, "flash_attn", flash_attn_func=flash_attn_func)
    q = torch.randn(1, 4, 2, 16, dtype=torch.bfloat16)
    arguments = {"q": q, "k": q, "v": q, "causal": True}
    [(name, call)] = gpu_rivals.rivals("attention", arguments).items()
    assert name == "flash-attn" and call(**arguments) is q and asked == [(True, None)]
    assert gpu_rivals.rivals("attention", arguments | {"sinks": torch.zeros(2)}) == {}
    assert gpu_rivals.rivals("attention", {**arguments, "q": q.float()}) == {}


def test_liger_and_flashinfer_are_given_what_they_mean_the_same_by(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(
        *(monkeypatch, "liger_kernel.transformers.functional"),
        liger_rms_norm=lambda x, weight, eps, in_place: ("liger", eps, in_place),
        liger_geglu=lambda a, b: "geglu",
        liger_cross_entropy=lambda logits, target: logits.zero_().sum(),
    )
    installed(monkeypatch, "flashinfer.norm", rmsnorm=lambda x, weight, eps: ("flashinfer", eps))
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    found = gpu_rivals.rivals("rms_norm", {"x": x, "weight": x[0]})
    assert {name: call(x=x, weight=x[0]) for name, call in found.items()} == {
        "liger": ("liger", 1e-6, False),
        "flashinfer": ("flashinfer", 1e-6),
    }
    assert gpu_rivals.rivals("rms_norm", {"x": x, "weight": x[0], "residual": x}) == {}
    assert gpu_rivals.rivals("geglu", {"gate": x, "up": x, "approximate": "none"}) == {}
    assert gpu_rivals.rivals("geglu", {"gate": x, "up": x})["liger"](gate=x, up=x) == "geglu"
    arguments = {"logits": x.float(), "target": torch.zeros(4, dtype=torch.int64)}
    kept = arguments["logits"].clone()
    gpu_rivals.rivals("cross_entropy", arguments)["liger"](**arguments)
    assert torch.equal(arguments["logits"], kept), "what writes into its input gets a copy"


def test_the_sanitizer_s_errors_are_read() -> None:
    log = """
test one
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at _kernel+0x10
========= ERROR SUMMARY: 1 error
"""
    assert gpu_check.sanitized(log) == ["Invalid __global__ read of size 4 bytes"]
    assert gpu_check.sanitized("========= ERROR SUMMARY: 0 errors") == []
    page = gpu_check.markdown({"sanitizer": {"errors": ["Invalid read"], "seconds": 3}})
    assert "1 errors in 3 s" in page and "- Invalid read" in page
