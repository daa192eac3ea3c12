"""Generalised advantage estimation as a scan from the last token to the first: a sequence to a program."""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from gptfast.kernels.triton import empty, launch, unsupported
from gptfast.kernels.triton.policy import with_stride
from gptfast.kernels.triton.policy_kernels import kept, read
from gptfast.kernels.triton.tiles import sequence_tile


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


def supports_gae(rewards: Tensor, values: Tensor, mask: Tensor | None, gamma: float, lam: float) -> str | None:
    return unsupported(rewards, values)


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
