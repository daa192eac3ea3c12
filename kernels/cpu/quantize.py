from __future__ import annotations

import torch
from torch import Tensor

from gptfast import _cpu
from gptfast.kernels.cpu import pointer, threads


def dequantize(packed: Tensor, code: int, depth: int, ids: Tensor | None, count: int) -> Tensor:
    """Rows `ids` (count,) int64 of a packed weight, or its first `count` rows, as (count, depth) fp32."""
    y = torch.empty(count, depth)
    _cpu.dequantize(
        threads(y.numel()),
        y=y.data_ptr(),
        packed=packed.data_ptr(),
        ids=pointer(ids),
        rows=count,
        depth=depth,
        format=code,
    )
    return y
