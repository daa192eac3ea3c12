"""The Triton backend: one source for NVIDIA's and AMD's GPUs, compiled when it is first called.

Each module here has the name of its op page and the functions that kernels/cpu has for it, with the same arguments.
Arguments come checked from the op page. Every kernel is started by launch(); its block sizes come from tiles.py.

In a process with TRITON_INTERPRET=1 the same kernels run on the CPU, for tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gptfast.kernels import interpreted
from gptfast.kernels.triton.launching import start
from gptfast.kernels.triton.tiles import Tile
from triton.runtime import driver

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = interpreted()  # since Triton was imported
INTERPRETED_AS = "sm_90"  # the tiles that an interpreted kernel takes: those that ship


def unsupported(*tensors: Tensor | None, backward: bool = False) -> str | None:
    """The reasons common to all kernels: storage dtype, device, and gradients, unless there is a backward."""
    for t in tensors:
        if t is None:
            continue
        if reason := elsewhere(t):
            return reason
        if t.dtype not in DTYPES:
            return f"it takes float32, bfloat16 and float16, not {str(t.dtype).removeprefix('torch.')}"
        if t.requires_grad and not backward and torch.is_grad_enabled():
            return "an input requires a gradient, and this kernel has no backward yet"
    return None


def elsewhere(*tensors: Tensor | None) -> str | None:
    """Why these kernels can't reach the tensors' memory; None where they can."""
    for t in tensors:
        if t is None or t.is_cuda or _recorder is not None or (t.is_cpu and INTERPRETED):
            continue
        if t.is_cpu:
            return "the tensors are on the CPU, where these kernels run only if TRITON_INTERPRET=1 (for tests)"
        return f"the tensors are on {t.device}, and this backend's are on a GPU"
    return None


@dataclass(frozen=True)
class Launch:
    """A launch as it was asked for: everything that decides what is compiled."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    named: dict[str, Any]


@dataclass
class _Recorder:
    arch: str
    launches: list[Launch]


_recorder: _Recorder | None = None
_changes: dict[str, dict[str, Any]] = {}  # of a kernel's options, by its name
reached: list[Tensor] = []  # by the launch in progress, through addresses in memory


@contextmanager
def recording(arch: str) -> Iterator[list[Launch]]:
    """Within it nothing runs: launches are written to the list, with the tiles for `arch` ("sm_90", "gfx942"), and
    outputs stay as they were allocated. Tensors may be on any device. For one thread; what studies compiled kernels
    uses it."""
    global _recorder
    _recorder = _Recorder(arch, [])
    try:
        yield _recorder.launches
    finally:
        _recorder = None


@contextmanager
def changed(kernel: str, **options: Any) -> Iterator[None]:
    """Within it a kernel, by its name, is launched with other options than its tile's: num_warps, num_stages. Blocks
    are counted by the grid before, and may be changed only where launches are recorded. For one thread."""
    _changes[kernel] = options
    try:
        yield
    finally:
        del _changes[kernel]


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    tile: Tile,
    fp_fusion: bool = True,
    reaches: Any = (),  # a sequence of tensors
    **named: Any,
) -> None:
    """Starts a kernel on its first tensor's device and PyTorch's current stream; nothing, where the grid is empty.

    fp_fusion: whether a product and a sum may be contracted to a fused multiply-add, which rounds once. Where a page
    prescribes each rounding they may not.
    reaches: tensors that the kernel is led to by addresses in memory: what watches an interpreted launch must know.
    """
    if 0 in grid:
        return
    named |= tile.options
    named["enable_fp_fusion"] = fp_fusion
    if _changes:
        named |= _changes.get(kernel.__name__, {})
    if _recorder is not None:
        _recorder.launches.append(Launch(kernel, grid, arguments, named))
        return
    if INTERPRETED:
        reached[:] = reaches
        kernel[grid](*arguments, **named)
        return
    device = next(a for a in arguments if isinstance(a, Tensor)).device
    if device.index is None or device.index == driver.active.get_current_device():
        start(kernel, grid, arguments, named)
    else:
        with torch.cuda.device(device):
            start(kernel, grid, arguments, named)


def arch(t: Tensor) -> str:
    """The architecture that a tensor's kernels are compiled for: "sm_90", "gfx942"."""
    if _recorder is not None:
        return _recorder.arch
    return _arch(t.device) if t.is_cuda else INTERPRETED_AS


@cache
def _arch(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def rows(x: Tensor) -> tuple[Tensor, int]:
    """`x` (..., C) as rows with one stride: (x, row stride in elements), copied only if its strides don't allow it."""
    if x.is_contiguous() and x.numel() != x.shape[-1]:
        return x, x.shape[-1]
    stride = _row_stride(x)
    return (x.contiguous(), x.shape[-1]) if stride is None else (x, stride)


def blocks(x: Tensor) -> tuple[Tensor, int, int, int]:
    """`x` (..., C) as blocks of rows: (x, rows of a block, stride from block to block, from row to row), copied only if
    its strides don't allow it: the heads of one projection's output lie so."""
    stride = x.shape[-1] if x.is_contiguous() and x.numel() != x.shape[-1] else _row_stride(x)
    if stride is None and x.dim() > 2 and (outer := _row_stride(x[..., 0, :])) is not None:
        return x, x.shape[-2], outer, x.stride(-2)
    x, stride = (x, stride) if stride is not None else (x.contiguous(), x.shape[-1])
    return x, max(count_rows(x), 1), 0, stride


def _row_stride(x: Tensor) -> int | None:
    """The one stride that leads from each row of (..., C) to the next, None where there isn't one. A row alone keeps
    that of the rows it was taken from, so that it is read by the same accesses as among them."""
    outer = [(n, stride) for n, stride in zip(x.shape[:-1], x.stride()) if n > 1]
    if x.stride(-1) != 1 or any(s != t * n for (_, s), (n, t) in pairwise(outer)):
        return None
    if outer:
        return outer[-1][1]
    return x.stride(-2) if x.dim() > 1 else x.shape[-1]


def count_rows(x: Tensor) -> int:
    """How many rows (..., C) has; none where it has no elements."""
    return x.numel() // x.shape[-1] if x.numel() else 0


def empty(shape: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    """torch.empty for an output or for scratch memory, beside `like`."""
    return torch.empty(tuple(shape), dtype=dtype, device=like.device)


def signed(word: int, bits: int = 32) -> int:
    """The low bits of a number as a signed integer, which a kernel takes with one type whatever its value: Triton would
    type 2^31 otherwise than 2^31 - 1 and compile again."""
    word &= (1 << bits) - 1
    return word - (1 << bits) if word >> (bits - 1) else word


def cdiv(n: int, d: int) -> int:
    return -(-n // d)
