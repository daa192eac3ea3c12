"""layer_norm, and what rms_norm shares with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptfast import _cpu
from gptfast.kernels.cpu import DTYPES, blocks, empty, pointer, rows, threads, unsupported


def supports(x: Tensor, weight: Tensor, residual: Tensor | None, bias: Tensor | None = None, **_: Any) -> str | None:
    if weight.dtype not in (x.dtype, torch.float32):
        return f"weight must have x's dtype or be float32, not {str(weight.dtype).removeprefix('torch.')}"
    return unsupported(x, weight, bias, residual)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, **rest: Any) -> Tensor | tuple[Tensor, Tensor]:
    bias = None if bias is None else bias.contiguous()
    return normalise(_cpu.layer_norm, x, weight, **rest, bias=pointer(bias), mean=0)


def normalise(
    kernel: Callable[..., None],
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    dropout_p: float,
    seed: int,
    stream: int,
    **more: int,
) -> Tensor | tuple[Tensor, Tensor]:
    """The kernel's y, or (y, sum). `more` are the arguments that one op has alone."""
    x, block, block_stride, x_stride = blocks(x)
    weight = weight.contiguous()
    residual_stride = 0
    if residual is not None:
        residual, residual_stride = rows(residual)
    y = empty(x.shape, x.dtype)
    total = empty(x.shape, x.dtype) if residual is not None else None
    kernel(
        threads(x.numel()),
        y=y.data_ptr(),
        sum=pointer(total),
        rstd=0,
        x=x.data_ptr(),
        residual=pointer(residual),
        weight=weight.data_ptr(),
        rows=x.numel() // x.shape[-1] if x.numel() else 0,
        cols=x.shape[-1],
        block=block,
        block_stride=block_stride,
        x_stride=x_stride,
        residual_stride=residual_stride,
        seed=seed & 0xFFFFFFFFFFFFFFFF,
        eps=eps,
        keep_scale=1 / (1 - dropout_p),
        stream=stream & 0xFFFFFFFF,
        drop_below=int(dropout_p * 2**32),
        dtype=DTYPES[x.dtype],
        weight_dtype=DTYPES[weight.dtype],
        **more,
    )
    return y if total is None else (y, total)
