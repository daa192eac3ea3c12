"""What attention's kernels share: scores, which of them count, and the softmax that runs over blocks of keys."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SIZES = ["Sq", "Sk", "H", "G", "lse_head", "mask_b", "bias_b", "left", "right", "scale", "softcap"]


@triton.jit
def tanh(x):
    """To 2 units in the last place: Cephes' polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel."""
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    large = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2 * LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, p * z * x + x, tl.where(x < 0, -large, large))


@triton.jit
def seen(i, j, shift, Sq, Sk, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Which keys j the queries i may attend to, of those that there are."""
    inside = (i < Sq) & (j < Sk)
    if HAS_LEFT:
        inside &= j >= i + (shift - left)
    if HAS_RIGHT:
        inside &= j <= i + (shift + right)
    return inside


@triton.jit
def seen_by_rows(i, j, shift, Sq, Sk, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """seen() by a comparison of each pair, or two: queries are rows, of which a thread has few and can keep the last
    key of each."""
    last = tl.zeros_like(i) + (Sk - 1)
    if HAS_RIGHT:
        last = tl.minimum(last, i + (shift + right))
    inside = j <= tl.where(i < Sq, last, -1)
    if HAS_LEFT:
        inside &= j >= i + (shift - left)
    return inside


@triton.jit
def bounds(first, last, shift, Sk, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of queries first to last (inclusive) the keys' blocks, as four multiples of BLOCK_N: from the first block that
    any of them sees, from the first that all see whole, to the end of those, to the end of those that any sees."""
    low, all_low, high, all_high = 0, 0, Sk, Sk
    if HAS_LEFT:
        low = tl.minimum(tl.maximum(first + shift - left, 0), Sk)
        all_low = tl.minimum(tl.maximum(last + shift - left, 0), Sk)
    if HAS_RIGHT:
        high = tl.minimum(tl.maximum(last + shift + right + 1, 0), Sk)
        all_high = tl.minimum(tl.maximum(first + shift + right + 1, 0), Sk)
    a = low // BLOCK_N * BLOCK_N
    d = tl.maximum(tl.cdiv(high, BLOCK_N) * BLOCK_N, a)
    b = tl.minimum(tl.cdiv(all_low, BLOCK_N) * BLOCK_N, d)
    c = tl.maximum(tl.minimum(all_high // BLOCK_N * BLOCK_N, d), b)
    return a, b, c, d


@triton.jit
def pairs_at(x, first_i, i, x_i, first_j, j, x_j):
    """Where x has something for queries first_i + i and keys first_j + j. The firsts are numbers, so that what differs
    from pair to pair is small and can be part of an instruction: 64-bit sums of each pair would fill the registers."""
    base = x + (tl.cast(first_i, tl.int64) * x_i + tl.cast(first_j, tl.int64) * x_j)
    return base + (i.to(tl.int64) * x_i + j.to(tl.int64) * x_j)


@triton.jit
def with_terms(s, i, j, shift, there, scale, softcap, slope, bias, USE_SOFTCAP: tl.constexpr):
    """Scores in natural units from products of q and k, and tanh(s / softcap). bias: addresses of the
    pairs', of which those `there` are read."""
    s *= scale
    t = s
    if USE_SOFTCAP:
        t = tanh(s / softcap)
        s = softcap * t
    if slope is not None:
        s -= slope * tl.abs(i + shift - j).to(tl.float32)
    if bias is not None:
        s += tl.load(bias, mask=there, other=0.0).to(tl.float32)
    return s, t


@triton.jit
def soften(acc, m, l, s, to_log2, IS_EDGE: tl.constexpr, IS_EXACT: tl.constexpr):
    """One step of the softmax over blocks: (acc rescaled, m, l, p), p the exponentials of s less m, the maxima so far.

    IS_EXACT subtracts before it scales by to_log2, which holds for scores of any size; without it m is kept in powers
    of two, one fused multiply-add does both, and scores beyond 2^27 may overflow. IS_EDGE: a row may have seen nothing
    yet. l (rows) is the sum of p; as (rows, columns) it is one of every so many columns each, to be added up in the
    end: the threads that share a row then need not meet in every step.
    """
    most = tl.max(s, 1)
    if not IS_EXACT:
        most *= to_log2
    larger = tl.maximum(m, most)
    level = larger
    if IS_EDGE:
        level = tl.where(larger == float("-inf"), 0.0, larger)
    if IS_EXACT:
        alpha = tl.exp2((m - level) * to_log2)
        p = tl.exp2((s - level[:, None]) * to_log2)
    else:
        alpha = tl.exp2(m - level)
        p = tl.exp2(s * to_log2 - level[:, None])
    if len(l.shape) == 1:
        l = l * alpha + tl.sum(p, 1)
    else:
        l = l * alpha[:, None] + tl.sum(tl.reshape(p, (p.shape[0], p.shape[1] // l.shape[1], l.shape[1])), 1)
    return acc * alpha[:, None], larger, l, p


@triton.jit
def finish(acc, m, l, sink, to_natural):
    """(out, lse): m in units of to_natural; a sink is one more score without a value."""
    level = m * to_natural
    if sink is not None:
        most = tl.maximum(level, sink)
        alpha = tl.exp2((level - most) * LOG2E)
        acc = acc * alpha[:, None]
        l = l * alpha + tl.exp2((sink - most) * LOG2E)
        level = most
    some = tl.where(l > 0, l, 1.0)
    out = acc / some[:, None]
    # A NaN stays one.
    return out, tl.where(l == 0, float("-inf"), level + tl.log(some))


@triton.jit
def place(block, cu_q, cu_k, N, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr):
    """Of sequences that lie end to end: (sequence, which of its blocks, its first query and key, their numbers, pairs
    of queries and keys before it), `block` counted through all of them. Beyond the last block the sequence is N."""
    n = tl.arange(0, BLOCK_B)
    q0 = tl.load(cu_q + n, mask=n < N, other=0)
    q1 = tl.load(cu_q + n + 1, mask=n < N, other=0)
    k0 = tl.load(cu_k + n, mask=n < N, other=0)
    k1 = tl.load(cu_k + n + 1, mask=n < N, other=0)
    blocks = tl.cdiv(q1 - q0, BLOCK_M)
    ends = tl.cumsum(blocks, 0)
    b = tl.sum(tl.where((ends <= block) & (n < N), 1, 0), 0)
    mine = n == b
    before = n < b
    pairs = tl.sum(tl.where(before, (q1 - q0).to(tl.int64) * (k1 - k0), 0), 0)
    block -= tl.sum(tl.where(before, blocks, 0), 0)
    start_q = tl.sum(tl.where(mine, q0, 0), 0)
    start_k = tl.sum(tl.where(mine, k0, 0), 0)
    return (
        b,
        block,
        start_q,
        start_k,
        tl.sum(tl.where(mine, q1 - q0, 0), 0),
        tl.sum(tl.where(mine, k1 - k0, 0), 0),
        pairs,
    )


@triton.jit
def tile_at(x, row, S, stride, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, IS_EDGE: tl.constexpr):
    """Rows row to row + BLOCK_S of x (S, D), zeros beyond it; without IS_EDGE all of the rows are there."""
    r = tl.arange(0, BLOCK_S)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    at = x + tl.cast(row, tl.int64) * stride + (r * stride + d)
    if IS_EDGE:
        if D == BLOCK_D:
            return tl.load(at, mask=row + r < S, other=0.0)
        else:
            return tl.load(at, mask=(row + r < S) & (d < D), other=0.0)
    else:
        if D == BLOCK_D:
            return tl.load(at)
        else:
            return tl.load(at, mask=d < D, other=0.0)


@triton.jit
def held(tile, S):
    """tile (rows, D), of 16-bit numbers, where a product's first operand may come from registers: a matrix instruction
    then reads half as much shared memory. Triton puts there only what another product gave: this one is never made."""
    x = tile.to(tl.float32)
    for _step in range(S >> 31):
        x = tl.dot(tl.zeros((x.shape[0], 16), tile.dtype), tl.zeros((16, x.shape[1]), tile.dtype), x)
    return x.to(tile.dtype)


@triton.jit
def keys_at(x, desc, b, row, h, S, stride, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
            IS_EDGE: tl.constexpr):  # fmt: skip
    """tile_at(), through a descriptor of the whole tensor (B, H, S, D) where there is one."""
    if desc is None:
        return tile_at(x, row, S, stride, D, BLOCK_S, BLOCK_D, IS_EDGE)
    else:
        return desc.load([b, h, row, 0]).reshape(BLOCK_S, BLOCK_D)
