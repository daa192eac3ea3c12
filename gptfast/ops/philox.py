"""Philox4x32-10, the counter-based random numbers of every backend, and the dropout mask made of them.

Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011). Key = (seed low 32, seed high 32),
counter = (index low 32, index high 32, stream, 0).
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(seed: Tensor | int, index: Tensor, stream: Tensor | int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words (as int64, 0 <= word < 2^32) at each index (int64); seed and stream broadcast to it."""
    seed = torch.as_tensor(seed, dtype=torch.int64, device=index.device)
    stream = torch.as_tensor(stream, dtype=torch.int64, device=index.device)
    keys, counters, streams = torch.broadcast_tensors(seed, index, stream)
    k0, k1 = keys & MASK, (keys >> 32) & MASK
    c0, c1, c2, c3 = counters & MASK, (counters >> 32) & MASK, streams & MASK, torch.zeros_like(counters)
    for _ in range(10):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # wraps in int64, bits as in uint64
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def dropout_keep(
    shape: tuple[int, ...], p: float, seed: Tensor | int, stream: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The bool mask (True = kept) of a tensor of this shape: element e, counted in row-major order, takes word e % 4 of
    index e // 4 and is dropped where word < floor(p * 2^32)."""
    n = 1
    for s in shape:
        n *= s
    words = philox(seed, torch.arange((n + 3) // 4, device=device), stream)
    return (torch.stack(words, -1).reshape(-1)[:n] >= int(p * 2**32)).reshape(shape)
