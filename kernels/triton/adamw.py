"""adamw and gradient_norm: lists of tensors in one launch, found through a table of their addresses in GPU memory.

A program takes one chunk of 8,192 elements of one tensor. Which one, it finds by counting the tensors whose first chunk
isn't beyond its own number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from gptfast.kernels.triton import DTYPES, arch, cdiv, elsewhere, empty, launch, tiles

CHUNK = 8192  # elements whose squares are one sum of the norm: gptfast/ops/adamw.py


@triton.jit
def _find(table, count, ROW: tl.constexpr, IS_ALIGNED: tl.constexpr, BLOCK_T: tl.constexpr):
    """This program's tensor: its number, its row of the table, the first element of this program's chunk, the number of
    all. A row begins with the tensor's first chunk and its number of elements."""
    chunk = tl.program_id(0)
    i = tl.arange(0, BLOCK_T)
    starts = tl.load(table + i * ROW, mask=i < count, other=0x7FFFFFFF)
    which = tl.sum((starts <= chunk).to(tl.int32), 0) - 1
    row = table + which * ROW
    n = tl.load(row + 1)
    if IS_ALIGNED:
        n = tl.multiple_of(n, 16)
    return which, row, (chunk - tl.load(row)) * 8192, n


@triton.jit
def _follow(entry, DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """The pointer that an entry of the table is."""
    pointer = tl.load(entry).to(tl.pointer_type(DTYPE))
    if IS_ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit(do_not_specialize=["count"])
def _gradient_norm_kernel(
    table, sums, count, GRAD: tl.constexpr, IS_ALIGNED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The sum of the squares of one chunk, in fp64."""
    _, row, start, n = _find(table, count, 4, IS_ALIGNED, BLOCK_T)
    grad = _follow(row + 2, GRAD, IS_ALIGNED)
    total = tl.zeros((BLOCK_N,), tl.float64)
    for at in range(0, 8192, BLOCK_N):
        i = start + at + tl.arange(0, BLOCK_N)
        g = tl.load(grad + i, mask=i < n, other=0.0).to(tl.float64)
        total += g * g
    tl.store(sums + tl.load(row + 3) + start // 8192, tl.sum(total, 0))


@triton.jit(do_not_specialize=["chunks"])
def _total_norm_kernel(sums, norm, chunks, BLOCK_N: tl.constexpr):
    total = tl.zeros((BLOCK_N,), tl.float64)
    for start in range(0, chunks, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        total += tl.load(sums + i, mask=i < chunks, other=0.0)
    tl.store(norm, tl.sqrt(tl.sum(total, 0)).to(tl.float32))


@triton.jit(do_not_specialize=["count"])
def _adamw_kernel(
    table, factors, grad_scale, count, decay, rest1, beta2, rest2, eps,
    PARAM: tl.constexpr, GRAD: tl.constexpr, HAS_MASTER: tl.constexpr, IS_ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """factors (count, 2): -lr / (1 - beta1^t) and 1 / sqrt(1 - beta2^t) of each tensor; grad_scale: one number."""
    by = tl.load(grad_scale)
    which, row, start, n = _find(table, count, 7, IS_ALIGNED, BLOCK_T)
    step = tl.load(factors + 2 * which)
    scale = tl.load(factors + 2 * which + 1)
    param = _follow(row + 2, PARAM, IS_ALIGNED)
    grad = _follow(row + 3, GRAD, IS_ALIGNED)
    exp_avg = _follow(row + 4, tl.float32, IS_ALIGNED)
    exp_avg_sq = _follow(row + 5, tl.float32, IS_ALIGNED)
    if HAS_MASTER:
        updated = _follow(row + 6, tl.float32, IS_ALIGNED)
    else:
        updated = param
    for at in range(0, 8192, BLOCK_N):
        i = start + at + tl.arange(0, BLOCK_N)
        inside = i < n
        g = tl.load(grad + i, mask=inside, other=0.0).to(tl.float32) * by
        m = tl.load(exp_avg + i, mask=inside, other=0.0)
        v = tl.load(exp_avg_sq + i, mask=inside, other=0.0)
        w = tl.load(updated + i, mask=inside, other=0.0).to(tl.float32)
        m += rest1 * (g - m)
        v = beta2 * v + rest2 * g * g
        w = w * decay + step * (m / (tl.sqrt(v) * scale + eps))
        tl.store(exp_avg + i, m, mask=inside)
        tl.store(exp_avg_sq + i, v, mask=inside)
        tl.store(updated + i, w.to(updated.dtype.element_ty), mask=inside)
        if HAS_MASTER:
            tl.store(param + i, w.to(PARAM), mask=inside)


TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def supports_gradient_norm(grads: Sequence[Tensor]) -> str | None:
    return _unsupported(grads)


def gradient_norm(grads: Sequence[Tensor]) -> Tensor:
    grads = [g if _is_dense(g) else g.contiguous() for g in grads]
    first_sums = list(accumulate((cdiv(g.numel(), CHUNK) for g in grads), initial=0))
    sums = empty((first_sums[-1],), torch.float64, grads[0])
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, g in enumerate(grads):
        if g.numel():
            groups.setdefault((g.dtype, _is_aligned(g)), []).append(i)
    for (dtype, aligned), members in groups.items():
        rows = [[grads[i].numel(), grads[i].data_ptr(), first_sums[i]] for i in members]
        table, chunks, tile = _table(rows, grads[0])
        launch(
            *(_gradient_norm_kernel, (chunks,), table, sums, len(members)),
            GRAD=TYPES[dtype],
            IS_ALIGNED=aligned,
            tile=tile,
            reaches=[grads[i] for i in members],
        )
    norm = empty((), torch.float32, sums)
    launch(_total_norm_kernel, (1,), sums, norm, len(sums), tile=tiles.total_norm())
    return norm


def supports(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    masters: Sequence[Tensor | None] | None,
    **_: Any,
) -> str | None:
    kept = [t for t in masters or () if t is not None]
    if reason := _unsupported(params, grads, exp_avgs, exp_avg_sqs, kept):
        return reason
    if any(not s.is_cpu or s.dtype != torch.float32 for s in steps):
        return "steps must be float32 on the CPU"
    for i, (p, m, v) in enumerate(zip(params, exp_avgs, exp_avg_sqs)):
        master = p if masters is None else masters[i]
        strides = p.stride()
        if not _is_dense(p) or m.stride() != strides or v.stride() != strides:
            return "a parameter and its moments must lie alike, without gaps"
        if master is not None and master.stride() != strides:
            return "a parameter and its master must lie alike"
    return None


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: float | Tensor,
    masters: Sequence[Tensor | None] | None,
) -> None:
    """grad_scale: a tensor, (), where it is made of a norm on the GPU."""
    wide = grad_scale if isinstance(grad_scale, Tensor) else torch.tensor(grad_scale, dtype=torch.float64)
    by = wide.float().to(params[0].device, non_blocking=True)
    grads = [
        g if g.stride() == p.stride() else torch.empty_like(p, dtype=g.dtype).copy_(g) for p, g in zip(params, grads)
    ]
    torch._foreach_add_(list(steps), 1)  # pyright: ignore[reportPrivateImportUsage]
    times = torch.stack(list(steps)).tolist()
    kept: Sequence[Tensor | None] = [None] * len(params) if masters is None else masters
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, p in enumerate(params):
        if p.numel():
            lists = [t for t in (p, grads[i], exp_avgs[i], exp_avg_sqs[i], kept[i]) if t is not None]
            kind = (p.dtype, grads[i].dtype, kept[i] is not None, all(_is_aligned(t) for t in lists))
            groups.setdefault(kind, []).append(i)
    for (dtype, grad_dtype, has_master, aligned), members in groups.items():
        lists = [[t[i] for i in members] for t in (params, grads, exp_avgs, exp_avg_sqs, kept)]
        rows = [[p.numel(), *(0 if t is None else t.data_ptr() for t in (p, *rest))] for p, *rest in zip(*lists)]
        factors = [[-lr / (1 - betas[0] ** times[i]), (1 - betas[1] ** times[i]) ** -0.5] for i in members]
        table, chunks, tile = _table(rows, params[0])
        launch(
            *(_adamw_kernel, (chunks,), table),
            *(torch.tensor(factors, dtype=torch.float32).to(params[0].device, non_blocking=True), by, len(members)),
            *(1 - lr * weight_decay, 1 - betas[0], betas[1], 1 - betas[1], eps),
            PARAM=TYPES[dtype],
            GRAD=TYPES[grad_dtype],
            HAS_MASTER=has_master,
            IS_ALIGNED=aligned,
            tile=tile,
            reaches=[t for tensors in lists for t in tensors if t is not None],
        )
    # So that a backward through what the step has overwritten raises, as after PyTorch's own.
    for t in (*params, *exp_avgs, *exp_avg_sqs, *(t for t in kept if t is not None)):
        if not t.is_inference():
            torch.autograd.graph.increment_version(t)


def _table(rows: list[list[int]], like: Tensor) -> tuple[Tensor, int, tiles.Tile]:
    """The rows, each with its first chunk before it, on the GPU; the number of chunks; the tile."""
    starts = list(accumulate((cdiv(row[0], CHUNK) for row in rows), initial=0))
    table = torch.tensor([[start, *row] for start, row in zip(starts, rows)], dtype=torch.int64)
    return table.to(like.device, non_blocking=True), starts[-1], tiles.adamw(len(rows), arch(like))


def _unsupported(*lists: Iterable[Tensor]) -> str | None:
    for tensors in lists:
        for t in tensors:
            if reason := elsewhere(t):
                return reason
            if t.dtype not in DTYPES:
                return f"it takes float32, bfloat16 and float16, not {str(t.dtype).removeprefix('torch.')}"
    return None


def _is_aligned(t: Tensor) -> bool:
    """Whether its elements can be read 16 bytes at a time, to the last."""
    return t.data_ptr() % 16 == 0 and t.numel() % 16 == 0


def _is_dense(t: Tensor) -> bool:
    """Whether its elements fill their memory without gaps, in whichever order."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True
