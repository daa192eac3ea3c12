"""KL(p || q) of rows of logits, and its gradients."""

from __future__ import annotations

import triton
import triton.language as tl
from gptfast.kernels.triton.product import PAD
from gptfast.kernels.triton.vocabulary import back, terms


@triton.jit
def _kl_rows_kernel(
    logits_p, logits_q, lse_p, rest_p, lse_q, rest_q, kl,
    stride, V, softcap_p, softcap_q, inverse_temperature,
    IS_CAPPED_P: tl.constexpr, IS_CAPPED_Q: tl.constexpr, IS_TEMPERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of p (log p - log q); a column with p = 0 adds nothing."""
    row = tl.program_id(0).to(tl.int64)
    top_p, more_p = tl.load(lse_p + row), tl.load(rest_p + row)
    top_q, more_q = tl.load(lse_q + row), tl.load(rest_q + row)
    total = tl.full((), 0.0, tl.float64)
    for begin in range(0, V, BLOCK):
        cols = begin + tl.arange(0, BLOCK)
        inside = cols < V
        a = tl.load(logits_p + row * stride + cols, mask=inside, other=0.0)
        b = tl.load(logits_q + row * stride + cols, mask=inside, other=0.0)
        a = (terms(a, softcap_p, inverse_temperature, IS_CAPPED_P, IS_TEMPERED) - top_p) - more_p
        b = (terms(b, softcap_q, inverse_temperature, IS_CAPPED_Q, IS_TEMPERED) - top_q) - more_q
        p = tl.where(inside, tl.exp(a), 0.0)
        total += tl.sum(tl.where(p == 0, 0.0, p * (a - b)), 0).to(tl.float64)
    tl.store(kl + row, total.to(tl.float32))


@triton.jit
def _kl_gradient_kernel(
    logits_p, logits_q, lse_p, rest_p, lse_q, rest_q, kl, upstream, out_p, out_q, blocks,
    stride, V, softcap_p, softcap_q, inverse_temperature,
    IS_CAPPED_P: tl.constexpr, IS_CAPPED_Q: tl.constexpr, IS_TEMPERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a block of a row's columns: p (log p - log q - kl) and q - p, times the gradient of the row's divergence. What
    is written may be where the logits were; it ends in zeros, as product.py wants its rows padded."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = cols < V
    g = tl.load(upstream + row)
    l = terms(
        tl.load(logits_p + row * stride + cols, mask=inside, other=0.0),
        softcap_p, inverse_temperature, IS_CAPPED_P, IS_TEMPERED,
    )  # fmt: skip
    m = terms(
        tl.load(logits_q + row * stride + cols, mask=inside, other=0.0),
        softcap_q, inverse_temperature, IS_CAPPED_Q, IS_TEMPERED,
    )  # fmt: skip
    a = (l - tl.load(lse_p + row)) - tl.load(rest_p + row)
    b = (m - tl.load(lse_q + row)) - tl.load(rest_q + row)
    p = tl.exp(a)
    by_p = tl.where(p == 0, 0.0, g * p * ((a - b) - tl.load(kl + row)))
    by_q = g * (tl.exp(b) - p)
    by_p = back(by_p, l, softcap_p, inverse_temperature, IS_CAPPED_P, IS_TEMPERED)
    by_q = back(by_q, m, softcap_q, inverse_temperature, IS_CAPPED_Q, IS_TEMPERED)
    written = cols < tl.cdiv(V, PAD) * PAD
    tl.store(out_p + row * stride + cols, tl.where(inside, by_p, 0.0), mask=written)
    tl.store(out_q + row * stride + cols, tl.where(inside, by_q, 0.0), mask=written)
