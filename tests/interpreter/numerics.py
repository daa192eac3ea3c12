"""Triton's interpreter with the numbers of a GPU.

Left to itself it keeps bfloat16 as uint16 and computes with the bit patterns, casts to bfloat16 and fp8 without
rounding to nearest even, multiplies fp32 matrices exactly where a GPU rounds the operands to TF32, and (Triton 3.6)
rounds a fused multiply-add twice. A reduction or scan by a function of ours it makes element by element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle: Any = interpreter.TensorHandle
_ir: Any = interpreter._ir
Array = np.ndarray[Any, Any]

SMALL = {  # types that numpy lacks: kept as bits, computed in fp32
    tl.bfloat16: ml_dtypes.bfloat16,
    tl.float8e4nv: ml_dtypes.float8_e4m3fn,
    tl.float8e5: ml_dtypes.float8_e5m2,
}


def is_small(handle: Any) -> bool:
    return handle.dtype.scalar in SMALL


def widened(handle: Any) -> Array:
    """A handle's values; those of a small type in fp32."""
    return handle.data.view(SMALL[handle.dtype.scalar]).astype(np.float32) if is_small(handle) else handle.data


def narrowed(values: Any, dtype: Any) -> Array:
    """The bits of a small type, rounded to nearest even; what fp8 can't hold becomes its largest number, as NVIDIA's
    conversions have it."""
    values = np.asarray(values, np.float32)
    if dtype != tl.bfloat16:
        largest = float(ml_dtypes.finfo(SMALL[dtype]).max)
        values = np.clip(values, -largest, largest)
    return values.astype(SMALL[dtype]).view(_numpy_type(dtype))


def _numpy_type(dtype: Any) -> Any:
    return interpreter._get_np_dtype(dtype)


def small_handle(values: Array, dtype: Any) -> Any:
    if values.dtype == np.bool_:
        return Handle(values, tl.int1)
    return Handle(narrowed(values, dtype), dtype)


