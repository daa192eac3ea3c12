"""Small kernels for the tests of the interpreter: each faulty one has one fault, and a sound twin."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dot_kernel(x, y, z, N: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(z + at, tl.dot(tl.load(x + at), tl.load(y + at), input_precision=PRECISION))


@triton.jit
def _arithmetic_kernel(x, y, total, product, fused, largest, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(total + at, a + b)
    tl.store(product + at, a * b)
    tl.store(fused + at, tl.fma(a, b, a))
    tl.store(largest, tl.max(a, 0))


@triton.jit
def _cast_kernel(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))


@triton.jit
def _take_second(a, b):
    return b


@triton.jit
def _larger_with_index(a, i, b, j):
    first = (a > b) | ((a == b) & (i < j))
    return tl.where(first, a, b), tl.where(first, i, j)


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _reduce_kernel(x, last, best, where, sums, N: tl.constexpr):
    at = tl.arange(0, N)
    a = tl.load(x + at)
    tl.store(last, tl.reduce(a, 0, _take_second))
    value, index = tl.reduce((a, at), 0, _larger_with_index)
    tl.store(best, value)
    tl.store(where, index)
    tl.store(sums + at, tl.associative_scan(a, 0, _add))


@triton.jit
def _copy_kernel(x, y, n, IS_LOAD_MASKED: tl.constexpr, IS_STORE_MASKED: tl.constexpr, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    if IS_LOAD_MASKED:
        a = tl.load(x + at, mask=at < n)
    else:
        a = tl.load(x + at)
    if IS_STORE_MASKED:
        tl.store(y + at, a, mask=at < n)
    else:
        tl.store(y + at, a)


@triton.jit
def _overlap_kernel(x, y, STEP: tl.constexpr, N: tl.constexpr):
    at = tl.program_id(0) * STEP + tl.arange(0, N)
    tl.store(y + at, tl.load(x + at))


@triton.jit
def _neighbour_kernel(x, FIRST, SECOND):
    """Two programs: x[0] = x[FIRST] and x[1] = x[SECOND]."""
    i = tl.program_id(0)
    tl.store(x + i, tl.load(x + tl.where(i == 0, FIRST, SECOND)) + 1)


@triton.jit
def _reread_kernel(x, y, IS_SAFE: tl.constexpr, N: tl.constexpr):
    """y = x reversed, through memory that other threads read."""
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at))
    if IS_SAFE:
        tl.debug_barrier()
    tl.store(y + at, tl.load(y + N - 1 - at))


@triton.jit
def _lanes_kernel(y, DIVISOR: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at // DIVISOR, at)


@triton.jit
def _indirect_kernel(addresses, y, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(addresses).to(tl.pointer_type(tl.float32))
    tl.store(y + at, tl.load(x + at))


@triton.jit
def _numbers_kernel(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    a = tl.load(x + at)
    tl.store(y + at, a * 0.0)
    tl.store(y + N + at, a * -0.0)
    tl.store(y + 2 * N + at, a * 0)
    tl.store(y + 3 * N + at, tl.where(a > 0, a + 1, a + 1.5))
