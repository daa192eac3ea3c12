"""The losses of preferences: one program for the batch, a block of sequences at a time, its mean in fp64."""

from __future__ import annotations

import triton
import triton.language as tl
from gptfast.kernels.triton.policy_kernels import exp_beyond_linear

REWARD = tl.constexpr(0)
SIGMOID = tl.constexpr(1)
ROBUST = tl.constexpr(2)
IPO = tl.constexpr(3)
HINGE = tl.constexpr(4)
ORPO = tl.constexpr(5)


@triton.jit
def log1p_of(e):
    """log(1 + e) for e > -1: where 1 + e was rounded, its logarithm is corrected by as much (Kahan)."""
    u = 1.0 + e
    safe = tl.where(u == 1.0, 2.0, u)
    return tl.where(u == 1.0, e, tl.log(safe) * (e / (safe - 1.0)))


@triton.jit
def log_sigmoid(x):
    return tl.where(x > 0, 0.0, x) - log1p_of(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    """What is small keeps its precision; nothing overflows."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def expm1_of(x):
    return x + exp_beyond_linear(x, tl.exp(x))


@triton.jit
def log1mexp(x):
    """log(1 - e^x) for x < 0, near 0 and far from it (Maechler 2012, eq. 7)."""
    far = tl.where(x > -0.6931471805599453, -1.0, x)
    return tl.where(x > -0.6931471805599453, tl.log(-expm1_of(x)), log1p_of(-tl.exp(far)))


@triton.jit
def read_block(of, i, N):
    return tl.load(of + i, mask=i < N, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["N"])
def _pair_losses_kernel(
    chosen, rejected, reference_chosen, reference_rejected, margin, loss, slopes, rewards, N,
    beta, gamma, smoothing, centring,
    KIND: tl.constexpr, HAS_CHOSEN: tl.constexpr, HAS_REJECTED: tl.constexpr, HAS_MARGIN: tl.constexpr,
    HAS_REWARDS: tl.constexpr, IS_MEAN: tl.constexpr, USE_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h is what a loss wants large, `by` its derivative by h, `also` what chosen and rejected get beside that."""
    total = tl.full((), 0.0, tl.float64)
    share = 1.0
    if IS_MEAN:
        share = (1.0 / tl.cast(N, tl.float64)).to(tl.float32)
    for begin in range(0, N, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        c = read_block(chosen, i, N)
        r = read_block(rejected, i, N)
        if HAS_CHOSEN:
            c -= read_block(reference_chosen, i, N)
        if HAS_REJECTED:
            r -= read_block(reference_rejected, i, N)
        steep_c, steep_r = beta, -beta
        also = 0.0
        if KIND == IPO:
            apart = c - r - 1.0 / (2.0 * beta)
            value = apart * apart
            by = 2.0 * apart
            steep_c, steep_r = 1.0, -1.0
        elif KIND == HINGE:
            slack = 1.0 - beta * (c - r)
            value = tl.where(slack <= 0, 0.0, slack)
            by = tl.where(slack > 0, -1.0, 0.0)
        else:
            if KIND == REWARD:
                h = c - r
                if HAS_MARGIN:
                    h -= read_block(margin, i, N)
                steep_c, steep_r = 1.0, -1.0
            elif KIND == ORPO:
                h = (c - r) - (log1mexp(c) - log1mexp(r))
                steep_c, steep_r = -1.0 / expm1_of(c), 1.0 / expm1_of(r)
            else:
                h = beta * (c - r) - gamma
            value = -log_sigmoid(h)
            by = -sigmoid(-h)
            if KIND == SIGMOID:
                value = (1.0 - smoothing) * value - tl.where(smoothing > 0.0, smoothing * log_sigmoid(-h), 0.0)
                by = (1.0 - smoothing) * by + smoothing * sigmoid(h)
            elif KIND == ROBUST:
                other = tl.where(smoothing > 0.0, smoothing * log_sigmoid(-h), 0.0)
                value = ((1.0 - smoothing) * value + other) / (1.0 - 2.0 * smoothing)
                by = ((1.0 - smoothing) * by - smoothing * sigmoid(h)) / (1.0 - 2.0 * smoothing)
            elif KIND == REWARD:
                value += centring * (c + r) * (c + r)
                also = 2.0 * centring * (c + r)
        if HAS_REWARDS:
            tl.store(rewards + i, beta * c, mask=i < N)
            tl.store(rewards + N + i, beta * r, mask=i < N)
        if USE_GRADIENT:
            tl.store(slopes + i, (by * steep_c + also) * share, mask=i < N)
            tl.store(slopes + N + i, (by * steep_r + also) * share, mask=i < N)
        if IS_MEAN:
            total += tl.sum(tl.where(i < N, value, 0.0).to(tl.float64), 0)
        else:
            tl.store(loss + i, value, mask=i < N)
    if IS_MEAN:
        tl.store(loss, (total / tl.cast(N, tl.float64)).to(tl.float32))


@triton.jit(do_not_specialize=["N", "M"])
def _kto_loss_kernel(
    logprobs, reference, desirable, kl, loss, slopes, rewards, N, M, beta, good_weight, bad_weight,
    HAS_KL: tl.constexpr, IS_MEAN: tl.constexpr, USE_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    total = tl.full((), 0.0, tl.float64)
    share, z = 1.0, 0.0
    if IS_MEAN:
        share = (1.0 / tl.cast(N, tl.float64)).to(tl.float32)
    if HAS_KL:
        of_others = tl.full((), 0.0, tl.float64)
        for begin in range(0, M, BLOCK):
            of_others += tl.sum(read_block(kl, begin + tl.arange(0, BLOCK), M).to(tl.float64), 0)
        mean = (of_others / tl.cast(M, tl.float64)).to(tl.float32)
        z = tl.where(mean < 0, 0.0, mean)
    for begin in range(0, N, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        a = read_block(logprobs, i, N) - read_block(reference, i, N)
        is_good = tl.load(desirable + i, mask=i < N, other=0) != 0
        weight = tl.where(is_good, good_weight, bad_weight)
        slope = tl.where(is_good, -beta, beta)
        value = sigmoid(slope * (a - z))
        if USE_GRADIENT:
            tl.store(slopes + i, weight * slope * value * sigmoid(-slope * (a - z)) * share, mask=i < N)
        tl.store(rewards + i, beta * a, mask=i < N)
        if IS_MEAN:
            total += tl.sum(tl.where(i < N, weight * value, 0.0).to(tl.float64), 0)
        else:
            tl.store(loss + i, weight * value, mask=i < N)
    if IS_MEAN:
        tl.store(loss, (total / tl.cast(N, tl.float64)).to(tl.float32))
