"""The cases of sampling.py: odd vocabularies, ties, masked and broken rows, each filter alone and all together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptfast.ops.spec import Case, Inputs


def cases() -> list[Case]:
    return [
        case("1", 2, 1, top_k=1, return_logprobs=True),
        case("2", 3, 2, top_p=0.5, return_logprobs="processed"),
        case("5-greedy", 7, 5, temperature=0.0, return_logprobs=True),
        case("17-ties-greedy", 9, 17, grid=2, temperature=0, return_logprobs="processed"),
        case("1000-plain", 5, 1000, seed=2**63 + 5, step=2**40, stream=3, return_logprobs=True),
        case("5000-plain-cold", 3, 5000, temperature=1e-4, return_logprobs="processed"),
        case("1000-hot", 4, 1000, temperature=100.0, top_p=0.99, return_logprobs="processed"),
        case("1000-ties-top_k", 33, 1000, grid=2, top_k=40),
        case("300-ties-top_p", 33, 300, grid=2, top_p=0.6),
        case("300-ties-typical", 33, 300, grid=2, typical_p=0.5),
        case("3000-constant-top_p", 3, 3000, grid=1e-3, top_p=0.37, return_logprobs="processed"),
        case("3000-constant-top_k", 3, 3000, grid=1e-3, top_k=700),
        case("1000-top_k-large", 5, 1000, top_k=613),
        case("777-min_p", 16, 777, min_p=0.05, return_logprobs="processed"),
        case("777-typical", 16, 777, typical_p=0.9, return_logprobs=True),
        case("777-flat-top_p", 16, 777, scale=0.01, top_p=0.9),
        case("777-peaked-top_p", 16, 777, scale=30.0, top_p=0.999),
        case("1000-all-filters", 40, 1000, top_k=200, top_p=0.9, min_p=0.02, typical_p=0.8, temperature=0.7),
        case("1000-broken", 40, 1000, change=broken, top_k=20, top_p=0.9, return_logprobs=True),
        case("64-broken-greedy", 40, 64, change=broken, temperature=0, return_logprobs=True),
        case("64-broken-plain", 40, 64, change=broken, return_logprobs="processed"),
        Case("0x10", lambda i: {"logits": i.randn(0, 10)}),
        Case("130-mixed", lambda i: mixed(i, 90, 130, False)),
        Case("1037-mixed-bias-mask", lambda i: {**mixed(i, 60, 1037, True), "return_logprobs": "processed"}),
        case("1x50257-plain", 1, 50257, temperature=0.8, tags="bench"),
        case("8x50257-plain", 8, 50257, temperature=0.8, tags="bench"),
        case("1x50257-greedy", 1, 50257, temperature=0.0, tags="bench"),
        case("8x50257-greedy", 8, 50257, temperature=0.0, tags="bench"),
        case("1x50257-top_k-top_p", 1, 50257, top_k=50, top_p=0.95, temperature=0.8, tags="bench"),
        case("8x50257-top_k-top_p", 8, 50257, top_k=50, top_p=0.95, temperature=0.8, tags="bench"),
        case("1x50257-top_p", 1, 50257, top_p=0.95, temperature=0.8, tags="bench"),
        case("8x50257-top_p", 8, 50257, top_p=0.95, temperature=0.8, tags="bench"),
    ]


def case(
    name: str,
    B: int,
    V: int,
    *,
    scale: float = 3.0,
    grid: float = 0.0,
    change: Callable[[Tensor], Tensor] = lambda logits: logits,
    tags: str = "",
    **arguments: Any,
) -> Case:
    """Normal logits of this scale; with a grid, rounded to multiples of 1 / grid so that many are equal."""

    def make(i: Inputs) -> dict[str, Any]:
        logits = i.randn(B, V, scale=scale)
        if grid:
            logits = (logits * grid).round() / grid
        seed = 1 if "bench" in tags else i.randint(-(2**62), 2**62, (B,))
        return {"logits": change(logits), "seed": seed, **arguments}

    return Case(name, make, frozenset(tags.split()))


def broken(logits: Tensor) -> Tensor:
    """Rows in turn: as it was, with a NaN, with +inf, all -inf, all -inf but one, half -inf, all equal, with -0."""
    V = logits.shape[1]
    logits[1::8, V // 3] = torch.nan
    logits[2::8, V // 2] = torch.inf
    logits[3::8] = -torch.inf
    logits[4::8] = -torch.inf
    logits[4::8, V - 1] = 1.5
    logits[5::8, ::2] = -torch.inf
    logits[6::8] = 0.25
    logits[7::8] = -0.0
    logits[7::8, ::3] = 0.0
    return logits


def mixed(i: Inputs, B: int, V: int, bias: bool) -> dict[str, Any]:
    """Each row with its own parameters, some neutral, its own history with repeats and padding, and its own seed."""

    def pick(*values: float) -> Tensor:
        return torch.tensor(values)[i.randint(0, len(values), (B,))]

    history = i.randint(0, V, (B, 30)) // i.randint(1, 9, (B, 1))
    history[i.rand(B, 30, dtype=torch.float32) < 0.2] = -1
    return {
        "logits": (i.randn(B, V, scale=3) * 8).round() / 8,
        "temperature": pick(0.0, 1e-4, 0.5, 0.7, 1.0, 1.3, 100.0),
        "top_k": pick(0, 0, 1, 5, 50, 5000).long(),
        "top_p": pick(0.0, 0.3, 0.9, 0.95, 1.0, 1.0),
        "min_p": pick(0.0, 0.0, 0.01, 0.2, 1.0),
        "typical_p": pick(0.2, 0.9, 1.0, 1.0),
        "repetition_penalty": pick(1.0, 1.2, 0.8),
        "presence_penalty": pick(0.0, 0.6, -0.4),
        "frequency_penalty": pick(0.0, 0.35, -0.2),
        "history": history,
        "prompt_lengths": i.randint(0, 31, (B,)),
        **(
            {"logit_bias": i.randn(V, dtype=torch.float32), "mask": i.rand(B, V, dtype=torch.float32) < 0.7}
            if bias
            else {}
        ),
        "seed": i.randint(-(2**62), 2**62, (B,)),
        "step": i.randint(0, 1000, (B,)),
        "stream": 7,
    }
