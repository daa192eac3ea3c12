from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
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


def class_weights(w: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """In fp32, and the sum of each block."""
    if w is None:
        return None, None
    w = w.float().contiguous()
    return w, torch.nn.functional.pad(w, (0, -w.shape[0] % BLOCK)).view(-1, BLOCK).sum(1)


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
        self.shape = self.x.shape
        self.x, x_stride = rows(self.x.reshape(-1, self.x.shape[-1]))
        self.weight, weight_stride = rows(self.weight)
        self.bias = None if self.bias is None else self.bias.contiguous()
        self.cols, self.depth = self.weight.shape
        self.blocks = (self.cols + BLOCK - 1) // BLOCK
        self.class_weight, self.block_weight = class_weights(self.class_weight)
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

    def chunks(self, count: int, kept: bool) -> Iterator[tuple[slice, Tensor | None]]:
        """Runs of at most CHUNK rows, as equal as whole tiles allow, and room for their logits if they are kept."""
        if count == 0:
            return
        chunks = (count + CHUNK - 1) // CHUNK
        step = ceil((count + chunks - 1) // chunks, TILE)
        room = empty((self.blocks * BLOCK * step,), torch.float32) if kept else None
        for begin in range(0, count, step):
            yield slice(begin, min(begin + step, count)), room

    def logits(self, index: Tensor, target: Tensor | None, kept: Tensor | None, smooth: bool, entropy: bool) -> Rows:
        """The statistics of rows `index` (int64); their logits stay in `kept` if it is given."""
        count, padded = index.shape[0], ceil(index.shape[0], TILE)
        made = Rows(*torch.empty(5, count))
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
            lse=made.lse.data_ptr(),
            rest=made.rest.data_ptr(),
            nll=made.nll.data_ptr(),
            smooth=made.smooth.data_ptr() if smooth else 0,
            entropy=made.entropy.data_ptr() if entropy else 0,
            bias=pointer(self.bias),
            index=index.data_ptr(),
            target=pointer(target),
            block_weight=pointer(self.block_weight),
            rows=count,
            padded=padded,
        )
        return made


@dataclass
class Rows:
    """The statistics of rows, (rows) each: see vocabulary.h. Those that weren't asked for hold nothing."""

    lse: Tensor
    rest: Tensor
    nll: Tensor
    smooth: Tensor
    entropy: Tensor


class Gradients:
    """dx, dweight and dbias of a head, of those that are wanted, summed over chunks of rows."""

    def __init__(self, head: Head, wants: Sequence[bool]) -> None:
        self.head, self.add = head, False
        (dx, dweight, dbias), x = wants, head.x
        self.dx = torch.zeros(x.shape, dtype=x.dtype) if dx else None
        self.dweight = empty((head.cols, head.depth), torch.float32) if dweight else None
        self.dbias = torch.empty(head.cols) if dbias else None
        self.parts = min(PARTS, head.blocks)

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dx, dweight, dbias: zero where there were no rows."""
        if not self.add:
            for t in (self.dweight, self.dbias):
                if t is not None:
                    t.zero_()
        dx = None if self.dx is None else self.dx.reshape(self.head.shape)
        return dx, self.dweight, self.dbias

    def workspaces(self, count: int) -> None:
        depth = ceil(self.head.depth, GROUP)
        self.panels = empty((count * depth if self.dweight is not None else 0,), torch.float32)
        self.dx_parts = empty((self.parts * ceil(count, TILE) * depth if self.dx is not None else 0,), torch.float32)

    def add_rows(
        self, logits: Tensor, index: Tensor, target: Tensor | None, coefficients: dict[str, Tensor] | None
    ) -> None:
        """coefficients: of vocabulary.h's Gradient, (rows) each; None where logits hold their gradient already."""
        head, count = self.head, index.shape[0]
        if not self.add:
            self.workspaces(count)
        _cpu.vocabulary_gradients(
            head.threads,
            **head.common,
            **fields(coefficients or {}),
            logits=logits.data_ptr(),
            dx=pointer(self.dx),
            dweight=pointer(self.dweight),
            dbias=pointer(self.dbias),
            panels=self.panels.data_ptr(),
            dx_parts=self.dx_parts.data_ptr(),
            index=index.data_ptr(),
            target=pointer(target),
            rows=count,
            padded=ceil(count, TILE),
            parts=self.parts,
            made=coefficients is None,
            add=self.add,
        )
        self.add = True


def total(t: Tensor) -> Tensor:
    """The sum in fp64, in an order that the number of threads doesn't change: PyTorch's own sum shares out more."""
    return torch.stack([piece.sum(dtype=torch.float64) for piece in t.split(16384)]).sum()


class Loss:
    """The losses of rows from their statistics, and the coefficients of their gradients. target (rows)."""

    def __init__(
        self,
        target: Tensor,
        counts: Tensor | None,
        cols: int,
        class_weight: Tensor | None,
        label_smoothing: float,
        z_loss: float,
        reduction: str,
    ) -> None:
        """counts: which rows count, None = all."""
        rows = target.shape[0]
        self.smoothing, self.z_loss, self.reduction = label_smoothing, z_loss, reduction
        self.weights = torch.ones(rows) if class_weight is None else class_weight[target.clamp(min=0)]
        if counts is not None:
            self.weights = torch.where(counts, self.weights, 0.0)
        self.rows = rows if counts is None else int(counts.sum())
        self.share = label_smoothing / cols
        self.whole = float(cols) if class_weight is None else total(class_weight).item()
        self.per_row, self.per_z = torch.ones(()), torch.ones(())
        if reduction == "mean":
            self.per_row, self.per_z = (1 / total(self.weights)).float(), (1 / torch.tensor(float(self.rows)))

    def of(self, part: slice, got: Rows) -> tuple[Tensor, Tensor]:
        """The cross-entropy of each row, and z_loss * lse^2."""
        ce = (1 - self.smoothing) * self.weights[part] * got.nll
        if self.smoothing:
            ce += self.share * got.smooth
        return ce, self.z_loss * got.lse**2

    def reduced(self, ce: Tensor, z: Tensor) -> Tensor:
        """What they add to a mean or a sum, in fp64."""
        return total(ce * self.per_row) + (total(z * self.per_z) if self.z_loss else 0)

    def coefficients(self, part: slice, got: Rows, upstream: Tensor | None) -> dict[str, Tensor]:
        """Those of vocabulary.h's Gradient. upstream (rows): the gradients of the losses; None = 1."""
        weights = self.weights[part]
        per_row, per_z = (self.per_row, self.per_z) if upstream is None else (upstream, upstream)
        hit = per_row * (1 - self.smoothing) * weights
        even = (per_row * self.share).expand(weights.shape).contiguous()
        scale = hit + even * self.whole
        if self.z_loss:
            scale = scale + 2 * self.z_loss * got.lse * per_z
        return {"lse": got.lse, "rest": got.rest, "scale": scale, "even": even, "hit": hit}


def supports_linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, **_: Any) -> str | None:
    return unsupported(x, weight, bias)


