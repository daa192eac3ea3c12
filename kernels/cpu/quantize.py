from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptfast import _cpu
from gptfast.kernels.cpu import Plan, empty, pointer, threads

Launch = tuple[str, int, dict[str, Any]]


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
    y = empty((count, depth), torch.float32)
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


def pack(packed: Tensor, raw: Tensor, code: int, rows: int, depth: int, head: int = 0) -> tuple[Launch, Tensor]:
    """The launch that brings GGUF blocks, `rows` x depth / 32 of them, to panels, and a tensor to keep until it ran.

    head: rows of a head that stand in pairs (2i, 2i + 1) and become i and i + head / 2; 0 where they stand in order
    """
    raw = raw.contiguous()
    fields = {"packed": packed.data_ptr(), "raw": raw.data_ptr(), "rows": rows, "depth": depth}
    return ("pack", threads(raw.numel()), fields | {"head": head, "format": code}), raw


def run(launches: Sequence[Launch]) -> None:
    """Runs them one after the other, without Python in between."""
    Plan(list(launches)).run(torch.get_num_threads())
