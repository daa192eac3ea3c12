"""The kernels of sampling, and its arithmetic: integers, and fp32 operations that are each rounded by themselves.

Compiled without contraction. Masses are int64, those of a chunk's halves int32: CHUNK * 2^16 < 2^31.
"""

from __future__ import annotations

import triton
import triton.language as tl

LEAST_BITS = tl.constexpr(32.0)  # no token more than so many bits below the largest has a weight
LOG2E = tl.constexpr(1.44269502)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to a whole number, ties to even
# What changes from call to call; a kernel compiled for one value or its multiples of 16 would be compiled again.
NUMBERS = ["top_k", "top_k_high", "seed", "seed_high", "step", "step_high", "stream", "stream_high", "L"]
NO_ID = tl.constexpr(1 << 22)
LN2 = tl.constexpr(0.693147181)
PIVOT_STEP = tl.constexpr(2.0)  # bits between the thresholds whose masses bound a nucleus


@triton.jit
def real(x, row, IS_ROWS: tl.constexpr):
    """A real parameter of a row: a number, or one of a tensor of them."""
    return tl.load(x + row) if IS_ROWS else tl.cast(x, tl.float32)


@triton.jit
def whole(low, high, row, IS_ROWS: tl.constexpr):
    """The 64 bits of an integer parameter: of a tensor, or two words."""
    if IS_ROWS:
        return tl.load(low + row)
    else:
        return (tl.cast(high, tl.int64) << 32) | (tl.cast(low, tl.int64) & 0xFFFFFFFF)


@triton.jit
def tempered(v, temperature):
    """A processed logit over the temperature (0 divides by nothing), -0 as 0."""
    v = tl.div_rn(v, tl.where(temperature == 0, 1.0, temperature) + tl.zeros_like(v))
    return tl.where(v == 0, 0.0, v)


@triton.jit
def log2_weight(v, top):
    return tl.maximum((v - top) * LOG2E, -40.0)


