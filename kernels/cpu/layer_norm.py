"""layer_norm, and what rms_norm shares with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptfast.kernels.cpu import DTYPES, as_blocks, as_rows, blocks, prepare, rows, threads, unsupported


def supports(x: Tensor, weight: Tensor, residual: Tensor | None, bias: Tensor | None = None, **_: Any) -> str | None:
    if weight.dtype not in (x.dtype, torch.float32):
        return f"weight must have x's dtype or be float32, not {str(weight.dtype).removeprefix('torch.')}"
    return unsupported(x, weight, bias, residual)


def layer_norm(**arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
    return prepare_layer_norm(**arguments)(**arguments)


def prepare_layer_norm(**arguments: Any) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    return normalise("layer_norm", **arguments)


def normalise(
    kernel: str,
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    dropout_p: float,
    seed: int,
    stream: int,
    bias: Tensor | None = None,
) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    """The kernel, prepared: its y, or (y, sum)."""
    _, block, block_stride, x_stride = blocks(x)
    outputs, inputs = {"y": (x.shape, x.dtype)}, {"x": ("x", as_blocks), "weight": ("weight", Tensor.contiguous)}
    residual_stride = 0
    if residual is not None:
        outputs["sum"] = outputs["y"]
        inputs["residual"] = "residual", as_rows
        residual_stride = rows(residual)[1]
    if bias is not None:
        inputs["bias"] = "bias", Tensor.contiguous
    return prepare(
        kernel,
        threads(x.numel()),
        outputs,
        inputs,
        dict(x=x, weight=weight, bias=bias, residual=residual),
        results=len(outputs),
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
    )
