from __future__ import annotations

import torch
from torch import Tensor

from gptfast import _cpu
from gptfast.kernels.cpu import DTYPES, pointer, rows, threads, unsupported


def supports(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, dropout_p: float, **_
) -> str | None:
    if dropout_p:
        return "it has no dropout yet"
    if weight.dtype not in (x.dtype, torch.float32):
        return f"weight must have x's dtype or be float32, not {weight.dtype}"
    return unsupported(x, weight, bias, residual)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None, **_
) -> Tensor | tuple[Tensor, Tensor]:
    x, x_stride = rows(x)
    residual_stride = 0
    if residual is not None:
        residual, residual_stride = rows(residual)
    y = torch.empty(x.shape, dtype=x.dtype)
    total = torch.empty(x.shape, dtype=x.dtype) if residual is not None else None
    _cpu.layer_norm(
        threads(x.numel()),
        y=y.data_ptr(),
        sum=pointer(total),
        mean=0,
        rstd=0,
        x=x.data_ptr(),
        residual=pointer(residual),
        weight=weight.data_ptr(),
        bias=pointer(bias),
        rows=x.numel() // x.shape[-1] if x.numel() else 0,
        cols=x.shape[-1],
        x_stride=x_stride,
        residual_stride=residual_stride,
        eps=eps,
        dtype=DTYPES[x.dtype],
        weight_dtype=DTYPES[weight.dtype],
    )
    return y if total is None else (y, total)
