from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from gptfast.kernels.cpu import DTYPES, as_rows, prepare, rows, threads, unsupported
from gptfast.quantize import PackedWeight, QuantizedWeight

COLUMNS = 16  # up to so many rows a weight stored as (depth, cols) is used from where it lies
CHUNK, BAND = 96, 4096  # of depth and, at most, of cols, then
OWN = 8192  # so few elements of x, in up to 8 rows, every worker lays out for itself: sharing them would cost more


def supports(x: Tensor, weight: Tensor | QuantizedWeight | PackedWeight, bias: Tensor | None, **_) -> str | None:
    if x.numel() == 0 or weight.shape[0] == 0:
        return "there is nothing to compute"
    if isinstance(weight, Tensor):
        return unsupported(x, weight, bias)
    if weight.packed.device.type != "cpu":
        return f"the weight is on {weight.packed.device}, and this backend's are on the CPU"
    return unsupported(x, bias)


def linear(**arguments: Any) -> Tensor:
    return prepare_linear(**arguments)(**arguments)


def prepare_linear(
    x: Tensor, weight: Tensor | QuantizedWeight | PackedWeight, bias: Tensor | None, activations: str
) -> Callable[..., Tensor]:
    (cols, depth), dtype = weight.shape, x.dtype
    count, x_stride = x.numel() // depth, rows(x)[1]
    weight_fit, weight_stride = attrgetter("packed"), 0
    if isinstance(weight, Tensor):
        weight_fit = None if weight.stride(1) == 1 else Tensor.contiguous
        weight_stride = depth if weight_fit else weight.stride(0)
        kernel, code = "linear", DTYPES[weight.dtype]
    elif isinstance(weight, PackedWeight):
        kernel, code = "linear_packed", DTYPES[weight.dtype]
    else:
        kernel, code = "linear_int8" if activations == "int8" else "linear_exact", weight.code
    shared = count > 8 or x.numel() > OWN
    workspace = count * ((depth + 63) & -64) * 4 if shared else 0
    if isinstance(weight, Tensor) and count <= COLUMNS and weight.stride(0) == 1 and weight.stride(1) >= cols > 1:
        weight_fit, weight_stride = None, -weight.stride(1)
        workspace = -(-depth // CHUNK) * count * -(-cols // BAND) * BAND * 4
    inputs = {"x": ("x", as_rows), "weight": ("weight", weight_fit)}
    bias_dtype = 0
    if bias is not None:
        fits = bias.dtype in (dtype, torch.float32) and bias.is_contiguous()
        inputs["bias"] = "bias", None if fits else lambda b: b.float().contiguous()
        bias_dtype = DTYPES[bias.dtype] if fits else DTYPES[torch.float32]
    return prepare(
        kernel,
        threads(cols * depth),
        {"y": ((*x.shape[:-1], cols), dtype)},
        inputs,
        dict(x=x, weight=weight, bias=bias),
        workspace=workspace,
        rows=count,
        cols=cols,
        depth=depth,
        x_stride=x_stride,
        weight_stride=weight_stride,
        dtype=DTYPES[dtype],
        format=code,
        bias_dtype=bias_dtype,
        before=0,
    )
