"""Linear layer, y = x W^T + bias, with float or quantised weights; the rows of y don't depend on how many there are.

    y[m, n] = sum over k of x[m, k] * W[n, k]  +  bias[n]

x       (..., K)  float32, bfloat16 or float16 (float64 on the reference); any strides, the last 1
weight  (N, K)    a tensor of float32, bfloat16 or float16, whatever x's dtype, the same packed once for the kernels, a
                  gptfast.quantize.PackedWeight, or a gptfast.quantize.QuantizedWeight (Q8_0, Q4_0, Q4_1; K a multiple
                  of 32), whose values are d * q, d * (q - 8), d * q + m
bias    (N)       any of the float dtypes, or None
y       (..., N)  x's dtype: sums and bias in fp32 (fp64 for fp64), rounded once

activations="exact": x is used as it is, the weights as the values that they stand for, products and sums in fp32.
    Error: that of an fp32 dot product. The order below keeps it at a few roundings of sum |x w|, as PyTorch's does.
activations="int8", quantised weights only: x is first rounded to int8 in each group of 32 k, in fp32:
        scale = amax / 127,  q = round_half_even(x * (127 / amax)),  amax = max |x| of the group
    A group with amax < 2^-120 has scale 0; one with a value that isn't finite has scale NaN. The dot product of a group
    is a whole number, the same on every machine: y = sum over groups of (d * scale) * sum(q_w q_x), plus for Q4_1
    m * (scale * sum(q_x)).
    Error: |y - y_exact| <= sum over groups of scale / 2 * sum |w|; for normal x the root mean square is 0.6% of y's.

Orders of summation, constants of this page. On the CPU, float weights: K in chunks of 768, added in order; in a chunk
as many partial sums as the machine has lanes (k mod lanes), added by halves. Packed float weights: chunks of 96 k,
added in order; inside a chunk in order too, so that the last bits differ from those of the same weights unpacked. A
float weight that is the transpose of a (K, N) one: likewise with chunks of 96 k, and nothing is copied, which suits few
rows. Where a machine multiplies pairs of bfloat16 (GPTFAST_CPU_ISA=avx512bf16) and both x and a weight are bfloat16,
the same with two neighbours of k at a time, so in chunks of 1,536 or 192; a product of subnormal numbers is zero there.
Quantised weights: groups of 32 k, added in order; inside a group in order too (exact). In Triton, chunks of 256 k
(fp32), 1,024 (16-bit numbers) or 512 (quantised weights, by groups of 32, added in order), added in order; inside of
them the order of the machine's matrix instructions. Neither the number of rows or of threads nor a row's place in x
changes a bit.

Where a gradient is wanted, or PyTorch traces the call, a float weight's product has the orders that
gptfast/ops/linear_gradients.py says; under autocast, and on GPUs unless a backend is asked for, it is PyTorch's own.
Quantised and packed weights give gradients to x and bias alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from gptfast.ops import dispatch, library, linear_gradients
from gptfast.ops.dispatch import shape
from gptfast.ops.spec import Case, Cost, Inputs, Op, nbytes, products
from gptfast.quantize import GROUP, PackedWeight, QuantizedWeight

ACTIVATIONS = ("exact", "int8")
Weight: TypeAlias = Tensor | QuantizedWeight | PackedWeight


def round_activations(x: Tensor) -> Tensor:
    """x (..., K) as activations="int8" sees it: scale * q, in x's dtype if that is fp64, else in fp32."""
    groups = x.float().unflatten(-1, (-1, GROUP))
    amax = groups.abs().amax(-1, keepdim=True)
    usable = (amax >= 2.0**-120) & amax.isfinite()
    scale = torch.where(usable, amax / 127, torch.where(amax < 1, 0.0, torch.nan))
    q = torch.where(usable, (groups * (127 / amax)).round(), 0.0)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (q.to(wide) * scale.to(wide)).flatten(-2)


