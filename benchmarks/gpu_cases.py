"""The calls that `make gpu-check` times: each page's own benchmark cases, and some of a GPU's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from gptfast import ops
from gptfast.ops.spec import Case, Inputs, Op

Make = Callable[[Inputs], dict[str, Any]]
BF16 = torch.bfloat16
# Ops whose work is matrix products; the others are bound by bytes.
PRODUCTS = {"attention", "attention_kvcache", "linear", "linear_cross_entropy", "token_logprobs", "token_kl"}


class OnDevice(Inputs):
    """Makes a case's inputs where they are used, in a moment."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        super().__init__(dtype, device=device)
        self.there = torch.Generator(device).manual_seed(1)

    def randn(
        self, *shape: int, scale: float = 1.0, shift: float = 0.0, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        x = torch.randn(shape, generator=self.there, device=self.device, dtype=dtype or self.dtype)
        return x.mul_(scale).add_(shift)

    def rand(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        x = torch.rand(shape, generator=self.there, device=self.device)
        return x.to(dtype or self.dtype)

    def randint(self, low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.there, device=self.device).to(dtype)


def norm(N: int, C: int, residual: bool, bias: bool) -> Make:
    def make(i: Inputs) -> dict[str, Any]:
        more = {"residual": i.randn(N, C)} if residual else {}
        return {"x": i.randn(N, C), "weight": i.randn(C), **more, **({"bias": i.randn(C)} if bias else {})}

    return make


def gelu(N: int, C: int) -> Make:
    return lambda i: {"x": i.randn(N, C), "bias": i.randn(C)}


def gated(N: int, C: int) -> Make:
    return lambda i: {"gate": i.randn(N, C), "up": i.randn(N, C)}


def rope(B: int, S: int, H: int, Hk: int, D: int) -> Make:
    def make(i: Inputs) -> dict[str, Any]:
        angles = i.rand(S, D // 2, dtype=torch.float32) * 100
        return {"q": i.randn(B, S, H, D), "k": i.randn(B, S, Hk, D), "cos": angles.cos(), "sin": angles.sin()}

    return make


def attention(B: int, S: int, H: int, Hk: int, D: int) -> Make:
    return lambda i: {"q": i.randn(B, S, H, D), "k": i.randn(B, S, Hk, D), "v": i.randn(B, S, Hk, D), "causal": True}


def decode(B: int, length: int, H: int, Hk: int, D: int) -> Make:
    """One more token for B sequences of this length."""

    def make(i: Inputs) -> dict[str, Any]:
        cache = (B, length + 1, Hk, D)
        return {
            **{"q": i.randn(B, 1, H, D), "k_cache": i.randn(*cache), "v_cache": i.randn(*cache)},
            **{"k": i.randn(B, 1, Hk, D), "v": i.randn(B, 1, Hk, D)},
            "lengths": torch.full((B,), length, dtype=torch.int32, device=i.device),
        }

    return make


def sample(B: int, V: int, **arguments: Any) -> Make:
    return lambda i: {"logits": i.randn(B, V, scale=3.0, dtype=torch.float32), "seed": 1, **arguments}


def embedding(N: int, V: int, C: int) -> Make:
    return lambda i: {"ids": i.randint(0, V, (N,)), "weight": i.randn(V, C)}


def cross_entropy(N: int, V: int) -> Make:
    return lambda i: {"logits": i.randn(N, V), "target": i.randint(0, V, (N,))}


def linear_cross_entropy(N: int, V: int, C: int) -> Make:
    return lambda i: {"x": i.randn(N, C), "weight": i.randn(V, C, scale=0.02), "target": i.randint(0, V, (N,))}


CASES: dict[str, dict[str, Make]] = {
    "layer_norm": {"16384x4096": norm(16384, 4096, False, True), "16384x4096+residual": norm(16384, 4096, True, True)},
    "rms_norm": {
        "16384x4096": norm(16384, 4096, False, False),
        "16384x4096+residual": norm(16384, 4096, True, False),
        "8192x8192": norm(8192, 8192, False, False),
    },
    "bias_gelu": {"16384x11008": gelu(16384, 11008)},
    "swiglu": {"16384x11008": gated(16384, 11008)},
    "geglu": {"16384x11008": gated(16384, 11008)},
    "rope": {"4x4096-h32/8-d128": rope(4, 4096, 32, 8, 128)},
    "embedding": {"16384-128256x4096": embedding(16384, 128256, 4096)},
    "attention": {
        "4x4096-h32/32-d64": attention(4, 4096, 32, 32, 64),
        "4x4096-h32/32-d128": attention(4, 4096, 32, 32, 128),
        "4x4096-h32/8-d128": attention(4, 4096, 32, 8, 128),
    },
    "attention_kvcache": {
        "1x8191-h32/8-d128": decode(1, 8191, 32, 8, 128),
        "64x4095-h32/8-d128": decode(64, 4095, 32, 8, 128),
    },
    "sample": {
        "64x128256-greedy": sample(64, 128256, temperature=0.0),
        "64x128256-plain": sample(64, 128256, temperature=0.8),
        "64x128256-top_k-top_p": sample(64, 128256, temperature=0.8, top_k=50, top_p=0.95),
        "64x128256-top_p": sample(64, 128256, temperature=0.8, top_p=0.95),
    },
    "cross_entropy": {"8192x128256": cross_entropy(8192, 128256)},
    "linear_cross_entropy": {"8192x128256x4096": linear_cross_entropy(8192, 128256, 4096)},
}


def cases(only: str) -> Iterator[tuple[Op, Case]]:
    """The cases of a GPU's size first, then the pages' own; those of ops whose names contain `only`."""
    pages = {name: op for name, op in ops.pages().items() if only in name and "triton" in op.kernels}
    for name, op in pages.items():
        for label, make in CASES.get(name, {}).items():
            yield op, Case(label, make, frozenset({"gpu"}))
    for op in pages.values():
        for case in op.cases():
            if "bench" in case.tags:
                yield op, case
