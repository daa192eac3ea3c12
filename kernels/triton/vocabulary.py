"""What losses over a vocabulary share: a row of logits to a program that reads it once, in blocks of columns whose
statistics are merged in order; and the gradient of each logit from them."""

from __future__ import annotations

import triton
import triton.language as tl
from gptfast.kernels.triton.product import PAD

NEVER = tl.constexpr(float("-inf"))


@triton.jit
def tanh(x):
    """To 1e-7 of its value: an odd polynomial near 0, where 1 - 2 / (e^2x + 1) cancels."""
    a = tl.abs(x)
    z = x * x
    p = -5.70498872745e-3
    p = p * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    far = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    return tl.where(a < 0.625, x + x * z * p, tl.where(x < 0, -far, far))


@triton.jit
def terms(v, softcap, inverse_temperature, IS_CAPPED: tl.constexpr, IS_TEMPERED: tl.constexpr):
    """A logit from x W^T + bias."""
    v = v.to(tl.float32)
    if IS_CAPPED:
        v = tanh(v / softcap) * softcap
    if IS_TEMPERED:
        v = v * inverse_temperature
    return v


@triton.jit
def back(g, l, softcap, inverse_temperature, IS_CAPPED: tl.constexpr, IS_TEMPERED: tl.constexpr):
    """The gradient of x W^T + bias from that of the logit l."""
    if IS_TEMPERED:
        g = g * inverse_temperature
        l = l / inverse_temperature
    if IS_CAPPED:
        t = l / softcap
        g = g * (1.0 - t * t)
    return g


@triton.jit
def class_weights(class_weight, cols, inside, HAS_WEIGHT: tl.constexpr):
    if HAS_WEIGHT:
        return tl.load(class_weight + cols, mask=inside, other=0.0).to(tl.float32)
    else:
        return inside.to(tl.float32)


