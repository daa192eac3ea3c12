"""The integer arithmetic of sampling: weights, masses, thresholds and draws that come out the same on every machine.

int64 tensors hold the uint64 values of the page sampling.py: additions and multiplications wrap as they do there, and a
right shift of what may pass 2^63 is followed by a mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptfast.ops.philox import MASK, philox

LOG2E = 1.44269502  # fp32 0x3fb8aa3b
# 2^f on [-1/2, 1/2], the highest power first; every decimal names exactly one fp32 value.
EXP2 = (1.5353362e-4, 1.33988739e-3, 9.61843692e-3, 5.55033237e-2, 2.40226477e-1, 6.93147182e-1, 1.0)


def log2_weights(l: Tensor) -> Tensor:
    """y = (l - max(l)) * log2(e) of each row of l (..., V) fp32, no less than -40: the logarithm of the weights."""
    return ((l - l.amax(-1, keepdim=True)) * LOG2E).clamp(min=-40.0)


def weights(y: Tensor) -> Tensor:
    """w = trunc(2^32 * 2^y) of fp32 -40 <= y <= 0, as int64; each operation is rounded by itself."""
    n = y.round()  # ties to even
    f = y - n
    p = torch.full_like(f, EXP2[0])
    for c in EXP2[1:]:
        p = p * f
        p = p + c
    return (p.view(torch.int32) + ((n.to(torch.int32) + 32) << 23)).view(torch.float32).to(torch.int64)


def fraction(p: Tensor, total: Tensor) -> Tensor:
    """floor(P * total / 2^32), P = trunc(2^32 * p), of fp32 0 <= p <= 1 and int64 total < 2^62."""
    P = (p.double() * 2.0**32).to(torch.int64)
    return P * (total >> 32) + (((P * (total & MASK)) >> 32) & MASK)


def distances(w: Tensor, y: Tensor) -> Tensor:
    """How far each token's surprise is from the mean surprise of its row, in 2^-20 bits; w (..., V), 0 = not there."""
    surprise = (y * -(2.0**20)).to(torch.int64)  # the product is exact, and truncated
    surplus = ((w * surprise) >> 12).sum(-1, keepdim=True)
    mean = (surplus.double() / w.sum(-1, keepdim=True).clamp(min=1).double() * 2.0**12).to(torch.int64)
    return (surprise - mean).abs()


def uniform_below(total: Tensor, seed: Tensor, step: Tensor, stream: Tensor) -> Tensor:
    """floor(r * total / 2^64), r = word0 | word1 << 32 of Philox at index `step`; total int64 < 2^62."""
    r0, r1, _, _ = philox(seed, step, stream)
    t0, t1 = total & MASK, total >> 32
    middle = r1 * t0 + (((r0 * t0) >> 32) & MASK)
    return r1 * t1 + ((middle >> 32) & MASK) + ((r0 * t1 + (middle & MASK)) >> 32)
