"""Advantages: generalised advantage estimation as a scan from the last token to the first, a sequence to a program;
those of groups, some groups to a program; whitening in two launches, of which the first sums up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from gptfast.kernels.triton import cdiv, elsewhere, empty, launch, unsupported
from gptfast.kernels.triton.policy import with_stride
from gptfast.kernels.triton.policy_kernels import kept, read, sum_rows
from gptfast.kernels.triton.tiles import flat_tile, group_tile, sequence_tile


@triton.jit
def latest(value, there, next_value, is_next):
    """Of what came so far and the next element: the element where there is one."""
    return tl.where(is_next != 0, next_value, value), there | is_next


@triton.jit
def decayed(factor, advantage, next_factor, delta):
    """delta + next_factor (advantage + factor x), as a factor of x and the rest."""
    return factor * next_factor, delta + next_factor * advantage


@triton.jit
def _gae_kernel(
    rewards, values, mask, advantages, returns, T, rewards_stride, values_stride, mask_stride, gamma, lam,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A_t = delta_t + gamma lam A_next, delta_t = r_t + gamma V_next - V_t; `next` is the next token that is kept."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    later_value = tl.full((), 0.0, tl.float32)  # of the first token kept in the blocks after this one
    later_advantage = tl.full((), 0.0, tl.float32)
    for block in range(tl.cdiv(T, BLOCK) - 1, -1, -1):
        cols = block * BLOCK + i
        keep = kept(mask, row, cols, T, mask_stride, HAS_MASK)
        follows = kept(mask, row, cols + 1, T, mask_stride, HAS_MASK) & (i + 1 < BLOCK)
        of_row = values + row * values_stride
        V = read(of_row, cols, cols < T, keep)
        after = read(of_row, cols + 1, cols + 1 < T, follows)
        next_value, there = tl.associative_scan((after, follows.to(tl.int32)), 0, latest, reverse=True)
        next_value = tl.where(there != 0, next_value, later_value)
        r = read(rewards + row * rewards_stride, cols, cols < T, keep)
        delta = tl.where(keep, r + gamma * next_value - V, 0.0)
        factor, A = tl.associative_scan((tl.where(keep, gamma * lam, 1.0), delta), 0, decayed, reverse=True)
        A = A + factor * later_advantage
        tl.store(advantages + row * T + cols, tl.where(keep, A, 0.0), mask=cols < T)
        tl.store(returns + row * T + cols, tl.where(keep, A + V, 0.0), mask=cols < T)
        later_advantage = tl.sum(tl.where(i == 0, A, 0.0), 0)
        later_value = tl.sum(tl.where(i == 0, tl.where(keep, V, next_value), 0.0), 0)


@triton.jit(do_not_specialize=["groups"])
def _group_advantages_kernel(
    rewards, advantages, groups, n, KIND: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    group = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    of_groups = rewards + group[:, None] * n
    total = tl.zeros((BLOCK_R,), tl.float64)
    for begin in range(0, n, BLOCK_C):
        at = begin + tl.arange(0, BLOCK_C)[None, :]
        inside = (group < groups)[:, None] & (at < n)
        total += tl.sum(tl.load(of_groups + at, mask=inside, other=0.0).to(tl.float64), 1)
    mean = (total / tl.cast(n, tl.float64)).to(tl.float32)[:, None]
    scale = tl.full((BLOCK_R,), 1.0, tl.float32)
    if KIND == 1:
        squares = tl.zeros((BLOCK_R,), tl.float64)
        for begin in range(0, n, BLOCK_C):
            at = begin + tl.arange(0, BLOCK_C)[None, :]
            inside = (group < groups)[:, None] & (at < n)
            r = tl.load(of_groups + at, mask=inside, other=0.0).to(tl.float32)
            apart = tl.where(inside, r - mean, 0.0).to(tl.float64)
            squares += tl.sum(apart * apart, 1)
        variance = squares / tl.maximum(tl.cast(n, tl.float64) - 1.0, 1.0)
        scale = 1.0 / (tl.sqrt(variance.to(tl.float32)) + 1e-4)
    elif KIND == 3:
        scale = scale * (tl.cast(n, tl.float32) / (tl.cast(n, tl.float32) - 1.0))
    for begin in range(0, n, BLOCK_C):
        at = begin + tl.arange(0, BLOCK_C)[None, :]
        inside = (group < groups)[:, None] & (at < n)
        r = tl.load(of_groups + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(advantages + group[:, None] * n + at, (r - mean) * scale[:, None], mask=inside)


@triton.jit
def _whiten_sums_kernel(x, mask, sums, n, chunks, HAS_MASK: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Of a chunk: its sum, that of its squares, and how many count, at sums[s, chunk]. A square of fp32 is exact."""
    chunk = tl.program_id(0)
    start = chunk.to(tl.int64) * CHUNK
    total = tl.full((), 0.0, tl.float64)
    squares = tl.full((), 0.0, tl.float64)
    count = tl.full((), 0.0, tl.float64)
    for begin in range(0, CHUNK, BLOCK):
        i = start + begin + tl.arange(0, BLOCK)
        keep = kept(mask, 0, i, n, 0, HAS_MASK)
        value = read(x, i, i < n, keep).to(tl.float64)
        total += tl.sum(value, 0)
        squares += tl.sum(value * value, 0)
        count += tl.sum(keep.to(tl.float64), 0)
    tl.store(sums + chunk, total)
    tl.store(sums + chunks + chunk, squares)
    tl.store(sums + 2 * chunks + chunk, count)