def round_to_tf32(x: Array) -> Array:
    """fp32 with the 10 bits of mantissa that a TF32 product reads: to nearest, ties away from zero (cvt.rna)."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    finite = (bits & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
    return np.where(finite, (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits).view(np.float32)


class Numerics:
    """Goes before the interpreter's own builder, whose methods make each operation."""

    def binary_op(self, lhs: Any, rhs: Any, op: Callable[..., Array]) -> Any:
        if is_small(lhs) and is_small(rhs):
            return small_handle(op(widened(lhs), widened(rhs)), lhs.dtype.scalar)
        return super().binary_op(lhs, rhs, op)  # pyright: ignore

    def unary_op(self, arg: Any, op: Callable[..., Array]) -> Any:
        if is_small(arg):
            return small_handle(op(widened(arg)), arg.dtype.scalar)
        return super().unary_op(arg, op)  # pyright: ignore

    def get_bf16(self, value: float) -> Any:
        """A constant, which Triton 3.6's interpreter doesn't have."""
        return small_handle(np.array([value]), tl.bfloat16)

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        """One rounding: a product of fp32 is exact in fp64."""
        if z.dtype.scalar == tl.float64:
            return super().create_fma(x, y, z)  # pyright: ignore
        exact = widened(x).astype(np.float64) * widened(y) + widened(z)
        if is_small(z):
            return small_handle(exact, z.dtype.scalar)
        return Handle(exact.astype(z.data.dtype), z.dtype.scalar)

    def create_clampf(self, arg: Any, lo: Any, hi: Any, propagate_nans: Any) -> Any:
        if not is_small(arg):
            return super().create_clampf(arg, lo, hi, propagate_nans)  # pyright: ignore
        return small_handle(np.clip(widened(arg), widened(lo), widened(hi)), arg.dtype.scalar)

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        to = dst_type.scalar
        if to in SMALL:
            return Handle(narrowed(widened(src), to), to)
        if is_small(src):
            return Handle(widened(src).astype(_numpy_type(to)), to)
        return super().cast_impl(src, dst_type)  # pyright: ignore

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        toward_zero = rounding_mode == _ir.ROUNDING_MODE.RTZ
        if not toward_zero and (is_small(src) or dst_type.scalar in SMALL):
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)  # pyright: ignore

    def create_dot(self, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        x, y = (
            round_to_tf32(h.data)
            if h.dtype.scalar == tl.float32 and input_precision == _ir.INPUT_PRECISION.TF32
            else widened(h)
            for h in (a, b)
        )
        kind = d.data.dtype
        if kind.kind == "f" and kind.itemsize <= 4:
            x, y = x.astype(np.float64), y.astype(np.float64)
        # In fp64: NumPy's BLAS sums a row of fp32 otherwise at another place of a tile, which no GPU does.
        product = np.matmul(x, y)
        return Handle((product + d.data).astype(kind), d.dtype.scalar)


class _Wide:
    """Goes before ReduceOps and ScanOps, which see numbers of small types in fp32."""

    def apply_impl(self, input: tuple[Any, ...]) -> Any:
        kinds = [x.dtype.scalar for x in input]
        wide = tuple(_like(x, widened(x.handle), tl.float32) if is_small(x.handle) else x for x in input)
        result = super().apply_impl(wide)  # pyright: ignore
        several = isinstance(result, (tuple, list))
        results = [
            _like(r, narrowed(r.handle.data, kind), kind) if kind in SMALL and r.dtype.scalar == tl.float32 else r
            for r, kind in zip(result if several else (result,), kinds)
        ]
        return tuple(results) if several else results[0]

    def combine(self, first: list[Array], second: list[Array], types: list[Any]) -> list[Array]:
        """The combining function, of whole arrays at once."""
        given = [
            tl.tensor(Handle(np.ascontiguousarray(x), t), tl.block_type(t, list(x.shape)))
            for x, t in zip([*first, *second], [*types, *types])
        ]
        made = self.combine_fn.fn(*given)  # pyright: ignore
        return [x.handle.data for x in (made if isinstance(made, tuple) else (made,))]


def _like(x: Any, values: Array, dtype: Any) -> Any:
    """A tensor of x's shape with other values; a scalar's are an array of one."""
    kind: Any = tl.block_type(dtype, list(x.shape)) if x.type.is_block() else dtype
    return tl.tensor(Handle(values, dtype), kind)


class Reduce(_Wide, interpreter.ReduceOps):
    """Reductions by a function of ours as a tree of halves, as a GPU makes them."""

    def generic_reduce(self, input: tuple[Any, ...]) -> Any:
        axis, types = self.axis, [x.dtype for x in input]
        arrays = [x.handle.data for x in input]
        rank = arrays[0].ndim
        if axis is None:
            arrays, axis = [x.reshape(-1) for x in arrays], 0
        arrays = [np.moveaxis(x, axis, 0) for x in arrays]
        while (n := arrays[0].shape[0]) > 1:
            half = n // 2  # blocks are powers of two
            arrays = self.combine([x[:half] for x in arrays], [x[half:] for x in arrays], types)
        results = [x[0] for x in arrays]
        if self.keep_dims:
            shape = [1] * rank if self.axis is None else None
            results = [x.reshape(shape) if shape else np.expand_dims(x, axis) for x in results]
        return [self.to_tensor(x, t) for x, t in zip(results, types)]


class Scan(_Wide, interpreter.ScanOps):
    """Scans by a function of ours in steps of doubling distance."""

    def generic_scan(self, input: tuple[Any, ...]) -> Any:
        types = [x.dtype for x in input]
        arrays = [np.moveaxis(x.handle.data, self.axis, 0).copy() for x in input]
        distance = 1
        while distance < arrays[0].shape[0]:
            made = self.combine([np.roll(x, distance, 0) for x in arrays], arrays, types)
            arrays = [np.concatenate([x[:distance], m[distance:]]) for x, m in zip(arrays, made)]
            distance *= 2
        return [self.to_tensor(np.ascontiguousarray(np.moveaxis(x, 0, self.axis)), t) for x, t in zip(arrays, types)]
