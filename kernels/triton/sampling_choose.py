"""The last kernel of sampling: one program for a row cuts what the filters leave and draws, without a sort.

A cut is where the measure (number or mass) of the keys, taken from the largest down, reaches a budget: found digit by
digit of the keys' bits, the measures above sixteen of them at a time, then by the lowest ids among equal keys.
"""

from __future__ import annotations

import triton
import triton.language as tl
from gptfast.kernels.triton.sampling_kernels import (
    LEAST_BITS,
    LN2,
    NO_ID,
    NUMBERS,
    is_bad,
    is_plain,
    least_weight,
    log2_weight,
    mass,
    nucleus,
    ordered,
    real,
    row_top,
    tempered,
    uniform_below,
    weight,
    whole,
)

COUNT = tl.constexpr(0)
MASS = tl.constexpr(1)
TYPICAL = tl.constexpr(2)  # the mass, ranked by the distance from the mean surprise


@triton.jit
def surprise(y):
    """In 2^-20 bits; the product is exact."""
    return (y * -1048576.0).to(tl.int32)


@triton.jit
def nearness(y, mean):
    """A key: the nearer the surprise is to the mean, the larger; its first 4 bits are set."""
    return (-1 - tl.abs(surprise(y) - mean)).to(tl.uint32, bitcast=True)


@triton.jit
def candidates(begin, source, state, IS_TYPICAL: tl.constexpr, BLOCK: tl.constexpr):
    """The next BLOCK tokens that are left: id, logit, log2 of the weight, 2^32 times the weight (0 for none).

    source: the lists of a few tokens' ids and logits, how many they hold, the row's logits, how many tokens it has (0
    where the lists are all), the larger of both numbers, the temperature, the largest logit. state: the last key and id
    that are kept, the least weight, the mean surprise, and the last key and id that are kept by the distance from it.
    """
    few_ids, few_values, few, values, many, n, temperature, top = source
    last_key, last_id, least, mean, last_near, last_near_id = state
    i = begin + tl.arange(0, BLOCK)
    v = tl.load(few_values + i, mask=i < few, other=float("-inf"))
    ids = tl.load(few_ids + i, mask=i < few, other=NO_ID)
    u = tl.load(values + i, mask=i < many, other=float("-inf")).to(tl.float32)
    u = tempered(u, temperature)
    v = tl.where(i < few, v, u)
    ids = tl.where((i < few) | (many == 0), ids, i)
    key = ordered(v)
    y = log2_weight(v, top)
    w = weight(y)
    kept = (i < n) & ((key > last_key) | ((key == last_key) & (ids <= last_id))) & (w >= least)
    if IS_TYPICAL:
        near = nearness(y, mean)
        kept = kept & ((near > last_near) | ((near == last_near) & (ids <= last_near_id)))
    return ids, key, y, tl.where(kept, w, 0.0)