def reference(x: Tensor, weight: Weight, bias: Tensor | None = None, *, activations: str = "exact") -> Tensor:
    """The meaning of linear, in plain PyTorch."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    values = _values(weight)
    x_values = round_activations(x) if activations == "int8" else x
    y = F.linear(x_values.to(wide), values.to(wide), None if bias is None else bias.to(wide))
    return y.to(x.dtype)


def _values(weight: Weight) -> Tensor:
    if isinstance(weight, PackedWeight):
        return weight.unpack()
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight


# Made once, so that a baseline's time is the product's.
_dense: WeakKeyDictionary[QuantizedWeight | PackedWeight, Tensor] = WeakKeyDictionary()


def baseline(x: Tensor, weight: Weight, bias: Tensor | None = None, *, activations: str = "exact") -> Tensor:
    """What one writes with PyTorch: F.linear, a quantised weight dequantised beforehand, a packed one never packed."""
    if not isinstance(weight, Tensor):
        if weight not in _dense or _dense[weight].dtype != x.dtype:
            _dense[weight] = _values(weight).to(x.dtype)
        weight = _dense[weight]
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def cost(x: Tensor, weight: Weight, bias: Tensor | None = None, *, activations: str = "exact") -> Cost:
    (N, K), rows = weight.shape, x.numel() // weight.shape[1]
    stored = nbytes(weight) if isinstance(weight, Tensor) else weight.nbytes
    moved = stored + nbytes(x, bias) + rows * N * x.element_size()
    unit = "int8" if activations == "int8" else products(x, weight)
    return Cost(flops=2.0 * rows * N * K, bytes=moved, unit=unit)


def train_cost(x: Tensor, weight: Weight, bias: Tensor | None = None, *, activations: str = "exact") -> Cost:
    """Three products; the backward reads dy and both operands again and writes their gradients."""
    forward = cost(x, weight, bias, activations=activations)
    assert isinstance(weight, Tensor)
    y = x.numel() // weight.shape[1] * weight.shape[0] * x.element_size()
    moved = forward.bytes + y + nbytes(x, x, weight, weight, bias)
    return Cost(flops=3 * forward.flops, bytes=moved, unit=forward.unit)


@cache
def _quantised(N: int, K: int, kind: str) -> QuantizedWeight:
    """Random weights of a case, with a mean that isn't zero."""
    i = Inputs(torch.float32, f"{N}x{K}")
    return QuantizedWeight.quantize(i.randn(N, K, scale=K**-0.5, shift=0.1 * K**-0.5), kind)


def cases() -> list[Case]:
    def case(
        M: int, N: int, K: int, weight: str = "", activations: str = "exact", bias: bool = False, tags: str = ""
    ) -> Case:
        """weight: "" for x's dtype, the name of another one, "packed" or "packed-" with that name, "columns" for the
        transpose of a (K, N) one, a quantised kind."""

        def make(i: Inputs) -> dict[str, Any]:
            scale = K**-0.5
            if weight.startswith("q"):
                w = _quantised(N, K, weight)
            elif weight.startswith("columns"):
                w = i.randn(K, N, scale=scale).t()
            else:
                dtype = weight.removeprefix("packed").removeprefix("-")
                w = i.randn(N, K, scale=scale, dtype=getattr(torch, dtype) if dtype else None)
                if weight.startswith("packed"):
                    w = PackedWeight.pack(w)
            b = i.randn(N, scale=0.1) if bias else None
            return {"x": i.randn(M, K), "weight": w, "bias": b, "activations": activations}

        name = f"{M}x{N}x{K}" + f"-{weight}" * bool(weight) + "-int8" * (activations == "int8") + "+bias" * bias
        return Case(name, make, frozenset(tags.split()))

    floats = [
        case(1, 1, 1),
        case(2, 5, 31, bias=True),
        case(3, 48, 100),
        case(7, 5, 577, bias=True),
        case(8, 1000, 100),
        case(8, 27, 1600, bias=True),
        case(13, 49, 800, bias=True),
        case(17, 48, 3072),
        case(64, 5, 577, bias=True),
        case(129, 100, 1600),
        case(3, 70, 100, "bfloat16", bias=True),
        case(64, 48, 96, "float16"),
        case(8, 33, 100, "float32"),
    ]
    packed = [
        case(1, 1, 1, "packed"),
        case(2, 5, 31, "packed", bias=True),
        case(7, 50, 577, "packed"),
        case(8, 1000, 100, "packed"),
        case(17, 48, 3072, "packed", bias=True),
        case(129, 100, 1600, "packed"),
        case(3, 70, 100, "packed-bfloat16", bias=True),
        case(64, 49, 200, "packed-float16"),
    ]
    columns = [
        case(1, 1, 1, "columns"),
        case(3, 5, 97, "columns", bias=True),
        case(2, 4099, 100, "columns"),
        case(7, 50, 577, "columns", bias=True),
        case(13, 1030, 200, "columns", bias=True),
        case(17, 70, 577, "columns"),
        case(3, 40, 100, "columns", bias=True),
        case(40, 300, 200, "columns"),
    ]
    quantised = [
        case(M, N, K, kind, activations, bias)
        for activations in ACTIVATIONS
        for kind, M, N, K, bias in (
            *(("q8_0", 1, 1, 32, False), ("q8_0", 3, 48, 576, True), ("q8_0", 64, 100, 416, False)),
            *(("q4_0", 2, 5, 64, True), ("q4_0", 7, 70, 576, False), ("q4_0", 17, 1000, 96, False)),
            *(("q4_1", 1, 100, 3072, False), ("q4_1", 8, 33, 160, True), ("q4_1", 129, 50, 576, False)),
        )
    ]
    timed = [
        case(M, N, K, kind, activations, tags="bench")
        for M, N, K in ((1, 1536, 576), (8, 1536, 576), (512, 1536, 576), (1, 3072, 768), (8, 3072, 768))
        for kind, activations in (
            ("", "exact"),
            ("packed", "exact"),
            ("q4_1", "exact"),
            ("q4_1", "int8"),
            ("q8_0", "int8"),
        )
    ] + [
        case(512, 3072, 768, kind, activations, tags="bench")
        for kind, activations in (("", "exact"), ("packed", "exact"), ("q4_1", "int8"))
    ]
    heads = [case(M, 49152, 576, kind, tags="bench big") for M in (1, 8) for kind in ("", "packed")]  # beyond caches
    return [*floats, *packed, *columns, *quantised, *timed, *heads]


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    activations: str = "exact",
    backend: str | None = None,
) -> Tensor:
    """x W^T + bias. Formula, shapes, dtypes and the error of each kind of activations: the top of this page.

    Raises ValueError for shapes and dtypes that don't fit, and for int8 activations with a float weight; BackendError
    where `backend` can't serve the call.
    """
    arguments = {"x": x, "weight": weight, "bias": bias, "activations": activations}
    if isinstance(weight, Tensor) and not isinstance(backend, dispatch.Explain) and library.needed(arguments):
        alone, as_op = library.autocasting(x), False
        if not alone and (backend is not None or x.device.type == "cpu"):
            wanted, as_op = library.route("linear", backend, arguments, _check)
            if as_op:
                return _registered(x, weight, bias, wanted)
        if backend is None:
            _check(**arguments)
            return linear_gradients.product(x, weight, bias)
    if not isinstance(weight, Tensor) and not isinstance(backend, dispatch.Explain) and library.needed(arguments):
        if library.transformed() and not torch.compiler.is_compiling():
            return _transformed(x, weight, bias, activations, backend)
        if library.recorded(arguments):
            return _frozen(x, weight, bias, activations, backend)
    return dispatch.prepared("linear", backend, reference, x, arguments, _check)(**arguments)


