"""Recognising what a module computes by trying it: names lie, formulas don't.

A copy of the module in fp32 with random parameters is called beside each formula that it might be, on the same random
input, with and without dropout. The copy is made once for each kind of module, and the module itself is never run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Candidate = TypeVar("Candidate")


def kind(module: nn.Module) -> Any:
    """Equal for modules of one class, structure and settings, whatever their parameters hold."""

    def settings(m: nn.Module) -> Any:
        plain = (bool, int, float, str, type(None))
        return tuple((k, v) for k, v in sorted(vars(m).items()) if isinstance(v, plain) and k != "training")

    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    return type(module), shapes, tuple((name, type(m), settings(m)) for name, m in module.named_modules())


def rehearsal(module: nn.Module) -> nn.Module:
    """A copy on the CPU in fp32 with random parameters and without hooks, whose dropouts drop half."""
    twin = copy.deepcopy(module)
    if any(t.is_meta for t in (*twin.parameters(), *twin.buffers())):
        twin = twin.to_empty(device="cpu")
    twin = twin.float().cpu()
    generator = torch.Generator().manual_seed(0)
    for p in twin.parameters():
        spread = p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3
        p.requires_grad_(False).copy_(torch.randn(p.shape, generator=generator) * spread + (p.dim() == 1) * 0.5)
    for m in twin.modules():
        m._forward_hooks.clear()
        m._forward_pre_hooks.clear()
        if isinstance(m, nn.Dropout):
            m.p = 0.5
    return twin


def first_match(
    module: nn.Module,
    candidates: Iterable[Candidate],
    build: Callable[[nn.Module, Candidate], Callable[[Tensor], Any]],
    shape: tuple[int, ...],
    scales: tuple[float, ...] = (1.0,),
) -> Candidate | str:
    """The first candidate whose function, build(copy, candidate), gives what the module's forward gives on random
    inputs of this shape at each of these scales; else the reason why there is none."""
    try:
        twin = rehearsal(module)
    except Exception as error:
        return f"it can't be copied to be tried: {type(error).__name__}: {error}"
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    trials = [(x * scale, training) for scale in scales for training in (False, True)]
    try:
        wanted = [_run(twin, lambda t: type(module).forward(twin, t), *trial) for trial in trials]
    except Exception as error:
        return f"its forward can't be tried on one tensor: {type(error).__name__}: {error}"
    for candidate in candidates:
        try:
            function = build(twin, candidate)
            if all(equal(_run(twin, function, *trial), y) for trial, y in zip(trials, wanted)):
                return candidate
        except (AttributeError, RuntimeError, TypeError, ValueError):
            continue  # not even its arguments fit
    return "no op computes what its forward computes"


def _run(twin: nn.Module, function: Callable[[Tensor], Any], x: Tensor, training: bool) -> Any:
    twin.train(training)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return function(x)


def equal(got: Any, wanted: Any) -> bool:
    """Up to rounding: the tanh form of GELU, its nearest neighbour, is 1e-4 of the scale away, this is 8e-6."""
    if not (isinstance(got, Tensor) and isinstance(wanted, Tensor)) or got.shape != wanted.shape:
        return False
    return bool((got - wanted).abs().max() <= 64 * torch.finfo(torch.float32).eps * wanted.abs().max())
