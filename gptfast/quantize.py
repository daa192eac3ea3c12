"""Quantised weights: GGUF's Q8_0, Q4_0 and Q4_1 blocks of 32, in the layout that the linear kernels read.

A weight (N, K) is kept as panels of 16 rows: packed (ceil(N / 16), K / 32, bytes) uint8, where one (panel, group) holds

    d  fp16[16]                 the scales of the 16 rows
    m  fp16[16]                 Q4_1 only: the minima
    q  uint8[4 or 8][16][4]     quads: 4 consecutive k of 16 rows in 64 bytes. Q8_0 stores q + 128. A 4-bit byte has
                                quad j in its low nibble, quad j + 4 in the high one: k = 4j + e and 16 + 4j + e

so that one 64-byte load feeds 16 integer dot products. No bit is lost or added: `to_blocks` gives the file's blocks
back. The values are d * q, d * (q - 8) and d * q + m (gptfast.formats.blocks).

Float weights have a layout of their own, PackedWeight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptfast.formats import blocks
from gptfast.kernels import reason_missing

PANEL, GROUP = 16, 32
OFFSET = -0x7F7F7F80  # int32 0x80808080: the top bit of each byte, which makes q + 128 of q and the other way round


class Kind(NamedTuple):
    """One quantised format, its sizes in bytes."""

    format: str  # its name in gptfast.formats.blocks
    code: int  # its number in kernels/cpu/linear.h
    halves: int  # fp16 values of a block: d, or d and m
    quads: int  # 4-byte pieces of a block's quants

    @property
    def block(self) -> int:
        return 2 * self.halves + 4 * self.quads


KINDS = {"q8_0": Kind("Q8_0", 3, 1, 8), "q4_0": Kind("Q4_0", 4, 1, 4), "q4_1": Kind("Q4_1", 5, 2, 4)}


class Memory:
    """Memory for a model's packed weights, in pieces of 32 MiB: large pages, which small allocations don't get.

    The weights made in it hold nothing before `finish`, which packs them all in one call: between two calls another
    thread would keep Python to itself for longer than a call takes.
    """

    PIECE, LINE = 32 << 20, 64

    def __init__(self) -> None:
        self._piece: Tensor | None = None
        self._used = 0
        self._launches: list[tuple[str, int, dict[str, Any]]] = []
        self._read: list[Tensor] = []
        self.pending = 0  # bytes that `finish` would pack

    def later(self, launch: tuple[str, int, dict[str, Any]], read: Tensor) -> None:
        """Leaves a launch that packs `read` to `finish`."""
        self._launches.append(launch)
        self._read.append(read)
        self.pending += read.numel()

    def finish(self) -> None:
        """Packs what was left to be packed."""
        if self._launches:
            from gptfast.kernels.cpu.quantize import run

            run(self._launches)
        self._launches, self._read, self.pending = [], [], 0

    def empty(self, shape: Sequence[int]) -> Tensor:
        """uint8 of this shape, its contents undefined; its piece lives as long as anything in it."""
        from gptfast.kernels.cpu import empty

        size = math.prod(shape)
        if self._piece is None or self._used + size > self._piece.numel():
            self._piece, self._used = empty((max(size, self.PIECE),), torch.uint8), 0
        begin, self._used = self._used, -(-(self._used + size) // self.LINE) * self.LINE
        return self._piece[begin : begin + size].view(*shape)


class QuantizedWeight:
    """A weight matrix (N, K) of a quantised kind, packed for the linear kernels. Immutable.

    Args:
        packed: (ceil(N / 16), K / 32, bytes of 16 blocks) uint8, as the top of this page says.
        kind: "q8_0", "q4_0" or "q4_1".
        shape: (N, K), K a multiple of 32.

    Raises:
        ValueError: an unknown kind, or sizes that don't fit.
    """

    def __init__(self, packed: Tensor, kind: str, shape: Sequence[int]) -> None:
        N, K = _check(kind, shape)
        expected = (-(-N // PANEL), K // GROUP, PANEL * KINDS[kind].block)
        if packed.dtype != torch.uint8 or tuple(packed.shape) != expected or not packed.is_contiguous():
            raise ValueError(f"expected packed {expected} uint8, contiguous, got {tuple(packed.shape)} {packed.dtype}")
        self.packed, self.kind, self.shape = packed, kind, torch.Size((N, K))
        self.code = KINDS[kind].code
        self.signature = (kind, self.shape, packed.device)  # for gptfast.ops.dispatch

    @property
    def nbytes(self) -> int:
        """Bytes of memory, which is what one product with the matrix reads."""
        return self.packed.numel()

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def __repr__(self) -> str:
        return f"QuantizedWeight({self.kind}, {tuple(self.shape)}, {self.nbytes} bytes on {self.device})"

    @staticmethod
    def from_blocks(raw: Tensor, kind: str, shape: Sequence[int], *, memory: Memory | None = None) -> QuantizedWeight:
        """Packs GGUF blocks as a file stores them: `raw` uint8 of N * K / 32 blocks, row after row. With `memory`, the
        packed bytes lie there, from its `finish` on."""
        N, K = _check(kind, shape)
        k = KINDS[kind]
        if raw.dtype != torch.uint8 or raw.numel() != N * (K // GROUP) * k.block:
            raise ValueError(
                f"expected {N * (K // GROUP) * k.block} bytes (uint8) for {kind} {(N, K)}, "
                f"got {raw.numel()} of {str(raw.dtype).removeprefix('torch.')}"
            )
        if raw.device.type == "cpu" and reason_missing("cpu") is None:
            return _packed_by_kernel([raw], kind, (N, K), memory, [0])
        expected = (-(-N // PANEL), K // GROUP, PANEL * k.block)
        rows = raw.reshape(N, K // GROUP, k.block)
        if N % PANEL:
            rows = torch.cat((rows, rows.new_zeros(PANEL - N % PANEL, *rows.shape[1:])))
        packed = torch.empty(expected, dtype=torch.uint8, device=raw.device)
        heads, quads = _parts(packed, k)
        scales = rows[..., : 2 * k.halves].contiguous().view(torch.int16)
        heads.copy_(scales.view(-1, PANEL, K // GROUP, k.halves).permute(0, 2, 3, 1))
        quants = rows[..., 2 * k.halves :].contiguous().view(torch.int32)
        if kind == "q8_0":
            quants = quants ^ OFFSET
        quads.copy_(quants.view(-1, PANEL, K // GROUP, k.quads).permute(0, 2, 3, 1))
        return QuantizedWeight(packed, kind, (N, K))

    @staticmethod
    def from_parts(
        parts: Sequence[Tensor],
        kind: str,
        shape: Sequence[int],
        *,
        heads: Sequence[int] = (),
        memory: Memory | None = None,
    ) -> QuantizedWeight:
        """from_blocks of matrices that stand one above the other, `shape` together, without stacking them first where
        their rows fill panels. heads: of each part, the number of heads whose rows are stored in pairs, which
        blocks.unpermuted would put in order; 0 where they are."""
        N, K = _check(kind, shape)
        heads = heads or [0] * len(parts)
        row = K // GROUP * KINDS[kind].block
        whole = all(p.numel() % (row * PANEL) == 0 for p in parts[:-1]) and sum(p.numel() for p in parts) == N * row
        if whole and all(p.is_cpu and p.dtype == torch.uint8 for p in parts) and reason_missing("cpu") is None:
            return _packed_by_kernel(parts, kind, (N, K), memory, heads)
        rows = [blocks.unpermuted(p.view(-1, row), h) if h else p for p, h in zip(parts, heads)]
        return QuantizedWeight.from_blocks(torch.cat([p.reshape(-1) for p in rows]), kind, shape, memory=memory)

    @staticmethod
    def quantize(weight: Tensor, kind: str) -> QuantizedWeight:
        """Quantises a float matrix (N, K) as ggml's reference quantisers do."""
        _check(kind, weight.shape)
        return QuantizedWeight.from_blocks(blocks.quantize(weight, KINDS[kind].format), kind, weight.shape)

    @staticmethod
    def cat(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """One matrix of all their rows in order; kinds and K must be the same."""
        if len({(w.kind, w.shape[1]) for w in weights}) != 1:
            raise ValueError(f"expected weights of one kind and one K, got {list(weights)}")
        first, N = weights[0], sum(w.shape[0] for w in weights)
        shape = (N, first.shape[1])
        if all(w.shape[0] % PANEL == 0 for w in weights[:-1]):
            return QuantizedWeight(torch.cat([w.packed for w in weights]), first.kind, shape)
        return QuantizedWeight.from_blocks(torch.cat([w.to_blocks() for w in weights]), first.kind, shape)

    def rows(self, begin: int, end: int) -> QuantizedWeight:
        """Rows [begin, end) as a matrix; without a copy where begin is a multiple of 16."""
        N, K = self.shape
        if not 0 <= begin < end <= N:
            raise ValueError(f"expected 0 <= begin < end <= {N}, got {begin} and {end}")
        if begin % PANEL == 0:
            return QuantizedWeight(self.packed[begin // PANEL : -(-end // PANEL)], self.kind, (end - begin, K))
        raw = self.to_blocks().view(N, -1)[begin:end]
        return QuantizedWeight.from_blocks(raw.reshape(-1), self.kind, (end - begin, K))

    def to_blocks(self) -> Tensor:
        """The GGUF blocks, (bytes,) uint8: the inverse of from_blocks."""
        return _to_rows(self.packed, self.kind)[: self.shape[0]].reshape(-1)

    def dequantize(self) -> Tensor:
        """The values, (N, K) fp32."""
        if self._kernel():
            return self._rows(None, self.shape[0])
        return blocks.dequantize(self.to_blocks(), KINDS[self.kind].format, self.shape)

    def moved(self, move: Callable[[Tensor], Tensor]) -> QuantizedWeight:
        """The same matrix where `move` puts its bytes."""
        return QuantizedWeight(move(self.packed), self.kind, self.shape)

    def embed(self, ids: Tensor, positions: Tensor | None = None, table: Tensor | None = None) -> Tensor:
        """Rows as an embedding: int64 ids (...) to (..., K) fp32; with positions (broadcast to ids, int64) and their
        table (P, K) fp32, the sum of both rows. Raises IndexError for an id that isn't a row."""
        _check_rows(self.shape[0], ids, positions, table)
        K = self.shape[1]
        if self._kernel() and ids.device.type == "cpu":
            places = None if positions is None else positions.expand(ids.shape).contiguous()
            return self._rows(ids.contiguous(), ids.numel(), places, table).view(*ids.shape, K)
        flat = ids.reshape(-1)
        panels = _to_rows(self.packed[flat // PANEL], self.kind).view(
            len(flat), PANEL, K // GROUP * KINDS[self.kind].block
        )
        chosen = panels[torch.arange(len(flat), device=ids.device), flat % PANEL].reshape(-1)
        x = blocks.dequantize(chosen, KINDS[self.kind].format, (len(flat), K)).view(*ids.shape, K)
        return x if table is None else x + table[positions]

    def _kernel(self) -> bool:
        return self.device.type == "cpu" and reason_missing("cpu") is None

    def _rows(
        self, ids: Tensor | None, count: int, positions: Tensor | None = None, table: Tensor | None = None
    ) -> Tensor:
        from gptfast.kernels.cpu.quantize import dequantize

        return dequantize(self.packed, self.code, self.shape[1], ids, count, positions, table)


def _check_rows(N: int, ids: Tensor, positions: Tensor | None, table: Tensor | None) -> None:
    if ids.dtype != torch.int64:
        raise ValueError(f"expected int64 ids, got {str(ids.dtype).removeprefix('torch.')}")
    if ids.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # nobody may wait for their values now
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= N):
        raise IndexError(f"expected ids in 0..{N - 1}, got {int(ids.min())}..{int(ids.max())}")
    if positions is not None and positions.numel() and table is not None:
        low, high, most = int(positions.min()), int(positions.max()), table.shape[0] - 1
        if low < 0 or high > most:
            raise IndexError(f"expected positions in 0..{most}, got {low}..{high}")


class PackedWeight:
    """A float matrix (N, K) in the layout that streams fastest through the linear kernels. Immutable; no bit is lost.

    Panels of 16 rows with those of one k side by side, so that a vector register holds outputs: packed
    (ceil(N / 16), K, 16) of the matrix's dtype, zeros in the rows beyond N.
    """

    def __init__(self, packed: Tensor, shape: Sequence[int]) -> None:
        N, K = shape
        expected = (-(-N // PANEL), K, PANEL)
        if tuple(packed.shape) != expected or not packed.is_floating_point() or not packed.is_contiguous():
            raise ValueError(f"expected packed {expected} of floats, contiguous, got {_shape(packed)}")
        self.packed, self.shape = packed, torch.Size((N, K))
        self.signature = (packed.dtype, self.shape, packed.device)  # for gptfast.ops.dispatch

    @staticmethod
    def pack(weight: Tensor) -> PackedWeight:
        """Packs a matrix (N, K) of float32, bfloat16 or float16."""
        if weight.dim() != 2 or 0 in weight.shape or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"expected a matrix (N, K) of float32, bfloat16 or float16, got {_shape(weight)}")
        (N, K), whole = weight.shape, weight.shape[0] // PANEL
        packed = _empty((-(-N // PANEL), K, PANEL), weight)
        packed[:whole] = weight[: whole * PANEL].reshape(whole, PANEL, K).transpose(1, 2)
        if N % PANEL:
            packed[whole] = 0
            packed[whole, :, : N % PANEL] = weight[whole * PANEL :].T
        return PackedWeight(packed, (N, K))

    def unpack(self) -> Tensor:
        """The matrix (N, K): the inverse of pack."""
        return self.packed.transpose(1, 2).reshape(-1, self.shape[1])[: self.shape[0]]

    def embed(self, ids: Tensor, positions: Tensor | None = None, table: Tensor | None = None) -> Tensor:
        """Rows as an embedding: int64 ids (...) to (..., K); with positions (broadcast to ids, int64) and their table
        (P, K) of this dtype, the sum of both rows, rounded once. Raises IndexError for an id that isn't a row."""
        _check_rows(self.shape[0], ids, positions, table)
        if self.device.type == ids.device.type == "cpu" and reason_missing("cpu") is None:
            from gptfast.kernels.cpu.embedding import embedding_packed

            return embedding_packed(ids, self.packed, positions, table)
        x = self.packed[ids // PANEL, :, ids % PANEL]
        return x if table is None else (x.float() + table[positions].float()).to(x.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.packed.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of memory, which is what one product with the matrix reads."""
        return self.packed.nbytes

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def __repr__(self) -> str:
        return f"PackedWeight({str(self.dtype).removeprefix('torch.')}, {tuple(self.shape)}, on {self.device})"


def _packed_by_kernel(
    parts: Sequence[Tensor], kind: str, shape: tuple[int, int], memory: Memory | None, heads: Sequence[int]
) -> QuantizedWeight:
    """Blocks (uint8, on the CPU) of matrices one above the other; the rows of all but the last fill panels."""
    from gptfast.kernels.cpu.quantize import pack

    (N, K), k, now = shape, KINDS[kind], Memory()
    sizes = (-(-N // PANEL), K // GROUP, PANEL * k.block)
    packed, row = torch.empty(sizes, dtype=torch.uint8) if memory is None else memory.empty(sizes), 0
    for part, n in zip(parts, heads):
        rows = part.numel() // (K // GROUP * k.block)
        (memory or now).later(*pack(packed[row // PANEL :], part, k.code, rows, K, rows // n if n else 0))
        row += rows
    now.finish()
    return QuantizedWeight(packed, kind, shape)


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """torch.empty, on large pages where the CPU's kernels will read it."""
    if like.device.type != "cpu" or reason_missing("cpu") is not None:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    from gptfast.kernels.cpu import empty

    return empty(shape, like.dtype)


def _shape(t: Tensor) -> str:
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"


def _check(kind: str, shape: Sequence[int]) -> tuple[int, int]:
    """(N, K) of a shape that the kind can have."""
    if kind not in KINDS:
        raise ValueError(f"expected a kind of {', '.join(KINDS)}, got {kind!r}")
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 1 or shape[1] % GROUP:
        raise ValueError(f"expected a shape (N, K) with K a multiple of {GROUP} for {kind}, got {tuple(shape)}")
    return shape[0], shape[1]


def _parts(packed: Tensor, k: Kind) -> tuple[Tensor, Tensor]:
    """Views of the packed bytes: scales (P, G, halves, 16) int16 and quads (P, G, quads, 16) int32."""
    heads = packed.view(torch.int16)[..., : PANEL * k.halves].unflatten(-1, (k.halves, PANEL))
    return heads, packed.view(torch.int32)[..., PANEL * k.halves // 2 :].unflatten(-1, (k.quads, PANEL))


def _to_rows(packed: Tensor, kind: str) -> Tensor:
    """Packed panels as (16 * panels, K / 32, bytes of a block)."""
    k, (P, G, _) = KINDS[kind], packed.shape
    heads, quads = _parts(packed, k)
    rows = torch.empty(P * PANEL, G, k.block, dtype=torch.uint8, device=packed.device)
    scales = torch.empty(P * PANEL, G, k.halves, dtype=torch.int16, device=packed.device)
    quants = torch.empty(P * PANEL, G, k.quads, dtype=torch.int32, device=packed.device)
    scales.view(P, PANEL, G, k.halves).copy_(heads.permute(0, 3, 1, 2))
    quants.view(P, PANEL, G, k.quads).copy_(quads.permute(0, 3, 1, 2))
    rows[..., : 2 * k.halves] = scales.view(torch.uint8)
    rows[..., 2 * k.halves :] = (quants ^ OFFSET if kind == "q8_0" else quants).view(torch.uint8)
    return rows
