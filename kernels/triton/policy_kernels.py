"""The policy and value losses: a sequence to a program, its sums in fp64; then one program for the whole batch."""

from __future__ import annotations

import triton
import triton.language as tl

FARTHEST = tl.constexpr(20.0)  # of a log-ratio


@triton.jit
def clamp(v, low, high):
    """NaN stays NaN."""
    return tl.where(v < low, low, tl.where(v > high, high, v))


@triton.jit
def exp_beyond_linear(x, e):
    """e^x - 1 - x, given e = e^x: near 0 by its series to x^11, 1e-9 of it, for there the difference cancels."""
    p = 2.505210838544172e-08  # 1 / 11!
    p = p * x + 2.755731922398589e-07
    p = p * x + 2.755731922398589e-06
    p = p * x + 2.48015873015873e-05
    p = p * x + 1.984126984126984e-04
    p = p * x + 1.388888888888889e-03
    p = p * x + 8.333333333333333e-03
    p = p * x + 4.166666666666667e-02
    p = p * x + 1.666666666666667e-01
    p = p * x + 0.5
    return tl.where(tl.abs(x) < 1.0, x * x * p, e - 1.0 - x)


@triton.jit
def kept(mask, row, cols, T, stride, HAS_MASK: tl.constexpr):
    inside = cols < T
    if HAS_MASK:
        inside = inside & (tl.load(mask + row * stride + cols, mask=inside, other=0) != 0)
    return inside


@triton.jit
def read(of_row, cols, inside, keep):
    """In fp32, 0 where a token doesn't count: whole lines are read and then looked at, for a mask per element would cut
    each load into single ones."""
    return tl.where(keep, tl.load(of_row + cols, mask=inside, other=0.0).to(tl.float32), 0.0)


