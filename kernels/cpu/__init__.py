"""The CPU backend: C++ kernels (gptfast._cpu), one instruction set of several chosen when the module loads.

Each module here has the name of its op page and, for each op there, `supports_<op>(...)` (`supports` where the page has
one op): None, or the reason why not as a sentence; the op itself, which allocates the outputs and passes pointers; and
perhaps `prepare_<op>`, the op for all calls with the same signature. Arguments come checked from the op page.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import compress, pairwise
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from gptfast import _cpu

Plan = _cpu.Plan  # of recorded launches
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LARGE = 8 << 20  # bytes
KEPT = 1 << 20  # bytes of workspace that a thread keeps, at most


@contextmanager
def recording() -> Iterator[list[tuple[str, int, dict[str, Any]]]]:
    """Within it, this thread's launches are written to the list as they run: (kernel, threads, fields)."""
    launches: list[tuple[str, int, dict[str, Any]]] = []
    _cpu.record(launches)
    _own.recording = True
    try:
        yield launches
    finally:
        _own.recording = False
        _cpu.record(None)


def join_pytorch(join: bool) -> None:
    """Whether single kernels run on PyTorch's own OpenMP threads (where it has libgomp's) from now on, or on ours. It
    pays where they come between many of PyTorch's ops, each of which would wait for its threads to wake, and costs
    where a neighbour takes one of the cores: these threads wait for each other, ours don't."""
    _cpu.join_pytorch(join)


def unsupported(*tensors: Tensor | None, backward: bool = False) -> str | None:
    """The reasons common to all kernels: storage dtype, device, and gradients, unless there is a backward."""
    for t in tensors:
        if t is None:
            continue
        if not t.is_cpu:
            return f"the tensors are on {t.device}, and this backend's are on the CPU"
        if t.dtype not in DTYPES:
            return f"it takes float32, bfloat16 and float16, not {str(t.dtype).removeprefix('torch.')}"
        if t.requires_grad and not backward and torch.is_grad_enabled():
            return "an input requires a gradient, and this kernel has no backward yet"
    return None


def threads(elements: int) -> int:
    """How many threads work on so many elements: PyTorch's own setting, or one where waking others would cost more."""
    return 1 if elements < 16384 else torch.get_num_threads()


def rows(x: Tensor) -> tuple[Tensor, int]:
    """`x` (..., C) as rows with one stride: (x, row stride in elements), copied only if its strides don't allow it."""
    if x.is_contiguous():
        return x, x.shape[-1]
    stride = _row_stride(x)
    return (x.contiguous(), x.shape[-1]) if stride is None else (x, stride)


