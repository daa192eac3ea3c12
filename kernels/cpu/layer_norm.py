"""layer_norm, and what rms_norm shares with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptfast import _cpu
from gptfast.kernels.cpu import (
    DTYPES,
    as_blocks,
    as_rows,
    blocks,
    chunk_of,
    empty,
    prepare,
    rows,
    shared,
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
    return normalise_forward("layer_norm", **arguments)


def layer_norm_backward(**arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return normalise_backward("layer_norm", **arguments)


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
        block=block,
        block_stride=block_stride,
        x_stride=x_stride,
        residual_stride=residual_stride,
        eps=eps,
        **_sizes(x, weight, dropout_p, seed, stream),
    )


def normalise_forward(
    kernel: str,
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    dropout_p: float,
    seed: int,
    stream: int,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kernel's y, sum, mean and rstd, empty where there is none: what the backward reads too."""
    x, block, block_stride, x_stride = blocks(x)
    given = {"x": x, "weight": weight.contiguous()}
    if residual is not None:
        given["residual"] = as_rows(residual)
    if bias is not None:
        given["bias"] = bias.contiguous()
    made = {"y": empty(x.shape, x.dtype), "rstd": torch.empty(x.shape[:-1])}
    if residual is not None or dropout_p:
        made["sum"] = empty(x.shape, x.dtype)
    if kernel == "layer_norm":
        made["mean"] = torch.empty(x.shape[:-1])
    getattr(_cpu, kernel)(
        threads(x.numel()),
        **{name: t.data_ptr() for name, t in (given | made).items()},
        **_sizes(x, weight, dropout_p, seed, stream),
        block=block,
        block_stride=block_stride,
        x_stride=x_stride,
        residual_stride=0 if residual is None else rows(given["residual"])[1],
        eps=eps,
    )
    total, mean = (made.get(name, x.new_empty(0, dtype=t)) for name, t in (("sum", x.dtype), ("mean", torch.float32)))
    return made["y"], total, mean, made["rstd"]


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients: gptfast/ops/norm_gradients.py."""
    s, block, block_stride, s_stride = blocks(s)
    dy, dy_stride = rows(dy)
    given = {"dy": dy, "s": s, "weight": weight.contiguous(), "rstd": rstd}
    dsum_stride = 0
    if dsum is not None:
        given["dsum"], dsum_stride = rows(dsum)
    if kernel == "layer_norm":
        given["mean"] = mean
    made = {"dx": empty(s.shape, s.dtype)}
    if wants_residual and dropout_p:
        made["dresidual"] = empty(s.shape, s.dtype)
    if wants_weight:
        made["dweight"] = torch.empty_like(given["weight"])
    if wants_bias:
        made["dbias"] = torch.empty_like(given["weight"])
    sizes = _sizes(s, weight, dropout_p, seed, stream)
    chunk = chunk_of(sizes["rows"])
    workspace = shared(8 * -(-sizes["rows"] // chunk) * sizes["cols"])
    if sizes["rows"] == 0:
        for name in made.keys() & {"dweight", "dbias"}:
            made[name].zero_()
    else:
        getattr(_cpu, kernel + "_backward")(
            threads(s.numel()),
            **{name: t.data_ptr() for name, t in (given | made).items()},
            **sizes,
            workspace=workspace.data_ptr(),
            chunk=chunk,
            dy_stride=dy_stride,
            dsum_stride=dsum_stride,
            block=block,
            block_stride=block_stride,
            s_stride=s_stride,
        )
    dresidual, dweight, dbias = (made.get(name, s.new_empty(0)) for name in ("dresidual", "dweight", "dbias"))
    return made["dx"], dresidual, dweight, dbias


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
