"""Products of matrices for training, by blocks that bound the room which the packed operands take."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from gptfast import _cpu
from gptfast.kernels.cpu import DTYPES, empty, pointer, threads

CHUNK = 384  # the op page's constant; blocks of the depth are whole numbers of it
# Of a launch: each operand's part is packed in at most 128 MiB (64 with the other's).
LENGTH, DEPTH = 4096, 10 * CHUNK
KEPT = 64 << 20  # bytes that a thread keeps for its next product: fresh memory would cost a tenth of one


def multiply(
    a: Tensor, b: Tensor, bias: Tensor | None = None, *, row_sums: bool = False, column_sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """a (M, K) b (K, N) + bias (N) in fp32, and the sums over K of a's rows, (M), or of b's columns, (N), if asked for.

    What is summed must be contiguous across the sums. Any of the storage dtypes; the order of each sum depends on K
    alone.
    """
    a, b = _sided(a), _sided(b)
    (M, K), N = a.shape, b.shape[1]
    c = empty((M, N), torch.float32)
    sums = torch.zeros(M if row_sums else N, dtype=torch.float32) if row_sums or column_sums else None
    if K == 0 or M == 0 or N == 0:
        return c.zero_() if bias is None else c.copy_(bias.expand(M, N)), sums
    bias = None if bias is None else bias.float().contiguous()
    (a_row, a_depth), (b_depth, b_col) = a.stride(), b.stride()
    width, workers = max(LENGTH, (LENGTH * LENGTH) // max(M, 1) if M < LENGTH else 0), threads(M * N)
    for m in range(0, M, LENGTH):
        for n in range(0, N, width):
            rows, cols = min(LENGTH, M - m), min(width, N - n)
            for k in range(0, K, DEPTH):
                depth = min(DEPTH, K - k)
                wanted = sums is not None and (n == 0 if row_sums else m == 0)
                last = bias is not None and k + depth == K
                room = _room(4 * depth * (rows + cols + 128))
                _cpu.product(
                    workers,
                    c=c.data_ptr() + 4 * (m * N + n),
                    sums=sums.data_ptr() + 4 * (m if row_sums else n) if wanted and sums is not None else 0,
                    workspace=room.data_ptr(),
                    a=a.data_ptr() + a.element_size() * (m * a_row + k * a_depth),
                    b=b.data_ptr() + b.element_size() * (k * b_depth + n * b_col),
                    bias=pointer(bias) + 4 * n if last else 0,
                    **dict(rows=rows, cols=cols, depth=depth, c_stride=N),
                    **dict(a_row=a_row, a_depth=a_depth, b_depth=b_depth, b_col=b_col),
                    **dict(a_dtype=DTYPES[a.dtype], b_dtype=DTYPES[b.dtype], of_b=int(column_sums), add=int(k > 0)),
                )
    return c, sums


def _sided(t: Tensor) -> Tensor:
    """A matrix with one stride of 1."""
    return t if 1 in t.stride() else t.contiguous()


class _Own(threading.local):
    room = torch.empty(0, dtype=torch.uint8)


_own = _Own()


def _room(nbytes: int) -> Tensor:
    """Where operands are packed, undefined bytes."""
    if _own.room.shape[0] >= nbytes:
        return _own.room
    room = empty((nbytes,), torch.uint8)
    if nbytes <= KEPT:
        _own.room = room
    return room