@triton.jit
def _whiten_kernel(
    x, mask, sums, white, n, chunks, IS_SHIFTED: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr
):
    share = 1.0 / tl.maximum(sum_rows(sums + 2 * chunks, chunks, BLOCK), 1.0)
    mean = sum_rows(sums, chunks, BLOCK) * share
    variance = sum_rows(sums + chunks, chunks, BLOCK) * share - mean * mean
    scale = tl.rsqrt(tl.where(variance < 0, 0.0, variance).to(tl.float32) + 1e-8)
    mean32 = mean.to(tl.float32)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = kept(mask, 0, i, n, 0, HAS_MASK)
    out = (read(x, i, i < n, keep) - mean32) * scale
    if not IS_SHIFTED:
        out += mean32
    tl.store(white + i, tl.where(keep, out, 0.0), mask=i < n)


def supports_gae(rewards: Tensor, values: Tensor, mask: Tensor | None, gamma: float, lam: float) -> str | None:
    return elsewhere(mask) or unsupported(rewards, values)


def gae(rewards: Tensor, values: Tensor, mask: Tensor | None, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    B, T = rewards.shape
    advantages, returns = (empty((B, T), torch.float32, rewards) for _ in range(2))
    (r, r_stride), (V, V_stride) = with_stride(rewards), with_stride(values)
    mask, mask_stride = with_stride(None if mask is None else mask.view(torch.uint8))
    launch(
        _gae_kernel,
        (B if T else 0,),
        *(r, V, mask, advantages, returns, T, r_stride, V_stride, mask_stride, float(gamma), float(lam)),
        HAS_MASK=mask is not None,
        tile=sequence_tile(T),
    )
    return advantages, returns


GROUP_KINDS = {"grpo": 1, "dr_grpo": 2, "rloo": 3}
CHUNK = 4096  # elements whose sums are one: 4 blocks


def supports_group_advantages(rewards: Tensor, group_size: int, kind: str) -> str | None:
    return unsupported(rewards)


def group_advantages(rewards: Tensor, group_size: int, kind: str) -> Tensor:
    groups, tile = rewards.shape[0] // group_size, group_tile(group_size)
    advantages = empty(rewards.shape, torch.float32, rewards)
    launch(
        _group_advantages_kernel,
        (cdiv(groups, tile.blocks["BLOCK_R"]),),
        *(rewards.contiguous(), advantages, groups, group_size),
        KIND=GROUP_KINDS[kind],
        tile=tile,
    )
    return advantages


def supports_whiten(x: Tensor, mask: Tensor | None, shift_mean: bool) -> str | None:
    return elsewhere(mask) or unsupported(x)


def whiten(x: Tensor, mask: Tensor | None, shift_mean: bool) -> Tensor:
    n, tile = x.numel(), flat_tile()
    chunks, x, white = cdiv(n, CHUNK), x.contiguous(), empty(x.shape, torch.float32, x)
    sums = empty((3, chunks), torch.float64, x)
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    flag: dict[str, Any] = {"HAS_MASK": mask is not None}
    launch(_whiten_sums_kernel, (chunks,), x, mask, sums, n, chunks, CHUNK=CHUNK, **flag, tile=tile)
    grid = (cdiv(n, tile.blocks["BLOCK"]),)
    launch(_whiten_kernel, grid, x, mask, sums, white, n, chunks, IS_SHIFTED=shift_mean, **flag, tile=tile)
    return white
