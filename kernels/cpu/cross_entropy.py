from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptfast import _cpu
from gptfast.kernels.cpu import DTYPES, empty, pointer, rows, threads, unsupported

CHUNK = int(os.environ.get("CHUNK", 384))  # rows whose logits exist at a time
PARTS = int(os.environ.get("PARTS", 32))  # of the vocabulary, each with its own sum for dx
BLOCK, PANEL, TILE = 192, 16, 24  # vocabulary.h: columns of a block, of a panel; every tile's height divides the last
GROUP = 48  # every group of columns or of elements of x divides it


def ceil(n: int, to: int) -> int:
    return (n + to - 1) // to * to


@dataclass
class Head:
    """x (rows, C) against weight (V, C): one chunk of rows after another, their logits and what the gradients need."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    class_weight: Tensor | None
    softcap: float
    inverse_temperature: float = 1.0

    def __post_init__(self) -> None:
        self.x, x_stride = rows(self.x.reshape(-1, self.x.shape[-1]))
        self.weight, weight_stride = rows(self.weight)
        self.bias = None if self.bias is None else self.bias.contiguous()
        self.cols, self.depth = self.weight.shape
        self.blocks = (self.cols + BLOCK - 1) // BLOCK
        self.block_weight = None
        if self.class_weight is not None:
            self.class_weight = self.class_weight.float().contiguous()
            padded = torch.nn.functional.pad(self.class_weight, (0, self.blocks * BLOCK - self.cols))
            self.block_weight = padded.view(-1, BLOCK).sum(1)
        self.threads = threads(self.cols * self.depth)
        self.common = dict(
            x=self.x.data_ptr(),
            weight=self.weight.data_ptr(),
            class_weight=pointer(self.class_weight),
            depth=self.depth,
            cols=self.cols,
            x_stride=x_stride,
            weight_stride=weight_stride,
            softcap=self.softcap,
            inverse_temperature=self.inverse_temperature,
            dtype=DTYPES[self.x.dtype],
        )

    def chunks(self, count: int) -> Iterator[slice]:
        """Runs of at most CHUNK rows, as equal as whole tiles allow."""
        if count:
            chunks = (count + CHUNK - 1) // CHUNK
            step = ceil((count + chunks - 1) // chunks, TILE)
            yield from (slice(begin, min(begin + step, count)) for begin in range(0, count, step))

    def logits(self, index: Tensor, target: Tensor | None, kept: Tensor | None, smooth: bool, entropy: bool) -> Rows:
        """The statistics of rows `index` (int64); their logits stay in `kept` if it is given."""
        count, padded = index.shape[0], ceil(index.shape[0], TILE)
        made = [torch.empty(count if want else 0) for want in (True, target is not None, smooth, entropy)]
        lse, nll, smoothed, entropies = made
        tiles = empty((padded * self.depth,), torch.float32)
        stats = empty((4 * count * self.blocks,), torch.float32)
        at_target = torch.empty(count)
        _cpu.vocabulary_logits(
            self.threads,
            **self.common,
            logits=pointer(kept),
            tiles=tiles.data_ptr(),
            stats=stats.data_ptr(),
            at_target=at_target.data_ptr(),
            lse=lse.data_ptr(),
            nll=nll.data_ptr() if target is not None else 0,
            smooth=smoothed.data_ptr() if smooth else 0,
            entropy=entropies.data_ptr() if entropy else 0,
            bias=pointer(self.bias),
            index=index.data_ptr(),
            target=pointer(target),
            block_weight=pointer(self.block_weight),
            rows=count,
            padded=padded,
        )
        return Rows(lse, nll, smoothed, entropies)

    def room(self, count: int) -> Tensor:
        """For the logits of so many rows."""
        return empty((self.blocks * BLOCK * ceil(count, TILE),), torch.float32)


@dataclass
class Rows:
    lse: Tensor
    nll: Tensor
    smooth: Tensor
    entropy: Tensor


class Gradients:
    """dx, dweight and dbias of a head, of those that are wanted, summed over chunks of rows."""

    def __init__(self, head: Head, wants: tuple[bool, bool, bool]) -> None:
        self.head, self.add = head, False
        (dx, dweight, dbias), x = wants, head.x
        self.dx = torch.zeros(x.shape, dtype=x.dtype) if dx else None
        self.dweight = empty((head.cols, head.depth), torch.float32) if dweight else None
        self.dbias = torch.empty(head.cols) if dbias else None
        self.parts = min(PARTS, head.blocks)

    def workspaces(self, count: int) -> None:
        depth = ceil(self.head.depth, GROUP)
        self.panels = empty((count * depth if self.dweight is not None else 0,), torch.float32)
        self.dx_parts = empty((self.parts * ceil(count, TILE) * depth if self.dx is not None else 0,), torch.float32)

    def add_rows(
        self, logits: Tensor, index: Tensor, target: Tensor, rows: dict[str, Tensor] | None
    ) -> None:
        """rows: lse, scale, slope, even and hit, (rows) each; None where logits hold their gradient already."""
        head, count = self.head, index.shape[0]
        if not self.add:
            self.workspaces(count)
        _cpu.vocabulary_gradients(
            head.threads,
            **head.common,
            **{name: t.data_ptr() for name, t in (rows or {}).items()},
            logits=logits.data_ptr(),
            dx=pointer(self.dx),
            dweight=pointer(self.dweight),
            dbias=pointer(self.dbias),
            panels=self.panels.data_ptr(),
            dx_parts=self.dx_parts.data_ptr(),
            index=index.data_ptr(),
            target=target.data_ptr(),
            rows=count,
            padded=ceil(count, TILE),
            parts=self.parts,
            made=rows is None,
            add=self.add,
        )
        self.add = True


def supports_linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, **_: Any) -> str | None:
    return unsupported(x, weight, bias)


def linear_cross_entropy(**arguments: Any) -> Tensor:
    return linear_cross_entropy_gradients((False, False, False), None, **arguments)[0]


def linear_cross_entropy_gradients(
    wants: tuple[bool, bool, bool],
    upstream: Tensor | None,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The loss and, of x, weight and bias, the gradients that `wants` asks for. upstream: the gradient of each row's
    loss where reduction is "none"; else that of the loss is taken for 1."""
    head = Head(x, weight, bias, class_weight, softcap)
    flat = target.reshape(-1)
    index = (flat != ignore_index).nonzero().squeeze(1)
    chosen = flat[index]
    count, smoothing = index.shape[0], label_smoothing / head.cols
    weights = torch.ones(count) if head.class_weight is None else head.class_weight[chosen]
    whole = float(head.cols) if head.class_weight is None else head.class_weight.sum(dtype=torch.float64).item()
    per_row, per_z = torch.ones(()), torch.ones(())
    if reduction == "mean":
        per_row, per_z = 1 / weights.sum(dtype=torch.float64).float(), torch.tensor(1 / max(count, 1))
    elif reduction == "none" and upstream is not None:
        per_row = per_z = upstream.reshape(-1)[index].float()
    losses = torch.zeros(flat.shape[0]) if reduction == "none" else torch.zeros((), dtype=torch.float64)
    made, room = Gradients(head, wants), None
    for part in head.chunks(count):
        rows, ids, w = index[part], chosen[part].int(), weights[part]
        if any(wants) and room is None:
            room = head.room(rows.shape[0])
        got = head.logits(rows, ids, room, label_smoothing > 0, False)
        loss = (1 - label_smoothing) * w * got.nll
        if label_smoothing > 0:
            loss += smoothing * got.smooth
        if reduction == "none":
            losses[rows] = loss + z_loss * got.lse**2 if z_loss else loss
        else:
            losses += (loss * per_row).sum(dtype=torch.float64)
            if z_loss:
                losses += (z_loss * got.lse**2 * per_z).sum(dtype=torch.float64)
        if room is None:
            continue
        s, z = (p[part] if p.dim() else p.expand(rows.shape[0]) for p in (per_row, per_z))
        hit = s * (1 - label_smoothing) * w
        even = s * smoothing
        made.add_rows(
            room,
            rows,
            ids,
            dict(
                lse=got.lse,
                scale=hit + even * whole + 2 * z_loss * got.lse * z,
                slope=torch.zeros(rows.shape[0]),
                even=even,
                hit=hit,
            ),
        )
    if reduction == "mean" and count == 0:
        losses.fill_(torch.nan)
    return losses.float(), made.dx, made.dweight, made.dbias
