"""Rotary embeddings of Hugging Face's attention modules by ops.rope.

Their forwards call a function of their source file, apply_rotary_pos_emb. Putting another there would change every
model in the process; instead this module's forward is the same code with a dictionary of globals of its own, in which
that one name differs.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from gptfast import ops
from gptfast.patch import probe
from gptfast.patch.changes import Replacement

NAME = "apply_rotary_pos_emb"


class Rope(Replacement):
    """The forward of an attention module, in which ops.rope rotates."""

    def __init__(self, module: nn.Module, backend: str | None) -> None:
        super().__init__(module, backend)
        self._forward: Callable[..., Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_forward": None}  # a function with globals of its own can't be pickled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._forward is None:
            self._forward = _with_rope(type(self.module).forward, self.backend)
        return self._forward(self.module, *args, **kwargs)


def _with_rope(forward: types.FunctionType, backend: str | None) -> Callable[..., Any]:
    rotate = Rotation(forward.__globals__[NAME], backend)
    # without the name of a module, torch.compile looks globals up here and not there
    names = {k: v for k, v in forward.__globals__.items() if k != "__name__"} | {NAME: rotate}
    copy = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


class Rotation:
    """In the place of `theirs`: q (B, H, S, D), k (B, Hk, S, D), cos and sin (B, S, R) whose halves are alike."""

    def __init__(self, theirs: Callable[..., Any], backend: str | None) -> None:
        self.theirs, self.backend = theirs, backend

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or cos.dim() != 3 or cos.shape[0] not in (1, q.shape[0]) or q.dtype != k.dtype:
            return self.theirs(q, k, cos, sin, *args, **kwargs)
        half = cos.shape[-1] // 2
        cos, sin = cos[..., :half].float(), sin[..., :half].float()
        if cos.shape[0] == 1:
            cos, sin = cos[0], sin[0]
        q, k = ops.rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin, backend=self.backend)
        return q.transpose(1, 2), k.transpose(1, 2)


def recognise(module: nn.Module) -> str | None:
    """None where the module's forward rotates by apply_rotary_pos_emb, and the op can; else why not, "" where it
    doesn't rotate at all."""
    forward = type(module).forward
    code = getattr(inspect.unwrap(forward), "__code__", None)
    if code is None or NAME not in code.co_names:
        return ""
    if not isinstance(forward, types.FunctionType) or forward.__code__ is not code:
        return "its forward is wrapped by a decorator, and the function that rotates can't be reached"
    if not _does_the_same(forward.__globals__[NAME]):
        return "its apply_rotary_pos_emb computes something else than the op"
    return None


@cache
def _does_the_same(theirs: Callable[..., Any]) -> bool:
    """Whether a function rotates as the op does, tried on random heads and angles."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 2))
    angles = torch.randn(2, 5, 4, generator=generator).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    try:
        wanted = theirs(q, k, cos, sin)
    except Exception:
        return False
    got = Rotation(theirs, None)(q, k, cos, sin)
    return all(probe.equal(mine, its) for mine, its in zip(got, wanted))
