from __future__ import annotations

import torch
from torch import Tensor

from gptfast import _cpu
from gptfast.kernels.cpu import pointer, threads


def dequantize(
    packed: Tensor,
    code: int,
    depth: int,
    ids: Tensor | None,
    count: int,
    positions: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """Rows `ids` (count,) int64 of a packed weight, or its first `count` rows, as (count, depth) fp32; plus the rows
    `positions` (count,) int64 of a table (P, depth) fp32."""
    y = torch.empty(count, depth)
    _cpu.dequantize(
        threads(y.numel()),
        y=y.data_ptr(),
        packed=packed.data_ptr(),
        ids=pointer(ids),
        positions=pointer(positions),
        table=pointer(table),
        rows=count,
        depth=depth,
        table_stride=0 if table is None else table.stride(0),
        format=code,
    )
    return y


def pack(packed: Tensor, raw: Tensor, code: int, rows: int, depth: int) -> None:
    """GGUF blocks, `rows` x depth / 32 of them in order, to panels."""
    raw = raw.contiguous()
    _cpu.pack(
        threads(raw.numel()),
        packed=packed.data_ptr(),
        raw=raw.data_ptr(),
        rows=rows,
        depth=depth,
        format=code,
    )
