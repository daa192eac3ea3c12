"""Memory for what a recorded function makes: each tensor's is taken again by later ones when nobody holds it any more.

A plan keeps the memory that it was recorded on. Of a decode step that is little; of a pass over many tokens it is as
much as all of its activations together, which don't fit any cache, where those of one layer do.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Sequence, Sized
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class _Piece:
    memory: Tensor  # bytes
    free: int | None  # the number of launches when nobody held it any more; None: somebody does


class Arena:
    """launches: what is being recorded, as it grows.

    A launch may be made part of the next one (fuse.py), which then reads what it would have read. So memory rests for
    one launch before it is taken again.
    """

    def __init__(self, launches: Sized) -> None:
        self._launches = launches
        self._pieces: list[_Piece] = []
        self.given: dict[int, list[int]] = {}  # address: the numbers of launches when it became a tensor

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of undefined contents."""
        now, nbytes = len(self._launches), math.prod(shape) * dtype.itemsize
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        fits = [p for p in self._pieces if p.free is not None and p.free < now and len(p.memory) >= nbytes]
        piece = min(fits, key=lambda p: len(p.memory), default=None)
        if piece is None:
            self._pieces.append(piece := _Piece(torch.empty(nbytes, dtype=torch.uint8), None))
        piece.free = None
        address = piece.memory.data_ptr()
        self.given.setdefault(address, []).append(now)
        # The tensor and all views of it hold this object; when it dies, so have they.
        held = (ctypes.c_char * nbytes).from_address(address)
        weakref.finalize(held, self._release, piece).atexit = False
        return torch.frombuffer(held, dtype=dtype).view(*shape)

    def _release(self, piece: _Piece) -> None:
        piece.free = len(self._launches)

    def holds(self, address: int) -> bool:
        """Whether a tensor's memory is the arena's."""
        return address in self.given

    @property
    def nbytes(self) -> int:
        return sum(len(p.memory) for p in self._pieces)