@triton.jit
def measured(
    begin,
    source,
    state,
    mean,
    BY: tl.constexpr,
    IS_TYPICAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Ids, keys and measures of the next BLOCK tokens that are left."""
    ids, key, y, w = candidates(begin, source, state, IS_TYPICAL, BLOCK)
    if BY == TYPICAL:
        key = nearness(y, mean)
    return ids, key, (w >= 1).to(tl.int64) if BY == COUNT else mass(w)


@triton.jit
def total_mass(source, state, IS_TYPICAL: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.full((), 0, tl.int64)
    for begin in range(0, source[5], BLOCK):
        total += tl.sum(mass(candidates(begin, source, state, IS_TYPICAL, BLOCK)[3]), 0)
    return total


@triton.jit
def mean_surprise(source, state, total, IS_TYPICAL: tl.constexpr, BLOCK: tl.constexpr):
    surplus = tl.full((), 0, tl.int64)
    for begin in range(0, source[5], BLOCK):
        _, _, y, w = candidates(begin, source, state, IS_TYPICAL, BLOCK)
        surplus += tl.sum((mass(w) * surprise(y)) >> 12, 0)
    return (surplus.to(tl.float64) / total.to(tl.float64) * 4096.0).to(tl.int64).to(tl.int32)


@triton.jit
def find_cut(
    budget, low, shift, source, state, mean,
    BY: tl.constexpr, IS_TYPICAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The last key and, of those with this key, the last id within the budget. Keys that differ above the 4 bits from
    `shift` on are alike in them; low: what all have there."""
    steps = tl.arange(0, 16)
    above = tl.full((), 0, tl.int64)  # the measure of keys that are too large for the range searched
    while shift >= 0:
        pivots = low + (steps.to(tl.uint32) << shift.to(tl.uint32))
        reach = tl.zeros([16], tl.int64)
        for begin in range(0, source[5], BLOCK):
            _, key, m = measured(begin, source, state, mean, BY, IS_TYPICAL, BLOCK)
            reach += tl.sum(tl.where(key[:, None] >= pivots[None, :], m[:, None], 0), 0)
        digit = tl.maximum(tl.sum((reach >= budget).to(tl.int32), 0) - 1, 0)
        above = tl.where(digit < 15, tl.sum(tl.where(steps == digit + 1, reach, 0), 0), above)
        low += digit.to(tl.uint32) << shift.to(tl.uint32)
        shift -= 4
    before = above
    last = tl.full((), -1, tl.int32)
    for begin in range(0, source[5], BLOCK):
        ids, key, m = measured(begin, source, state, mean, BY, IS_TYPICAL, BLOCK)
        m = tl.where(key == low, m, 0)
        kept = (m > 0) & (tl.cumsum(m, 0) - m + before < budget)
        last = tl.maximum(last, tl.max(tl.where(kept, ids, -1), 0))
        before += tl.sum(m, 0)
    return low, last


@triton.jit
def key_range(top):
    """Where the search for a key starts: the bits that the keys of all tokens with a weight share, and the shift of the
    first digit in which they differ."""
    most = ordered(top)
    least = ordered(top - (LEAST_BITS + 1.0) * LN2 - tl.abs(top) * 1e-6)
    shift = tl.full((), 28, tl.int32)
    while (shift > 0) & (((most ^ least) >> shift.to(tl.uint32)) == 0):
        shift -= 4
    s = shift.to(tl.uint32)
    return (((most >> s) >> 4) << 4) << s, shift


@triton.jit
def draw(target, source, state, IS_TYPICAL: tl.constexpr, BLOCK: tl.constexpr):
    """The lowest id whose mass up to and with itself is above the target."""
    before = tl.full((), 0, tl.int64)
    chosen = tl.full((), NO_ID, tl.int32)
    for begin in range(0, source[5], BLOCK):
        ids, _, _, w = candidates(begin, source, state, IS_TYPICAL, BLOCK)
        m = mass(w)
        chosen = tl.minimum(chosen, tl.min(tl.where(tl.cumsum(m, 0) + before > target, ids, NO_ID), 0))
        before += tl.sum(m, 0)
    return chosen


@triton.jit
def draw_from_all(
    values, temperature, top, least, masses, seed, step, stream, V, chunks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The id drawn from all tokens with at least this weight, and the total: the chunk that holds it by the chunks'
    masses, then the token in there."""
    c = tl.arange(0, CHUNKS)
    m = tl.load(masses + c, mask=c < chunks, other=0)
    total = tl.sum(m, 0)
    target = uniform_below(total, seed, step, stream)
    chunk = tl.sum((tl.cumsum(m, 0) <= target).to(tl.int32), 0)
    target -= tl.sum(tl.where(c < chunk, m, 0), 0)
    cols = chunk * CHUNK + tl.arange(0, CHUNK)
    v = tl.load(values + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
    v = tempered(v, temperature)
    w = weight(log2_weight(v, top))
    up_to = tl.cumsum(mass(tl.where(w >= least, w, 0.0)), 0)
    return tl.min(tl.where(up_to > target, cols, NO_ID), 0), total


@triton.jit
def list_few(
    few_ids, few_values, values, found, counts, n, temperature, chunks,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Writes the ids, in order, and the logits of the n tokens that were found in the row's chunks."""
    for begin in range(0, n, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        chunk = tl.zeros([BLOCK], tl.int32)
        first = tl.zeros([BLOCK], tl.int32)  # how many tokens the chunks before hold
        before = tl.full((), 0, tl.int32)
        for group in range(0, chunks, GROUP):
            c = group + tl.arange(0, GROUP)
            up_to = before + tl.cumsum(tl.load(counts + c, mask=c < chunks, other=0), 0)
            past = up_to[None, :] <= i[:, None]
            chunk += tl.sum(past.to(tl.int32), 1)
            first = tl.maximum(first, tl.max(tl.where(past, up_to[None, :], 0), 1))
            before = tl.max(up_to, 0)
        inside = i < n
        place = tl.load(found + chunk.to(tl.int64) * CHUNK + i - first, mask=inside, other=0)
        ids = chunk * CHUNK + place.to(tl.int32)
        v = tl.load(values + ids, mask=inside, other=0.0).to(tl.float32)
        v = tempered(v, temperature)
        tl.store(few_ids + i, ids, mask=inside)
        tl.store(few_values + i, v, mask=inside)
    tl.debug_barrier()  # other threads of this program read the lists


@triton.jit(do_not_specialize=NUMBERS[:-1])
def _choose_sample_kernel(
    logits, values, temperature, top_k, top_k_high, top_p, min_p, typical_p,
    seed, seed_high, step, step_high, stream, stream_high,
    tops, best, raw_tops, raw_sums, masses, counts, found, few_ids, few_values, chosen_ids, logprobs,
    logits_stride, values_stride, V, chunks,
    ROWS_OF: tl.constexpr, USE_BEST: tl.constexpr, USE_ALL: tl.constexpr,
    USE_FILTERS: tl.constexpr, IS_TYPICAL: tl.constexpr, LOGPROBS: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, FEW: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    top = row_top(tops, row, chunks, CHUNKS)
    if is_bad(top):
        tl.store(chosen_ids + row, -1)
        if LOGPROBS:
            tl.store(logprobs + row, float("nan"))
        return
    t = real(temperature, row, ROWS_OF & 1)
    k = whole(top_k, top_k_high, row, ROWS_OF & 128)
    p = real(top_p, row, ROWS_OF & 2)
    typical = real(typical_p, row, ROWS_OF & 8)
    least = least_weight(real(min_p, row, ROWS_OF & 4))
    random = whole(seed, seed_high, row, ROWS_OF & 256)
    index = whole(step, step_high, row, ROWS_OF & 512)
    of = whole(stream, stream_high, row, ROWS_OF & 1024)
    of_row = values + row * values_stride
    chosen = tl.full((), NO_ID, tl.int32)
    total = tl.full((), 1, tl.int64)
    if t == 0:
        if USE_BEST:
            c = tl.arange(0, CHUNKS)
            inside = c < chunks
            of_chunks = tl.load(tops + row * chunks + c, mask=inside, other=float("-inf"))
            ids = tl.load(best + row * chunks + c, mask=inside, other=NO_ID)
            chosen = tl.min(tl.where(of_chunks == top, ids, NO_ID), 0)
    elif is_plain(k, p, typical):
        if USE_ALL:
            chosen, total = draw_from_all(
                of_row, t, top, least, masses + row * chunks, random, index, of, V, chunks, CHUNK, CHUNKS
            )
    else:
        if USE_FILTERS:
            c = tl.arange(0, CHUNKS)
            n = tl.sum(tl.load(counts + row * chunks + c, mask=c < chunks, other=0), 0)
            ids = few_ids + row * FEW
            of_few = few_values + row * FEW
            places = found + row * chunks * CHUNK
            if n <= FEW:
                list_few(ids, of_few, of_row, places, counts + row * chunks, n, t, chunks, CHUNK, BLOCK, GROUP)
            few = tl.where(n <= FEW, n, 0)
            many = tl.where(n <= FEW, 0, V)
            source = (ids, of_few, few, of_row, many, few + many, t, top)
            low, shift = key_range(top)
            zero = low ^ low
            one = tl.full((), 1.0, tl.float32)
            none = tl.full((), 0, tl.int32)
            last_key = zero
            last_id = none - 1
            if k > 0:
                state = (zero, last_id, one, none, zero, none)
                last_key, last_id = find_cut(k, low, shift, source, state, none, COUNT, False, BLOCK)
            if p < 1:
                state = (last_key, last_id, one, none, zero, none)
                if k > 0:
                    total = total_mass(source, state, False, BLOCK)
                else:  # of all tokens, not only of those that were found
                    total = tl.sum(tl.load(masses + row * chunks + c, mask=c < chunks, other=0), 0)
                budget = nucleus(p, total)
                last_key, last_id = find_cut(budget, low, shift, source, state, none, MASS, False, BLOCK)
            least = tl.maximum(least, 1.0)
            mean = none
            last_near = zero
            last_near_id = none
            if IS_TYPICAL:  # noqa: SIM102  (known when it is compiled; the other when it runs)
                if typical < 1:
                    state = (last_key, last_id, least, none, zero, none)
                    total = total_mass(source, state, False, BLOCK)
                    mean = mean_surprise(source, state, total, False, BLOCK)
                    last_near, last_near_id = find_cut(
                        nucleus(typical, total), zero + 0xF0000000, none + 24, source, state, mean,
                        TYPICAL, False, BLOCK,
                    )  # fmt: skip
            state = (last_key, last_id, least, mean, last_near, last_near_id)
            total = total_mass(source, state, IS_TYPICAL, BLOCK)
            target = uniform_below(total, random, index, of)
            chosen = draw(target, source, state, IS_TYPICAL, BLOCK)
    tl.store(chosen_ids + row, chosen.to(tl.int64))
    if LOGPROBS == 1:
        c = tl.arange(0, CHUNKS)
        of_chunks = tl.load(raw_tops + row * chunks + c, mask=c < chunks, other=float("-inf"))
        sums = tl.load(raw_sums + row * chunks + c, mask=c < chunks, other=0.0)
        most = tl.max(of_chunks, 0)
        scaled = tl.where(of_chunks == float("-inf"), 0.0, tl.exp(of_chunks - most) * sums)
        log = tl.log(tl.sum(scaled, 0).to(tl.float64))
        v = tl.load(logits + row * logits_stride + chosen).to(tl.float64)
        tl.store(logprobs + row, ((v - most.to(tl.float64)) - log).to(tl.float32))
    if LOGPROBS == 2:
        if t == 0:
            tl.store(logprobs + row, 0.0)
        else:
            v = tl.load(of_row + chosen).to(tl.float32)
            v = tempered(v, t)
            w = mass(weight(log2_weight(v, top)))
            tl.store(logprobs + row, tl.log(w.to(tl.float64) / total.to(tl.float64)).to(tl.float32))
