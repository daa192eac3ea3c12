"""layer_norm, and what rms_norm shares with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptfast.kernels.cpu import (
    DTYPES,
    as_blocks,
    as_rows,
    blocks,
    chunk_of,
    prepare,
    rows,
    threads,
    unsupported,
)


def supports(x: Tensor, weight: Tensor, residual: Tensor | None, bias: Tensor | None = None, **_: Any) -> str | None:
    if weight.dtype not in (x.dtype, torch.float32):
        return f"weight must have x's dtype or be float32, not {str(weight.dtype).removeprefix('torch.')}"
    return unsupported(x, weight, bias, residual, backward=True)


def supports_layer_norm_backward(s: Tensor, weight: Tensor, **_: Any) -> str | None:
    return supports(s, weight, None)


def layer_norm(**arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
    return prepare_layer_norm(**arguments)(**arguments)


def prepare_layer_norm(**arguments: Any) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    return normalise("layer_norm", **arguments)


def layer_norm_forward(**arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return prepare_layer_norm_forward(**arguments)(**arguments)


def prepare_layer_norm_forward(**arguments: Any) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    return normalise_forward("layer_norm", **arguments)


def layer_norm_backward(**arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return prepare_layer_norm_backward(**arguments)(**arguments)


def prepare_layer_norm_backward(**arguments: Any) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    return normalise_backward("layer_norm", **arguments)


def normalise(kernel: str, x: Tensor, residual: Tensor | None, **others: Any) -> Callable[..., Any]:
    """The kernel, prepared: its y, or (y, sum)."""
    outputs = {"y": (x.shape, x.dtype)}
    if residual is not None:
        outputs["sum"] = outputs["y"]
    return _forward(kernel, outputs, x, residual, **others)


def normalise_forward(
    kernel: str, x: Tensor, residual: Tensor | None, dropout_p: float, **others: Any
) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The kernel's y, sum, mean and rstd, empty where there is none: what the backward reads too."""
    row = x.shape[:-1], torch.float32
    outputs = {
        "y": (x.shape, x.dtype),
        "sum": (x.shape if residual is not None or dropout_p else (0,), x.dtype),
        "mean": row if kernel == "layer_norm" else NOTHING,
        "rstd": row,
    }
    return _forward(kernel, outputs, x, residual, dropout_p=dropout_p, **others)


NOTHING = (0,), torch.float32  # an output that this call doesn't have: a null pointer


def _forward(
    kernel: str,
    outputs: dict[str, tuple[Any, torch.dtype]],
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    dropout_p: float,
    seed: int,
    stream: int,
    bias: Tensor | None = None,
) -> Callable[..., Any]:
    _, block, block_stride, x_stride = blocks(x)
    inputs = {"x": ("x", as_blocks), "weight": ("weight", Tensor.contiguous)}
    residual_stride = 0
    if residual is not None:
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
        block=block,
        block_stride=block_stride,
        x_stride=x_stride,
        residual_stride=residual_stride,
        eps=eps,
        **_sizes(x, weight, dropout_p, seed, stream),
    )


def normalise_backward(
    kernel: str,
    dy: Tensor,
    dsum: Tensor | None,
    s: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    seed: int,
    stream: int,
    wants_residual: bool,
    wants_weight: bool,
    wants_bias: bool,
    eps: float,
) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The gradients, prepared: gptfast/ops/norm_gradients.py."""
    cols, nothing = (weight.shape, weight.dtype), ((0,), weight.dtype)
    outputs = {
        "dx": (s.shape, s.dtype),
        "dresidual": (s.shape if wants_residual and dropout_p else (0,), s.dtype),
        "dweight": cols if wants_weight else nothing,
        "dbias": cols if wants_bias else nothing,
    }
    sizes = _sizes(s, weight, dropout_p, seed, stream)
    if sizes["rows"] == 0:
        dx, dresidual, dweight, dbias = (torch.zeros(shape, dtype=dtype) for shape, dtype in outputs.values())
        return lambda **_: (dx.clone(), dresidual.clone(), dweight.clone(), dbias.clone())
    given: dict[str, Any] = dict(dy=dy, dsum=dsum, s=s, weight=weight, mean=mean, rstd=rstd)
    fits = dict(dy=as_rows, dsum=as_rows, s=as_blocks, weight=Tensor.contiguous, mean=None, rstd=None)
    left_out = {"dsum"} if dsum is None else set()
    if kernel != "layer_norm":
        left_out.add("mean")
    _, block, block_stride, s_stride = blocks(s)
    chunk = chunk_of(sizes["rows"])
    return prepare(
        kernel + "_backward",
        threads(s.numel()),
        outputs,
        {name: (name, fit) for name, fit in fits.items() if name not in left_out},
        given,
        results=len(outputs),
        workspace=8 * -(-sizes["rows"] // chunk) * sizes["cols"],
        chunk=chunk,
        dy_stride=rows(dy)[1],
        dsum_stride=0 if dsum is None else rows(dsum)[1],
        block=block,
        block_stride=block_stride,
        s_stride=s_stride,
        **sizes,
    )


def _sizes(x: Tensor, weight: Tensor, dropout_p: float, seed: int, stream: int) -> dict[str, Any]:
    return dict(
        rows=x.numel() // x.shape[-1] if x.numel() else 0,
        cols=x.shape[-1],
        seed=seed & 0xFFFFFFFFFFFFFFFF,
        keep_scale=1 / (1 - dropout_p),
        stream=stream & 0xFFFFFFFF,
        drop_below=int(dropout_p * 2**32),
        dtype=DTYPES[x.dtype],
        weight_dtype=DTYPES[weight.dtype],
    )
