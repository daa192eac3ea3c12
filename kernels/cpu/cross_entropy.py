from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptfast import _cpu
from gptfast.kernels.cpu import DTYPES, empty, pointer, rows, threads, unsupported

CHUNK = 384  # rows whose logits exist at a time: a block of them and of W stay in L2
PARTS = 32  # of the vocabulary, each with its own sum for dx
BLOCK, PANEL, TILE = 192, 16, 24  # vocabulary.h: columns of a block, of a panel; every tile's height divides the last
GROUP = 48  # every group of columns or of elements of x divides it


def fields(arguments: dict[str, Any]) -> dict[str, Any]:
    """A launch's fields, each tensor as its address."""
    return {name: pointer(x) if x is None or isinstance(x, Tensor) else x for name, x in arguments.items()}


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
        # PyTorch's memory, which goes back to the system: kept, it would wait beside the backward's copies.
        room = torch.empty(self.blocks * BLOCK * step, dtype=torch.float32) if kept else None
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
        self.dx = torch.zeros(x.shape) if dx else None
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
    if t.numel() <= 16384:
        return t.sum(dtype=torch.float64)
    return torch.stack([piece.sum(dtype=torch.float64) for piece in t.split(16384)]).sum()


def reciprocal(n: int) -> Tensor:
    """1 / n, of a double rounded to fp32; infinite where n is 0."""
    return torch.tensor(1 / n if n else torch.inf, dtype=torch.float32)


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
        self.weights: Tensor | None = None  # of each row; None: 1
        if class_weight is not None:
            self.weights = class_weight[target.clamp(min=0)]
        if counts is not None:
            self.weights = torch.where(counts, 1.0 if self.weights is None else self.weights, 0.0)
        self.rows = rows if counts is None else int(counts.sum())
        self.share = label_smoothing / cols
        self.whole = float(cols) if class_weight is None else total(class_weight).item()
        self.per_row = self.per_z = reciprocal(self.rows if reduction == "mean" else 1)
        if reduction == "mean" and class_weight is not None and self.weights is not None:
            self.per_row = (1 / total(self.weights)).float()

    def of(self, part: slice, got: Rows) -> tuple[Tensor, Tensor | None]:
        """The cross-entropy of each row, and z_loss * lse^2, where there is one."""
        ce = got.nll
        if self.weights is not None:
            ce = (1 - self.smoothing) * self.weights[part] * ce
        elif self.smoothing:
            ce = (1 - self.smoothing) * ce
        if self.smoothing:
            ce = ce + self.share * got.smooth
        return ce, self.z_loss * got.lse**2 if self.z_loss else None

    def reduced(self, ce: Tensor, z: Tensor | None) -> Tensor:
        """What they add to a mean or a sum, in fp64."""
        of_rows = total(ce * self.per_row)
        return of_rows if z is None else of_rows + total(z * self.per_z)

    def coefficients(self, part: slice, got: Rows, upstream: Tensor | None) -> dict[str, Tensor]:
        """Those of vocabulary.h's Gradient. upstream (rows): the gradients of the losses; None = 1."""
        rows = got.lse.shape
        per_row, per_z = (self.per_row, self.per_z) if upstream is None else (upstream, upstream)
        hit = per_row * (1 - self.smoothing) if self.smoothing else per_row
        hit = hit.expand(rows).contiguous() if self.weights is None else hit * self.weights[part]
        even, scale = torch.zeros(rows), hit
        if self.smoothing:
            even = (per_row * self.share).expand(rows).contiguous()
            scale = hit + even * self.whole
        if self.z_loss:
            scale = scale + 2 * self.z_loss * got.lse * per_z
        return {"lse": got.lse, "rest": got.rest, "scale": scale, "even": even, "hit": hit}


def supports_linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, **_: Any) -> str | None:
    return unsupported(x, weight, bias, backward=True)


supports_linear_cross_entropy_forward = supports_linear_cross_entropy_backward = supports_linear_cross_entropy


def linear_cross_entropy(**arguments: Any) -> Tensor:
    return _linear_cross_entropy((False, False, False), None, **arguments)[0]


def linear_cross_entropy_forward(wants: Sequence[bool], reduction: str, **arguments: Any) -> tuple[Tensor, ...]:
    """The loss and, if it is a scalar, the gradients that `wants` asks for, in fp32; else empty."""
    made = (False, False, False) if reduction == "none" else wants
    loss, *found = _linear_cross_entropy(made, None, reduction=reduction, **arguments)
    return loss, *(loss.new_empty(0) if g is None else g for g in found)


