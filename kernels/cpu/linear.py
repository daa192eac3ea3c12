from __future__ import annotations

import torch
from torch import Tensor

from gptfast import _cpu
from gptfast.kernels.cpu import DTYPES, pointer, rows, threads, unsupported
from gptfast.quantize import PackedWeight, QuantizedWeight

OWN = 8192  # so few elements of x, in up to 8 rows, every worker lays out for itself: sharing them would cost more


def supports(x: Tensor, weight: Tensor | QuantizedWeight | PackedWeight, bias: Tensor | None, **_) -> str | None:
    if x.numel() == 0 or weight.shape[0] == 0:
        return "there is nothing to compute"
    if isinstance(weight, Tensor):
        return unsupported(x, weight, bias)
    if weight.packed.device.type != "cpu":
        return f"the weight is on {weight.packed.device}, and this backend's are on the CPU"
    return unsupported(x, bias)


def linear(x: Tensor, weight: Tensor | QuantizedWeight | PackedWeight, bias: Tensor | None, activations: str) -> Tensor:
    x, x_stride = rows(x)
    cols, depth = weight.shape
    count = x.numel() // depth
    y = torch.empty((*x.shape[:-1], cols), dtype=x.dtype)
    if isinstance(weight, Tensor):
        kernel = _cpu.linear
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        storage, stride, code = weight, weight.stride(0), DTYPES[weight.dtype]
    elif isinstance(weight, PackedWeight):
        kernel, storage, stride, code = _cpu.linear_packed, weight.packed, 0, DTYPES[weight.dtype]
    else:
        kernel = _cpu.linear_int8 if activations == "int8" else _cpu.linear_exact
        storage, stride, code = weight.packed, 0, weight.code
    if bias is not None and not (bias.dtype in (x.dtype, torch.float32) and bias.is_contiguous()):
        bias = bias.float().contiguous()
    shared = count > 8 or x.numel() > OWN
    workspace = torch.empty(count * ((depth + 63) & -64) * 4, dtype=torch.uint8) if shared else None
    kernel(
        threads(cols * depth),
        y=y.data_ptr(),
        x=x.data_ptr(),
        weight=storage.data_ptr(),
        bias=pointer(bias),
        workspace=pointer(workspace),
        rows=count,
        cols=cols,
        depth=depth,
        x_stride=x_stride,
        weight_stride=stride,
        dtype=DTYPES[x.dtype],
        format=code,
        bias_dtype=0 if bias is None else DTYPES[bias.dtype],
        before=0,
    )
    return y