def blocks(x: Tensor) -> tuple[Tensor, int, int, int]:
    """`x` (..., C) as blocks of rows: (x, rows of a block, stride from block to block, from row to row), copied only if
    its strides don't allow it: the heads of one projection's output lie so."""
    stride = x.shape[-1] if x.is_contiguous() else _row_stride(x)
    if stride is None and x.dim() > 2 and (outer := _row_stride(x[..., 0, :])) is not None:
        return x, x.shape[-2], outer, x.stride(-2)
    x, stride = (x, stride) if stride is not None else (x.contiguous(), x.shape[-1])
    return x, max(x.numel() // max(x.shape[-1], 1), 1), 0, stride


def as_rows(x: Tensor) -> Tensor:
    return rows(x)[0]


def as_blocks(x: Tensor) -> Tensor:
    return blocks(x)[0]


def _row_stride(x: Tensor) -> int | None:
    """The one stride that leads from each row of (..., C) to the next, None where there isn't one."""
    outer = [(n, stride) for n, stride in zip(x.shape[:-1], x.stride()) if n > 1]
    if x.stride(-1) != 1 or any(s != t * n for (_, s), (n, t) in pairwise(outer)):
        return None
    return outer[-1][1] if outer else x.shape[-1]


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """torch.empty for an output. A large one's memory comes from memory.h, which keeps it for the next: malloc would
    map it anew for each call. (A recorded launch keeps its own.)"""
    if _own.recording or math.prod(shape) * dtype.itemsize < LARGE:
        return torch.empty(shape, dtype=dtype)
    return large(shape, dtype)


def large(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    code = 1 if dtype == torch.uint8 else 4 if dtype == torch.bfloat16 else 2
    return torch.from_dlpack(_cpu.output(shape, code, 8 * dtype.itemsize))


class _Own(threading.local):
    """What belongs to one thread."""

    recording = False
    workspace = torch.empty(0, dtype=torch.uint8)


_own = _Own()


def shared(nbytes: int) -> Tensor:
    """Memory that the workers of a launch share and nobody needs after it: the same for all of a thread's launches.
    A recorded one keeps its own, for a plan may run in any thread."""
    if _own.recording or nbytes > KEPT:
        return empty((nbytes,), torch.uint8)
    if (kept := _own.workspace).shape[0] < nbytes:
        kept = _own.workspace = torch.empty(nbytes, dtype=torch.uint8)
    return kept


def prepare(
    kernel: str,
    threads: int,
    outputs: Mapping[str, tuple[Sequence[int], torch.dtype]],
    inputs: Mapping[str, tuple[str, Callable[[Any], Tensor] | None]],
    arguments: dict[str, Any],
    results: int = 1,
    workspace: int = 0,
    **numbers: Any,
) -> Callable[..., Any]:
    """A kernel as the function of its op's arguments, for all that have the shapes, strides and dtypes of these.

    outputs: the fields that each call allocates, with shape and dtype; the first `results` are what it returns. An
    empty one is made, and is no field.
    inputs: fields, the argument that each is, and how it is made to fit (None: as it is). workspace: bytes that the
    field of this name points to, which hold nothing between calls. numbers: all other fields.
    """
    room = {"workspace": partial(shared, workspace)} if workspace else {}
    fields = [name for name, (shape, _) in outputs.items() if 0 not in shape]
    launch, address = _cpu.Prepared(kernel, (*fields, *room, *inputs), numbers), Tensor.data_ptr
    makes = [*[maker(shape, dtype) for shape, dtype in outputs.values()], *room.values()]
    make, all_fields = makes[0], len(fields) == len(outputs)
    is_field = [*(name in fields for name in outputs), *(True for _ in room)]
    # What fits as it is always will: dtypes and strides stay.
    fits = [
        (name, fit if fit and fit(arguments[name]) is not arguments[name] else None) for name, fit in inputs.values()
    ]
    get = itemgetter(*[name for name, _ in fits])
    as_given = len(fits) > 1 and not any(fit for _, fit in fits)

    def run(**arguments: Any) -> Any:
        made = [make() for make in makes]
        given = get(arguments) if as_given else [fit(arguments[name]) if fit else arguments[name] for name, fit in fits]
        launch(threads, *map(address, made if all_fields else compress(made, is_field)), *map(address, given))
        return made[0] if results == 1 else tuple(made[:results])

    def run_at_once(**arguments: Any) -> Any:  # 0.6 us less
        y = make()
        launch(threads, y.data_ptr(), *map(address, get(arguments)))
        return y

    return run_at_once if len(makes) == 1 == len(fields) and as_given else run


def maker(shape: Sequence[int], dtype: torch.dtype) -> Callable[[], Tensor]:
    """empty() for one shape."""
    if math.prod(shape) * dtype.itemsize >= LARGE:
        return partial(empty, tuple(shape), dtype)
    return partial(torch.empty, *shape or ((),), dtype=dtype)  # numbers one by one: 0.6 us less than a tuple of them


CHUNKS, SMALLEST = 128, 8  # chunks of rows, at most, that weight gradients are summed in; their sizes' common factor


def chunk_of(rows: int) -> int:
    """How many rows a chunk of a sum over rows has: from the shape alone, so that no sum depends on the machine."""
    return max(-(-rows // (CHUNKS * SMALLEST)) * SMALLEST, SMALLEST)


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