def _frozen(
    x: Tensor, weight: QuantizedWeight | PackedWeight, bias: Tensor | None, activations: str, backend: str | None
) -> Tensor:
    """With gradients of x and bias."""
    _check(x, weight, bias, activations)

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, weight, bias, activations=activations, backend=backend)

    def multiply(dy: Tensor, transposed: Tensor) -> Tensor:
        return _registered(dy, transposed, None, backend)

    return linear_gradients.Frozen.apply(x, bias, run, lambda: _values(weight), multiply)


def _transformed(
    x: Tensor, weight: QuantizedWeight | PackedWeight, bias: Tensor | None, activations: str, backend: str | None
) -> Tensor:
    """Under torch.func's transforms and in forward mode: by the reference."""
    if backend not in (None, "reference"):
        raise dispatch.BackendError(
            f"linear: torch.func's transforms and forward mode go through the reference, not {backend!r}"
        )
    _check(x, weight, bias, activations)
    with temporarily_clear_interpreter_stack():
        values = _values(weight)
    if activations == "int8":  # whose rounding counts as the identity
        return reference(x + (round_activations(x) - x).detach(), values, bias).to(x.dtype)
    return reference(x, values, bias)


_registered = linear_gradients.register()


def _check(x: Tensor, weight: Weight, bias: Tensor | None, activations: str) -> None:
    """Raises where shapes or dtypes don't fit together."""
    quantised = isinstance(weight, QuantizedWeight)
    if isinstance(weight, Tensor):
        fits = weight.dim() == 2 and weight.is_floating_point()
    else:
        fits = quantised or isinstance(weight, PackedWeight)
    if not fits:
        got = shape(weight) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"linear: expected weight (N, K) of floats, packed or a QuantizedWeight, got {got}")
    N, K = weight.shape
    if x.dim() == 0 or x.shape[-1] != K or not x.is_floating_point():
        raise ValueError(f"linear: expected x (..., {K}) of floats for weight ({N}, {K}), got {shape(x)}")
    if bias is not None and (bias.shape != (N,) or not bias.is_floating_point()):
        raise ValueError(f"linear: expected bias ({N},) of floats for weight ({N}, {K}), got {shape(bias)}")
    if activations != "exact" and not (activations == "int8" and quantised):
        allowed = "'exact' or 'int8'" if quantised else "'exact' for a float weight"
        raise ValueError(f"linear: expected activations {allowed}, got {activations!r}")


def _take(arguments: Mapping[str, Any], b: int) -> dict[str, Any]:
    return {**arguments, "x": arguments["x"][b : b + 1]}


OP = Op(
    *("linear", linear, reference, cost, cases, baseline),
    train_cost=train_cost,
    differentiable=("x", "weight", "bias"),
    double_backward=True,
    take=_take,
)