@triton.jit
def weight(y):
    """2^(32 + y) of -40 <= y <= 0, whose integer part is the weight."""
    n = (y + ROUND) - ROUND
    f = y - n
    p = f * 1.5353362e-4 + 1.33988739e-3
    p = p * f + 9.61843692e-3
    p = p * f + 5.55033237e-2
    p = p * f + 2.40226477e-1
    p = p * f + 6.93147182e-1
    p = p * f + 1.0
    return (p.to(tl.int32, bitcast=True) + ((n.to(tl.int32) + 32) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def halves(w):
    """The integer part of w <= 2^32 as 65536 * high + low."""
    high = (w * 1.52587890625e-05).to(tl.int32)
    return high, (w - high.to(tl.float32) * 65536.0).to(tl.int32)


@triton.jit
def mass(w):
    high, low = halves(w)
    return (high.to(tl.int64) << 16) + low.to(tl.int64)


@triton.jit
def ordered(v):
    """Unsigned order of the key = order of the value."""
    i = v.to(tl.int32, bitcast=True)
    return (i ^ ((i >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def least_weight(min_p):
    return tl.floor(min_p * 4294967296.0)


@triton.jit
def nucleus(p, total):
    """max(1, floor(P * total / 2^32)), P = trunc(2^32 p), total < 2^62."""
    P = (p * 4294967296.0).to(tl.int64)
    low = ((P * (total & 0xFFFFFFFF)) >> 32) & 0xFFFFFFFF
    return tl.maximum(P * (total >> 32) + low, 1)


@triton.jit
def philox_words(seed, index, stream):
    """The first two words of Philox4x32-10 as one, word0 | word1 << 32."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c0 = index.to(tl.uint32)
    c1 = (index >> 32).to(tl.uint32)
    c2 = stream.to(tl.uint32)
    c3 = c2 ^ c2
    a = c3 + 0xD2511F53
    b = c3 + 0xCD9E8D57
    for _ in tl.static_range(10):
        high0 = tl.umulhi(a, c0)
        high1 = tl.umulhi(b, c2)
        low0 = a * c0
        c0 = high1 ^ c1 ^ k0
        c1 = b * c2
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0.to(tl.uint64) | (c1.to(tl.uint64) << 32)


@triton.jit
def uniform_below(total, seed, step, stream):
    """floor(r * total / 2^64)."""
    return tl.umulhi(philox_words(seed, step, stream), total.to(tl.uint64)).to(tl.int64)


@triton.jit
def row_top(tops, row, chunks, CHUNKS: tl.constexpr):
    """The largest of a row's logits; +inf for a row with a NaN."""
    c = tl.arange(0, CHUNKS)
    return tl.max(tl.load(tops + row * chunks + c, mask=c < chunks, other=float("-inf")), 0)


@triton.jit
def is_bad(top):
    return (top == float("inf")) | (top == float("-inf"))


@triton.jit
def is_plain(top_k, top_p, typical_p):
    """Whether a row's tokens are kept or not by their weights alone."""
    return (top_k == 0) & (top_p >= 1) & (typical_p >= 1)


@triton.jit(do_not_specialize=NUMBERS[-1:])
def _process_sample_kernel(
    logits, bias, mask, history, prompt_lengths, repetition_penalty, presence_penalty, frequency_penalty, processed,
    logits_stride, bias_stride, mask_stride, V, L, blocks,
    ROWS_OF: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_HISTORY: tl.constexpr,
    HAS_PROMPT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """A block of a row's logits after bias, mask and penalties, in fp32. Each program counts its own tokens in the
    history: a few thousand ids, read once from memory and then from the cache."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK
    cols = first + tl.arange(0, BLOCK)
    inside = cols < V
    v = tl.load(logits + row * logits_stride + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        v = v + tl.load(bias + row * bias_stride + cols, mask=inside, other=0.0)
    if HAS_MASK:
        allowed = tl.load(mask + row * mask_stride + cols, mask=inside, other=0)
        v = tl.where(allowed != 0, v, float("-inf"))
    if HAS_HISTORY:
        r = real(repetition_penalty, row, ROWS_OF & 16)
        presence = real(presence_penalty, row, ROWS_OF & 32)
        frequency = real(frequency_penalty, row, ROWS_OF & 64)
        prompt = tl.load(prompt_lengths + row) if HAS_PROMPT else tl.full((), 0, tl.int64)
        seen = tl.zeros([BLOCK], tl.int32)
        output = tl.zeros([BLOCK], tl.int32)
        for begin in range(0, L, BLOCK_L):
            at = begin + tl.arange(0, BLOCK_L)
            ids = tl.load(history + row * L + at, mask=at < L, other=-1) - first
            here = (ids >= 0) & (ids < tl.minimum(BLOCK, V - first))
            ids = tl.where(here, ids, 0).to(tl.int32)
            seen += tl.histogram(ids, BLOCK, mask=here)
            output += tl.histogram(ids, BLOCK, mask=here & (at >= prompt))
        n = output.to(tl.float32)
        v = tl.where(seen > 0, tl.where(v > 0, tl.div_rn(v, r + tl.zeros_like(v)), v * r), v)
        v = tl.where(n > 0, v - (presence + frequency * n), v)
    tl.store(processed + row * V + cols, v, mask=inside)


@triton.jit
def _prepare_sample_kernel(
    logits, values, temperature, tops, parts, best, raw_tops, raw_sums,
    logits_stride, values_stride, V, chunks,
    ROWS_OF: tl.constexpr, USE_PARTS: tl.constexpr, USE_BEST: tl.constexpr, USE_RAW: tl.constexpr,
    CHUNK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Of a chunk of a row's processed logits the largest of all, of each part, and its id; and of the logits as given
    the largest and the sum of e^(l - largest)."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    cols = chunk * CHUNK + tl.arange(0, CHUNK // PARTS)[:, None] * PARTS + tl.arange(0, PARTS)[None, :]
    inside = cols < V
    if USE_RAW:
        v = tl.load(logits + row * logits_stride + cols, mask=inside, other=float("-inf")).to(tl.float32)
        top = tl.max(tl.max(v, 0), 0)
        e = tl.where(inside, tl.exp(v - tl.where(top == float("-inf"), 0.0, top)), 0.0)
        tl.store(raw_tops + row * chunks + chunk, top)
        tl.store(raw_sums + row * chunks + chunk, tl.sum(tl.sum(e, 0), 0))
    v = tl.load(values + row * values_stride + cols, mask=inside, other=float("-inf")).to(tl.float32)
    v = tempered(v, real(temperature, row, ROWS_OF & 1))
    v = tl.where(v != v, float("inf"), v)
    of_parts = tl.max(v, 0)
    top = tl.max(of_parts, 0)
    tl.store(tops + row * chunks + chunk, top)
    if USE_PARTS:
        tl.store(parts + (row * chunks + chunk) * PARTS + tl.arange(0, PARTS), of_parts)
    if USE_BEST:
        tl.store(best + row * chunks + chunk, tl.min(tl.min(tl.where(v == top, cols, NO_ID), 0), 0))


@triton.jit(do_not_specialize=NUMBERS[:2])
def _sample_masses_kernel(
    values, temperature, top_k, top_k_high, top_p, min_p, typical_p, tops, masses, above,
    values_stride, V, chunks,
    ROWS_OF: tl.constexpr, USE_PIVOTS: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    """The mass of one chunk's tokens that min-p leaves; for a nucleus, of those at most so many bits below the top."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    k = whole(top_k, top_k_high, row, ROWS_OF & 128)
    p = real(top_p, row, ROWS_OF & 2)
    plain = is_plain(k, p, real(typical_p, row, ROWS_OF & 8))
    top = row_top(tops, row, chunks, CHUNKS)
    if (k > 0) | is_bad(top) | ~(plain | (p < 1)):
        return
    cols = chunk * CHUNK + tl.arange(0, CHUNK)
    v = tl.load(values + row * values_stride + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
    v = tempered(v, real(temperature, row, ROWS_OF & 1))
    y = log2_weight(v, top)
    w = weight(y)
    if plain:
        w = tl.where(w >= least_weight(real(min_p, row, ROWS_OF & 4)), w, 0.0)
    high, low = halves(w)
    tl.store(masses + row * chunks + chunk, (tl.sum(high, 0).to(tl.int64) << 16) + tl.sum(low, 0))
    if USE_PIVOTS:  # noqa: SIM102  (known when it is compiled; the other when it runs)
        if p < 1:
            for j in tl.static_range(PIVOTS):
                is_in = y >= -PIVOT_STEP * (j + 1)
                of_high = tl.sum(tl.where(is_in, high, 0), 0).to(tl.int64) << 16
                tl.store(above + (row * chunks + chunk) * PIVOTS + j, of_high + tl.sum(tl.where(is_in, low, 0), 0))


@triton.jit(do_not_specialize=NUMBERS[:2])
def _gather_sample_kernel(
    values, temperature, top_k, top_k_high, top_p, min_p, typical_p, tops, parts, masses, above, counts, found,
    values_stride, V, chunks,
    ROWS_OF: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, PARTS: tl.constexpr, PIVOTS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The places in one chunk, in order, of tokens that may survive the filters: none that does is left out."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    k = whole(top_k, top_k_high, row, ROWS_OF & 128)
    p = real(top_p, row, ROWS_OF & 2)
    typical = real(typical_p, row, ROWS_OF & 8)
    top = row_top(tops, row, chunks, CHUNKS)
    if is_plain(k, p, typical) | is_bad(top):
        return
    bits = LEAST_BITS
    bound = top * 0 + float("-inf")
    least = tl.full((), 1.0, tl.float32)
    if k > 0:
        if k <= KEYS:
            bound = kth_part(parts + row * chunks * PARTS, chunks * PARTS, k, KEYS)
    elif p < 1:
        c = tl.arange(0, CHUNKS)
        total = tl.sum(tl.load(masses + row * chunks + c, mask=c < chunks, other=0), 0)
        budget = nucleus(p, total)
        enough = tl.full((), PIVOTS, tl.int32)
        for j in tl.static_range(PIVOTS - 1, -1, -1):
            of_chunks = tl.load(above + (row * chunks + c) * PIVOTS + j, mask=c < chunks, other=0)
            enough = tl.where(tl.sum(of_chunks, 0) >= budget, j, enough)
        bits = tl.where(enough < PIVOTS, (enough + 1) * PIVOT_STEP, LEAST_BITS)
    else:
        least = tl.maximum(least_weight(real(min_p, row, ROWS_OF & 4)), 1.0)
    if tl.load(tops + row * chunks + chunk) >= bound:
        cols = chunk * CHUNK + tl.arange(0, CHUNK)
        v = tl.load(values + row * values_stride + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
        v = tempered(v, real(temperature, row, ROWS_OF & 1))
        y = log2_weight(v, top)
        take = ((v >= bound) & (y >= -bits) & (weight(y) >= least) & (cols < V)).to(tl.int32)
        place = tl.cumsum(take, 0) - 1
        to = found + (row * chunks + chunk) * CHUNK + place
        tl.store(to, tl.arange(0, CHUNK).to(tl.int16), mask=take > 0)
        tl.store(counts + row * chunks + chunk, tl.sum(take, 0))
    else:
        tl.store(counts + row * chunks + chunk, 0)


@triton.jit
def kth_part(parts, n, k, KEYS: tl.constexpr):
    """A bound that no fewer than k of a row's tokens reach: the k-th largest of KEYS numbers, each the largest of some
    part of the row."""
    i = tl.arange(0, KEYS)
    most = tl.full([KEYS], float("-inf"), tl.float32)
    for begin in range(0, n, KEYS):
        most = tl.maximum(most, tl.load(parts + begin + i, mask=begin + i < n, other=float("-inf")))
    key = ordered(most)
    low = (tl.sum(key, 0) * 0).to(tl.uint32)
    steps = tl.arange(0, 16)
    for level in tl.static_range(8):
        pivots = low + (steps.to(tl.uint32) << (28 - 4 * level))
        reach = tl.sum((key[:, None] >= pivots[None, :]).to(tl.int32), 0)
        digit = tl.sum((reach >= k).to(tl.int32), 0) - 1
        low += digit.to(tl.uint32) << (28 - 4 * level)
    i = low.to(tl.int32, bitcast=True)
    return tl.where(i < 0, i ^ -2147483648, ~i).to(tl.float32, bitcast=True)
