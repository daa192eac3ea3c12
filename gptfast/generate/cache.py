"""The keys and values that a model has computed already, one pair of tensors for each layer."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gptfast.model.config import GPTConfig

CACHE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
Scales = list[Tensor] | None  # of each layer; None where there are none
# Bytes that one thread clears. PyTorch wakes its own from 32768 elements on, and waits for them: 13 ms a tensor where
# another process has the other core.
SMALL = 4 << 20
ALONE = 32768  # elements that PyTorch copies with one thread


class KVCache:
    """Room for `capacity` tokens in each of `batch` rows.

    k, v     a tensor (batch, capacity, Hk, D) for each layer; beyond a row's length: anything finite. A head's keys
             follow one another in memory, so that decoding reads them in one stream.
    lengths  (batch,) int32: the tokens that each row holds
    dtype    of k and v. With fp32 activations a 16-bit one halves what decoding reads of them: they are rounded to
             nearest even as they are written, in prefill as in decoding, so that both see the same. So are those
             of an int8 one, a quarter of fp32's size: k_scale, v_scale (batch, capacity, Hk) fp32 stand beside them.

    A model writes behind `lengths` and leaves them as they are; `advance` then says how many of the tokens written
    count. So rows of different lengths may be fed padded on the right: what comes next overwrites the padding.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch < 1 or capacity < 1:
            raise ValueError(f"KVCache: expected a batch and a capacity of at least 1, got {batch} and {capacity}")
        shape = (batch, capacity, config.n_kv_head, config.head_dim)
        self.k = [_room(shape, dtype, device) for _ in range(config.n_layer)]
        self.v = [_room(shape, dtype, device) for _ in range(config.n_layer)]
        self.k_scale: Scales = None
        self.v_scale: Scales = None
        if dtype == torch.int8:
            self.k_scale = [_room(shape[:3], torch.float32, device) for _ in range(config.n_layer)]
            self.v_scale = [_room(shape[:3], torch.float32, device) for _ in range(config.n_layer)]
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.config = config

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.k[0].dtype

    @property
    def capacity(self) -> int:
        """Tokens that a row has room for."""
        return self.k[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        """All keys and values, and their scales."""
        for kind in (self.k, self.v, self.k_scale, self.v_scale):
            yield from kind or ()

    def _each(self, f: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], list[Tensor], Scales, Scales]:
        scales = [None if kind is None else [f(t) for t in kind] for kind in (self.k_scale, self.v_scale)]
        return [f(t) for t in self.k], [f(t) for t in self.v], scales[0], scales[1]

    def advance(self, tokens: Tensor | int) -> None:
        """Counts so many more tokens in each row: one number, or (batch,) of them."""
        self.lengths += tokens

    def truncate(self, lengths: Tensor | int) -> None:
        """Forgets what lies beyond these lengths: one number, or (batch,) of them."""
        self.lengths.copy_(torch.minimum(self.lengths, torch.as_tensor(lengths, dtype=torch.int32)))

    def reset(self) -> None:
        """Forgets everything."""
        self.lengths.zero_()

    def select(self, rows: Sequence[int] | Tensor) -> KVCache:
        """A new cache made of these rows in this order; a row may stand there several times, or not at all."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.lengths.device)
        if index.dim() != 1 or index.numel() == 0:
            raise ValueError(f"KVCache.select: expected at least one row, got {tuple(index.shape)}")
        other = KVCache.__new__(KVCache)
        other.config = self.config
        other.lengths = self.lengths[index]
        used = int(other.lengths.max())

        def chosen(t: Tensor) -> Tensor:
            out = _room((index.numel(), *t.shape[1:]), t.dtype, t.device)
            out[:, :used] = t[index, :used]
            return out

        other.k, other.v, other.k_scale, other.v_scale = self._each(chosen)
        return other

    def row(self, b: int) -> KVCache:
        """Row b as a cache of its own that shares this one's memory and length."""
        return self.rows(b, b + 1)

    def rows(self, begin: int, end: int) -> KVCache:
        """The rows begin .. end - 1 as a cache of their own that shares this one's memory and lengths."""
        other = KVCache.__new__(KVCache)
        other.config = self.config
        other.lengths = self.lengths[begin:end]
        other.k, other.v, other.k_scale, other.v_scale = self._each(lambda t: t[begin:end])
        return other

    def share(self, begin: int, end: int) -> None:
        """Every row gets what row 0 holds of the places begin .. end - 1, and the length `end`. What lies before is
        the same in all rows already."""
        per_token = self.config.n_kv_head * self.config.head_dim
        pieces = range(begin, end, max(1, ALONE // per_token))
        for t in self.tensors():
            for row in t[1:]:
                for start in pieces:
                    place = slice(start, min(start + pieces.step, end))
                    row[place] = t[0, place]
        self.lengths.fill_(end)

    def grow(self, capacity: int) -> None:
        """Makes room for `capacity` tokens in each row, keeping what is there; views from `rows` are cut loose."""
        if capacity <= self.capacity:
            return
        used = int(self.lengths.max())
        for tensors in (self.k, self.v, self.k_scale or [], self.v_scale or []):
            for i, t in enumerate(tensors):
                tensors[i] = _room((t.shape[0], capacity, *t.shape[2:]), t.dtype, t.device)
                tensors[i][:, :used] = t[:, :used]


def _room(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """(batch, capacity, Hk, D) or (batch, capacity, Hk), stored head by head."""
    B, S, Hk, *rest = shape
    # Zeros, not empty: a masked key's weight is 0, and 0 times the NaN of fresh memory would not be.
    room = torch.empty((B, Hk, S, *rest), dtype=dtype, device=device)
    if room.is_cpu and room.nbytes < SMALL:
        ctypes.memset(room.data_ptr(), 0, room.nbytes)
    else:
        room.zero_()
    return room.transpose(1, 2)