def linear_cross_entropy_backward(
    upstream: Sequence[Tensor],
    wants: Sequence[bool],
    made_x: Tensor,
    made_weight: Tensor,
    made_bias: Tensor,
    reduction: str,
    **arguments: Any,
) -> list[Tensor]:
    """The gradients of x, weight and bias, empty where nobody wants them. made_*: what the forward pass made."""
    inputs = [arguments[name] for name in ("x", "weight", "bias")]
    found: Sequence[Tensor | None] = (made_x, made_weight, made_bias)
    scalar = reduction != "none"
    if any(want and made.shape != t.shape for want, made, t in zip(wants, found, inputs)):
        of_rows = None if scalar else upstream[0]
        found = _linear_cross_entropy(wants, of_rows, reduction=reduction, **arguments)[1:]
    factor = upstream[0].float() if scalar else None
    return [rounded(g if want else None, t, factor) for g, want, t in zip(found, wants, inputs)]


def rounded(gradient: Tensor | None, like: Tensor | None, factor: Tensor | None = None) -> Tensor:
    """gradient * factor in the dtype of the tensor that it is of; empty where there is none."""
    if gradient is None or like is None:
        return torch.empty(0, dtype=torch.float32 if like is None else like.dtype)
    if factor is None:
        return gradient.to(like.dtype)
    return torch.mul(gradient, factor, out=empty(like.shape, like.dtype))


def _linear_cross_entropy(
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
    """The loss and, of x, weight and bias, the gradients that `wants` asks for, in fp32.

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
            losses[rows] = ce if z is None else ce + z
        else:
            losses += loss.reduced(ce, z)
        if room is not None:
            of_rows = upstream[part] if upstream is not None else None
            made.add_rows(room, rows, ids, loss.coefficients(part, got, of_rows))
    if reduction == "mean" and loss.rows == 0:
        losses.fill_(torch.nan)
    return losses.float().reshape(target.shape if reduction == "none" else ()), *made.results()


def supports_cross_entropy(logits: Tensor, **_: Any) -> str | None:
    return unsupported(logits, backward=True)


supports_cross_entropy_forward = supports_cross_entropy_backward = supports_cross_entropy


def cross_entropy(**arguments: Any) -> Tensor:
    return cross_entropy_forward((False,), **arguments)[0]


def cross_entropy_forward(
    wants: Sequence[bool],
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and lse and rest of each row."""
    common, loss, block_weight = _rows(
        logits, target, class_weight, ignore_index, label_smoothing, z_loss, softcap, reduction
    )
    lse, rest, nll, smooth = (torch.empty(target.numel()) for _ in range(4))
    made = Rows(lse, rest, nll, smooth, entropy=nll)  # which nobody asks for
    _cpu.cross_entropy(
        threads(logits.numel()),
        **fields(common),
        lse=made.lse.data_ptr(),
        rest=made.rest.data_ptr(),
        nll=made.nll.data_ptr(),
        smooth=made.smooth.data_ptr() if label_smoothing > 0 else 0,
        block_weight=pointer(block_weight),
    )
    ce, z = loss.of(slice(None), made)
    if reduction == "none":
        return (ce if z is None else ce + z).reshape(target.shape), made.lse, made.rest
    mean_of_none = reduction == "mean" and loss.rows == 0
    return torch.tensor(torch.nan) if mean_of_none else loss.reduced(ce, z).float(), made.lse, made.rest


def cross_entropy_backward(
    upstream: Sequence[Tensor], wants: Sequence[bool], lse: Tensor, rest: Tensor, **arguments: Any
) -> list[Tensor]:
    """The gradient of the logits."""
    logits, (g,) = arguments["logits"], upstream
    common, loss, _ = _rows(**arguments)
    per_row = g.reshape(-1).float() if loss.reduction == "none" else None
    found = loss.coefficients(slice(None), Rows(lse, rest, lse, lse, lse), per_row)
    if per_row is None:
        found |= {name: found[name] * g.float() for name in ("scale", "even", "hit")}
    dlogits = empty(logits.shape, logits.dtype)
    _cpu.cross_entropy_backward(threads(logits.numel()), **fields(common), **fields(found), dlogits=dlogits.data_ptr())
    return [dlogits]


def _rows(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> tuple[dict[str, Any], Loss, Tensor | None]:
    """What both launches over rows of logits take, their loss, and the sums of the blocks' class weights."""
    flat, cols = target.reshape(-1), logits.shape[-1]
    counts, ids = None, flat.int()
    if flat.numel() and (ignore_index >= 0 or flat.min().item() < 0):
        counts = flat != ignore_index
        ids = torch.where(counts, flat, -1).int()
    logits, stride = rows(logits.reshape(-1, cols))
    weights, block_weight = class_weights(class_weight)
    common = dict(
        logits=logits,
        target=ids,
        class_weight=weights,
        rows=flat.shape[0],
        cols=cols,
        logits_stride=stride,
        softcap=softcap,
        dtype=DTYPES[logits.dtype],
    )
    return common, Loss(ids, counts, cols, weights, label_smoothing, z_loss, reduction), block_weight