@triton.jit
def all_tokens(counts, B, T, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """How many tokens count in the whole batch."""
    tokens = tl.full((), 0, tl.int64)
    if HAS_MASK:
        for begin in range(0, B, BLOCK):
            i = begin + tl.arange(0, BLOCK)
            tokens += tl.sum(tl.load(counts + i, mask=i < B, other=0).to(tl.int64), 0)
    else:
        tokens += tl.cast(B, tl.int64) * T
    return tokens


@triton.jit
def _count_tokens_kernel(mask, counts, T, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    count = tl.full((), 0, tl.int32)
    for begin in range(0, T, BLOCK):
        cols = begin + tl.arange(0, BLOCK)
        count += tl.sum(kept(mask, row, cols, T, stride, True).to(tl.int32), 0)
    tl.store(counts + row, count)


@triton.jit
def divergence(apart, p, KIND: tl.constexpr):
    """An estimate of KL from a difference of log-probabilities, and its slope; p says where there are any."""
    k = clamp(apart, -FARTHEST, FARTHEST)
    if KIND == 1:
        value = k
        by = tl.where(p, 1.0, 0.0)
    elif KIND == 2:
        value = k * k * 0.5
        by = k
    else:
        e = tl.exp(-k)
        value = exp_beyond_linear(-k, e)
        by = 1.0 - e
    return value, tl.where(tl.abs(apart) > FARTHEST, 0.0, by)


@triton.jit
def _kl_estimate_kernel(
    logprobs, reference, estimate, gradient, n, KIND: tl.constexpr, USE_GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    p = tl.load(logprobs + i, mask=inside, other=0.0).to(tl.float32)
    apart = p - tl.load(reference + i, mask=inside, other=0.0).to(tl.float32)
    value, by = divergence(apart, inside, KIND)
    tl.store(estimate + i, value, mask=inside)
    if USE_GRADIENT:
        tl.store(gradient + i, by, mask=inside)


@triton.jit(do_not_specialize=["B"])
def _policy_rows_kernel(
    logprobs, old, reference, advantages, mask, counts, sums, gradient,
    B, T, logprobs_stride, old_stride, reference_stride, advantages_stride, mask_stride,
    denominator, low, high, beta,
    HAS_MASK: tl.constexpr, HAS_REFERENCE: tl.constexpr, HAS_DENOMINATOR: tl.constexpr, IS_SEQUENCES: tl.constexpr,
    IS_PER_TOKEN: tl.constexpr, USE_GRADIENT: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A sequence's sums, at sums[s, row], and its gradients by the log-probabilities."""
    row = tl.program_id(0).to(tl.int64)
    tokens = all_tokens(counts, B, T, HAS_MASK, BLOCK)
    count = (tl.cast(B, tl.int64) if IS_SEQUENCES else tokens).to(tl.float64)
    share = tl.cast(denominator, tl.float64) if HAS_DENOMINATOR else tl.maximum(count, 1.0)
    if IS_SEQUENCES:
        of_row = tl.load(counts + row) if HAS_MASK else T
        share = share * tl.maximum(tl.cast(of_row, tl.float64), 1.0)
    scale = (1.0 / share).to(tl.float32)
    zero = tl.full((), 0.0, tl.float64)
    of_loss, of_clipped, of_kl3, of_apart, of_square, of_kl = zero, zero, zero, zero, zero, zero
    for begin in range(0, T, BLOCK):
        cols = begin + tl.arange(0, BLOCK)
        inside = cols < T
        keep = kept(mask, row, cols, T, mask_stride, HAS_MASK)
        if IS_PER_TOKEN:
            A = read(advantages + row * advantages_stride, cols, inside, keep)
        else:
            A = tl.where(keep, tl.load(advantages + row * advantages_stride).to(tl.float32), 0.0)
        p = read(logprobs + row * logprobs_stride, cols, inside, keep)
        far = p - read(old + row * old_stride, cols, inside, keep)
        log_ratio = clamp(far, -FARTHEST, FARTHEST)
        ratio = tl.exp(log_ratio)
        plain = -A * ratio
        clamped = -A * clamp(ratio, low, high)
        clipped = clamped > plain
        loss = tl.where(clipped, clamped, plain)
        slope = tl.where(clipped | (tl.abs(far) > FARTHEST), 0.0, plain)
        if HAS_REFERENCE:
            apart = p - read(reference + row * reference_stride, cols, inside, keep)
            value, by = divergence(apart, keep, KIND)
            of_kl += tl.sum(value.to(tl.float64), 0)
            loss += beta * value
            slope += beta * by
        if USE_GRADIENT:
            tl.store(gradient + row * T + cols, slope * scale, mask=inside)
        beyond = (ratio - 1.0).to(tl.float64)
        of_loss += tl.sum(loss.to(tl.float64), 0)
        of_clipped += tl.sum(clipped.to(tl.float64), 0)
        of_kl3 += tl.sum(exp_beyond_linear(log_ratio, ratio).to(tl.float64), 0)
        of_apart += tl.sum(beyond, 0)
        of_square += tl.sum(beyond * beyond, 0)
    tl.store(sums + row, of_loss)
    tl.store(sums + B + row, of_clipped)
    tl.store(sums + 2 * B + row, of_kl3)
    tl.store(sums + 3 * B + row, of_apart)
    tl.store(sums + 4 * B + row, of_square)
    tl.store(sums + 5 * B + row, of_kl)


@triton.jit
def sum_rows(sums, B, BLOCK: tl.constexpr):
    total = tl.full((), 0.0, tl.float64)
    for begin in range(0, B, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(sums + i, mask=i < B, other=0.0), 0)
    return total


@triton.jit(do_not_specialize=["B"])
def _policy_results_kernel(
    sums, counts, results, B, T, denominator,
    HAS_MASK: tl.constexpr, HAS_DENOMINATOR: tl.constexpr, IS_SEQUENCES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss and the statistics from the sequences' sums."""
    tokens = all_tokens(counts, B, T, HAS_MASK, BLOCK).to(tl.float64)
    share = 1.0 / tl.maximum(tokens, 1.0)  # one division: each is a call, and what lives across calls is spilled
    loss = tl.full((), 0.0, tl.float64)
    for begin in range(0, B, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        of_rows = tl.load(sums + i, mask=i < B, other=0.0)
        if IS_SEQUENCES:
            count = tl.load(counts + i, mask=i < B, other=1) if HAS_MASK else tl.zeros([BLOCK], tl.int32) + T
            of_rows = of_rows / tl.maximum(count, 1).to(tl.float64)
        loss += tl.sum(of_rows, 0)
    if HAS_DENOMINATOR:
        loss = loss / tl.cast(denominator, tl.float64)
    else:
        loss = loss / tl.maximum(tl.cast(B, tl.float64), 1.0) if IS_SEQUENCES else loss * share
    apart = sum_rows(sums + 3 * B, B, BLOCK) * share
    variance = sum_rows(sums + 4 * B, B, BLOCK) * share - apart * apart
    tl.store(results, loss.to(tl.float32))
    tl.store(results + 1, (sum_rows(sums + B, B, BLOCK) * share).to(tl.float32))
    tl.store(results + 2, (sum_rows(sums + 2 * B, B, BLOCK) * share).to(tl.float32))
    tl.store(results + 3, tl.where(tokens > 0, 1.0 + apart, 0.0).to(tl.float32))
    tl.store(results + 4, tl.where(variance < 0, 0.0, variance).to(tl.float32))
    tl.store(results + 5, (sum_rows(sums + 5 * B, B, BLOCK) * share).to(tl.float32))


@triton.jit(do_not_specialize=["B"])
def _value_rows_kernel(
    values, old, returns, mask, counts, sums, gradient,
    B, T, values_stride, old_stride, returns_stride, mask_stride, denominator, clip,
    HAS_MASK: tl.constexpr, HAS_DENOMINATOR: tl.constexpr, USE_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A sequence's sums, at sums[s, row], and its gradients by the values."""
    row = tl.program_id(0).to(tl.int64)
    tokens = all_tokens(counts, B, T, HAS_MASK, BLOCK).to(tl.float64)
    share = tl.cast(denominator, tl.float64) if HAS_DENOMINATOR else tl.maximum(tokens, 1.0)
    scale = (1.0 / share).to(tl.float32)
    of_loss = tl.full((), 0.0, tl.float64)
    of_clipped = tl.full((), 0.0, tl.float64)
    for begin in range(0, T, BLOCK):
        cols = begin + tl.arange(0, BLOCK)
        inside = cols < T
        keep = kept(mask, row, cols, T, mask_stride, HAS_MASK)
        V = read(values + row * values_stride, cols, inside, keep)
        near = read(old + row * old_stride, cols, inside, keep)
        R = read(returns + row * returns_stride, cols, inside, keep)
        low, high = near - clip, near + clip
        plain = V - R
        clamped = clamp(V, low, high) - R
        plain2, clamped2 = plain * plain, clamped * clamped
        clipped = clamped2 > plain2
        of_loss += tl.sum(tl.where(clipped, clamped2, plain2).to(tl.float64), 0)
        of_clipped += tl.sum(clipped.to(tl.float64), 0)
        if USE_GRADIENT:  # where both terms are equal but only one moves, half of it, as of torch.maximum
            half = (clamped2 == plain2) & ((low > V) | (high < V))
            slope = tl.where(clipped, 0.0, tl.where(half, plain * 0.5, plain))
            tl.store(gradient + row * T + cols, slope * scale, mask=inside)
    tl.store(sums + row, of_loss)
    tl.store(sums + B + row, of_clipped)


@triton.jit(do_not_specialize=["B"])
def _value_results_kernel(
    sums, counts, results, B, T, denominator, HAS_MASK: tl.constexpr, HAS_DENOMINATOR: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    n = tl.maximum(all_tokens(counts, B, T, HAS_MASK, BLOCK).to(tl.float64), 1.0)
    share = tl.cast(denominator, tl.float64) if HAS_DENOMINATOR else n
    tl.store(results, (0.5 * sum_rows(sums, B, BLOCK) / share).to(tl.float32))
    tl.store(results + 1, (sum_rows(sums + B, B, BLOCK) / n).to(tl.float32))