@triton.jit
def _vocabulary_rows_kernel(
    logits, target, class_weight, scales, loss, lse, rest, entropy,
    stride, V, ignore_index, smoothing, z_loss, softcap, inverse_temperature,
    HAS_TARGET: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SCALES: tl.constexpr, IS_SMOOTH: tl.constexpr,
    HAS_Z: tl.constexpr, IS_CAPPED: tl.constexpr, IS_TEMPERED: tl.constexpr, USE_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a row: lse and what it was rounded by; its loss, which for a row without a target is 0; its entropy."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.full((), 0, tl.int64)
    if HAS_TARGET:
        t = tl.load(target + row).to(tl.int64)
        if t == ignore_index:
            per_row = tl.load(scales) if HAS_SCALES else 1.0
            tl.store(loss + row, 0.0 * per_row)  # NaN for a mean of nothing
            tl.store(lse + row, 0.0)
            tl.store(rest + row, 0.0)
            if USE_ENTROPY:
                tl.store(entropy + row, 0.0)
            return
    of_row = logits + row * stride
    top = tl.full((), NEVER, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    inner = tl.full((), 0.0, tl.float32)  # sum of e^(l - top) (l - top)
    spread = tl.full((), 0.0, tl.float64)  # sum of w (top - l)
    weight = tl.full((), 0.0, tl.float64)  # sum of w
    for begin in range(0, V, BLOCK):
        cols = begin + tl.arange(0, BLOCK)
        inside = cols < V
        l = terms(tl.load(of_row + cols, mask=inside, other=0.0), softcap, inverse_temperature, IS_CAPPED, IS_TEMPERED)
        l = tl.where(inside, l, NEVER)
        most = tl.max(l, 0)
        base = tl.where(most == NEVER, 0.0, most)
        e = tl.exp(l - base)
        sums = tl.sum(e, 0)
        higher = tl.maximum(top, most)
        past = tl.where(top == NEVER, 0.0, tl.exp(top - higher))
        here = tl.where(most == NEVER, 0.0, tl.exp(most - higher))
        if USE_ENTROPY:
            inners = tl.sum(tl.where(e == 0, 0.0, e * (l - base)), 0)
            moved = tl.where(total == 0, 0.0, past * (inner + (top - higher) * total))
            inner = moved + tl.where(sums == 0, 0.0, here * (inners + (most - higher) * sums))
        if IS_SMOOTH:
            w = class_weights(class_weight, cols, inside, HAS_WEIGHT)
            weights = tl.sum(w, 0).to(tl.float64)
            spreads = tl.sum(tl.where(inside, w * (base - l), 0.0), 0).to(tl.float64)
            up = tl.where(higher == NEVER, 0.0, higher).to(tl.float64)
            from_top = tl.where(top == NEVER, 0.0, top).to(tl.float64)
            spread += (up - from_top) * weight + spreads + (up - base.to(tl.float64)) * weights
            weight += weights
        total = total * past + sums * here
        top = higher
    base = tl.where(top == NEVER, 0.0, top).to(tl.float64)
    log = tl.log(total.to(tl.float64))
    rounded = (base + log).to(tl.float32)
    tl.store(lse + row, rounded)
    tl.store(rest + row, (base + log - rounded.to(tl.float64)).to(tl.float32))
    if USE_ENTROPY:
        tl.store(entropy + row, (log - inner.to(tl.float64) / total.to(tl.float64)).to(tl.float32))
    if HAS_TARGET:
        l = terms(tl.load(of_row + t), softcap, inverse_temperature, IS_CAPPED, IS_TEMPERED)
        ce = (base - l.to(tl.float64) + log).to(tl.float32)
        if HAS_WEIGHT:
            ce = ce * tl.load(class_weight + t).to(tl.float32)
        if IS_SMOOTH:
            ce = (1.0 - smoothing) * ce + smoothing / V * (spread + log * weight).to(tl.float32)
        if HAS_SCALES:
            ce = ce * tl.load(scales)
        if HAS_Z:
            z = z_loss * rounded * rounded
            ce += z * tl.load(scales + 1) if HAS_SCALES else z
        tl.store(loss + row, ce)


@triton.jit
def _vocabulary_gradient_kernel(
    logits, out, target, class_weight, whole, scales, upstream, of_entropy, lse, rest, entropy,
    stride, out_stride, V, blocks, ignore_index, smoothing, z_loss, softcap, inverse_temperature,
    IS_LOSS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_UPSTREAM: tl.constexpr,
    IS_SCALAR: tl.constexpr, HAS_Z: tl.constexpr, IS_SMOOTH: tl.constexpr, IS_CAPPED: tl.constexpr,
    IS_TEMPERED: tl.constexpr, USE_ENTROPY: tl.constexpr, IS_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of a row's columns, p (scale + slope l) - even w - (hit where it is the target's), where
    p = e^(l - lse - rest); zero for a row without a target. out may be the logits. Of the loss or, without IS_LOSS, of
    the log-probability and, with USE_ENTROPY, the entropy. IS_PADDED: zeros go behind a row of out, for products."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = cols < V
    t = tl.load(target + row).to(tl.int64)
    to = out + row * out_stride + cols
    written = cols < (tl.cdiv(V, PAD) * PAD if IS_PADDED else V)
    if t == ignore_index:
        tl.store(to, tl.zeros([BLOCK], tl.float32), mask=written)
        return
    top = tl.load(lse + row)
    l = tl.load(logits + row * stride + cols, mask=inside, other=0.0)
    l = terms(l, softcap, inverse_temperature, IS_CAPPED, IS_TEMPERED)
    p = tl.exp((l - top) - tl.load(rest + row))
    upon = 1.0
    if HAS_UPSTREAM:
        upon = tl.load(upstream + (0 if IS_SCALAR else row)).to(tl.float32)
    if IS_LOSS:
        hit = upon
        even = 0.0
        if HAS_WEIGHT:
            hit = hit * tl.load(class_weight + t).to(tl.float32)
        scale = hit
        if IS_SMOOTH:
            even = upon * (smoothing / V)
            hit = hit * (1.0 - smoothing)
            scale = hit + even * (tl.load(whole) if HAS_WEIGHT else V)
        if HAS_SCALES:
            scale = scale * tl.load(scales)
            hit = hit * tl.load(scales)
        if HAS_Z:
            z = 2.0 * z_loss * top * upon
            scale += z * tl.load(scales + 1) if HAS_SCALES else z
        g = p * scale
        if IS_SMOOTH:
            if HAS_SCALES:
                even = even * tl.load(scales)
            g -= even * class_weights(class_weight, cols, inside, HAS_WEIGHT)
        g -= tl.where(cols == t, hit, 0.0)
    else:  # of the log-probability: hit - p; of the entropy: -p (l - lse + H)
        g = tl.where(cols == t, upon, 0.0) - p * upon
        if USE_ENTROPY:
            h = tl.load(of_entropy + row).to(tl.float32)
            g -= tl.where(p == 0, 0.0, h * p * ((l - top) + tl.load(entropy + row)))
    g = back(g, l, softcap, inverse_temperature, IS_CAPPED, IS_TEMPERED)
    if IS_PADDED:
        g = tl.where(inside, g, 0.0)
    tl.store(to, g, mask=written)


@triton.jit(do_not_specialize=["N"])
def _loss_scales_kernel(target, class_weight, scales, N, ignore_index, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """What a mean multiplies each row by: 1 / sum of w[t], and 1 / the number of rows that count."""
    weights = tl.full((), 0.0, tl.float64)
    count = tl.full((), 0.0, tl.float64)
    for begin in range(0, N, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        t = tl.load(target + i, mask=i < N, other=0).to(tl.int64)
        counts = (i < N) & (t != ignore_index)
        w = class_weights(class_weight, tl.where(counts, t, 0), counts, HAS_WEIGHT)
        weights += tl.sum(tl.where(counts, w, 0.0).to(tl.float64), 0)
        count += tl.sum(counts.to(tl.float64), 0)
    tl.store(scales, (1.0 / weights).to(tl.float32))
    tl.store(scales + 1, (1.0 / count).to(tl.float32))


@triton.jit(do_not_specialize=["N"])
def _sum_losses_kernel(losses, total, N, BLOCK: tl.constexpr):
    """The sum in fp64, BLOCK by BLOCK, rounded once."""
    found = tl.full((), 0.0, tl.float64)
    for begin in range(0, N, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        found += tl.sum(tl.load(losses + i, mask=i < N, other=0.0).to(tl.float64), 0)
    tl.store(total, found.to(tl.float32))
