from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptfast import _cpu
from gptfast.kernels.cpu import DTYPES, as_rows, empty, pointer, prepare, rows, threads, unsupported

PANELS = -1  # the stride that says so


def supports(ids: Tensor, weight: Tensor, positions: Tensor | None, position_weight: Tensor | None) -> str | None:
    for t in (ids, positions):
        if t is not None and not t.is_cpu:
            return f"ids are on {t.device}, and this backend's tensors are on the CPU"
    return unsupported(weight, position_weight, backward=True)


def supports_embedding_backward(dout: Tensor, **_: Any) -> str | None:
    return unsupported(dout)


def embedding(ids: Tensor, weight: Tensor, positions: Tensor | None, position_weight: Tensor | None) -> Tensor:
    weight, stride = rows(weight)
    return _gather(ids, weight, stride, weight.shape[1], positions, position_weight)


def prepare_embedding(
    ids: Tensor, weight: Tensor, positions: Tensor | None, position_weight: Tensor | None
) -> Callable[..., Tensor]:
    C = weight.shape[1]
    inputs: dict[str, tuple[str, Any]] = {"ids": ("ids", Tensor.contiguous), "weight": ("weight", as_rows)}
    position_stride = 0
    if positions is not None and position_weight is not None:
        inputs["positions"] = "positions", partial(_for_each, ids.shape)
        inputs["position_weight"] = "position_weight", as_rows
        position_stride = rows(position_weight)[1]
    return prepare(
        "embedding",
        threads(ids.numel() * C),
        {"out": ((*ids.shape, C), weight.dtype)},
        inputs,
        dict(ids=ids, weight=weight, positions=positions, position_weight=position_weight),
        rows=ids.numel(),
        cols=C,
        weight_stride=rows(weight)[1],
        position_stride=position_stride,
        dtype=DTYPES[weight.dtype],
    )


def _for_each(shape: torch.Size, positions: Tensor) -> Tensor:
    """Positions, one for each id."""
    return (positions if positions.shape == shape else positions.expand(shape)).contiguous()


def embedding_packed(ids: Tensor, packed: Tensor, positions: Tensor | None, position_weight: Tensor | None) -> Tensor:
    """The same of a PackedWeight's panels (N / 16, C, 16)."""
    return _gather(ids, packed, PANELS, packed.shape[1], positions, position_weight)


def _gather(
    ids: Tensor, weight: Tensor, stride: int, C: int, positions: Tensor | None, position_weight: Tensor | None
) -> Tensor:
    ids = ids.contiguous()
    position_stride = 0
    if positions is not None and position_weight is not None:
        positions = _for_each(ids.shape, positions)
        position_weight, position_stride = rows(position_weight)
    out = empty((*ids.shape, C), weight.dtype)
    _cpu.embedding(
        threads(out.numel()),
        out=out.data_ptr(),
        ids=ids.data_ptr(),
        positions=pointer(positions),
        weight=weight.data_ptr(),
        position_weight=pointer(position_weight),
        rows=ids.numel(),
        cols=C,
        weight_stride=stride,
        position_stride=position_stride,
        dtype=DTYPES[weight.dtype],
    )
    return out


def embedding_backward(dout: Tensor, ids: Tensor, count: int) -> Tensor:
    """dweight (count, C) of a table whose rows `ids`, of dout's leading shape, were taken."""
    C = dout.shape[-1]
    dweight = torch.zeros(count, C, dtype=dout.dtype)
    if dout.numel() == 0:
        return dweight
    dout, dout_stride = rows(dout)
    in_order, order = ids.reshape(-1).sort(stable=True)
    taken, counts = in_order.unique_consecutive(return_counts=True)
    first = torch.zeros(len(taken) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=first[1:])
    _cpu.embedding_backward(
        threads(dout.numel()),
        dweight=dweight.data_ptr(),
        dout=dout.data_ptr(),
        ids=taken.data_ptr(),
        first=first.data_ptr(),
        order=order.data_ptr(),
        segments=len(taken),
        cols=C,
        dout_stride=dout_stride,
        dtype=DTYPES[dout.dtype],
    )
    return dweight