def linear_cross_entropy(**arguments: Any) -> Tensor:
    return linear_cross_entropy_gradients((False, False, False), None, **arguments)[0]


def linear_cross_entropy_gradients(
    wants: Sequence[bool],
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
    """The loss and, of x, weight and bias, the gradients that `wants` asks for: dx in x's dtype, the others in fp32.

    upstream: the gradients of the rows' losses where reduction is "none"; that of a scalar loss is taken for 1.
    """
    head = Head(x, weight, bias, class_weight, softcap)
    flat = target.reshape(-1)
    index = (flat != ignore_index).nonzero().squeeze(1)
    chosen = flat[index]
    loss = Loss(chosen, None, head.cols, head.class_weight, label_smoothing, z_loss, reduction)
    if upstream is not None:
        upstream = upstream.reshape(-1)[index].float()
    losses = torch.zeros(flat.shape[0]) if reduction == "none" else torch.zeros((), dtype=torch.float64)
    made = Gradients(head, wants)
    for part, room in head.chunks(index.shape[0], any(wants)):
        rows, ids = index[part], chosen[part].int()
        got = head.logits(rows, ids, room, label_smoothing > 0, False)
        ce, z = loss.of(part, got)
        if reduction == "none":
            losses[rows] = ce + z
        else:
            losses += loss.reduced(ce, z)
        if room is not None:
            of_rows = upstream[part] if upstream is not None else None
            made.add_rows(room, rows, ids, loss.coefficients(part, got, of_rows))
    if reduction == "mean" and loss.rows == 0:
        losses.fill_(torch.nan)
    return losses.float().reshape(target.shape if reduction == "none" else ()), *made.results()


def supports_cross_entropy(logits: Tensor, **_: Any) -> str | None:
    return unsupported(logits)


supports_cross_entropy_backward = supports_cross_entropy


def _statistics(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> tuple[Rows, Loss, dict[str, Any]]:
    flat = target.reshape(-1)
    counts, cols = flat != ignore_index, logits.shape[-1]
    logits, stride = rows(logits.reshape(-1, cols))
    ids = torch.where(counts, flat, -1).int()
    class_weight, block_weight = class_weights(class_weight)
    made = Rows(*torch.empty(5, flat.shape[0]))
    common = dict(
        logits=logits,
        target=ids,
        class_weight=class_weight,
        rows=flat.shape[0],
        cols=cols,
        logits_stride=stride,
        softcap=softcap,
        dtype=DTYPES[logits.dtype],
    )
    _cpu.cross_entropy(
        threads(logits.numel()),
        **fields(common),
        lse=made.lse.data_ptr(),
        rest=made.rest.data_ptr(),
        nll=made.nll.data_ptr(),
        smooth=made.smooth.data_ptr() if label_smoothing > 0 else 0,
        block_weight=pointer(block_weight),
    )
    loss = Loss(ids, counts, cols, class_weight, label_smoothing, z_loss, reduction)
    return made, loss, common


def fields(arguments: dict[str, Any]) -> dict[str, Any]:
    """A launch's fields, each tensor as its address."""
    return {name: pointer(x) if x is None or isinstance(x, Tensor) else x for name, x in arguments.items()}


def cross_entropy(target: Tensor, reduction: str, **arguments: Any) -> Tensor:
    made, loss, _ = _statistics(target=target, reduction=reduction, **arguments)
    ce, z = loss.of(slice(None), made)
    return (ce + z).reshape(target.shape) if reduction == "none" else loss.reduced(ce, z).float()


def cross_entropy_backward(upstream: Tensor, logits: Tensor, **arguments: Any) -> Tensor:
    """The gradient of the logits. upstream: of the loss, (rows) or a scalar."""
    made, loss, common = _statistics(logits=logits, **arguments)
    per_row = upstream.reshape(-1).float() if loss.reduction == "none" else None
    coefficients = loss.coefficients(slice(None), made, per_row)
    if per_row is None:
        coefficients = {name: x if name in ("lse", "rest") else x * upstream.float() for name, x in coefficients.items()}
    dlogits = empty(logits.shape, logits.dtype)
    _cpu.cross_entropy_backward(
        threads(logits.numel()), **fields(common), **fields(coefficients), dlogits=dlogits.data_ptr()
    )
    return dlogits
