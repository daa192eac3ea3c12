from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptfast.kernels.triton import cdiv, empty, launch, rows, unsupported
from gptfast.kernels.triton.product import padded, product, whole
from gptfast.kernels.triton.tiles import Tile, logits_rows, vocabulary_tile
from gptfast.kernels.triton.vocabulary import (
    _loss_scales_kernel,
    _sum_losses_kernel,
    _vocabulary_gradient_kernel,
    _vocabulary_rows_kernel,
)

SUMS = Tile(4, blocks={"BLOCK": 1024})  # one program for a sum over rows: no atomics, one order


@dataclass
class Loss:
    """What makes a row's loss of its logits, and the mean's factors."""

    target: Tensor
    class_weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    temperature: float = 1.0
    reduction: str = "none"

    def __post_init__(self) -> None:
        self.target = self.target.reshape(-1).contiguous()
        w = self.class_weight
        self.class_weight = None if w is None else w.contiguous()
        smooth = w is not None and self.label_smoothing > 0
        self.whole = w.sum(dtype=torch.float64).float() if smooth and w is not None else None
        self.scales = None
        if self.reduction == "mean":
            self.scales = empty((2,), torch.float32, self.target)
            launch(
                _loss_scales_kernel,
                (1,),
                *(self.target, self.class_weight, self.scales, self.target.shape[0], self.ignore_index),
                HAS_WEIGHT=w is not None,
                tile=SUMS,
            )

    def numbers(self) -> tuple[float, ...]:
        reals = (self.label_smoothing, self.z_loss, self.softcap, 1 / self.temperature)
        return self.ignore_index, *map(float, reals)

    def flags(self) -> dict[str, Any]:
        return {
            "HAS_WEIGHT": self.class_weight is not None,
            "IS_SMOOTH": self.label_smoothing > 0,
            "HAS_Z": self.z_loss > 0,
            "IS_CAPPED": self.softcap > 0,
            "IS_TEMPERED": self.temperature != 1,
        }

    def of(self, logits: Tensor, part: slice = slice(None), entropy: bool = False, losses: bool = True) -> Rows:
        """The losses and statistics of rows of logits (rows, V), whose targets are target[part]."""
        N, V = logits.shape
        made = Rows(*(empty((N,), torch.float32, logits) for _ in range(3 + entropy)))
        launch(
            _vocabulary_rows_kernel,
            (N,),
            *(logits, self.target[part], self.class_weight, self.scales, made.loss, made.lse, made.rest, made.entropy),
            *(logits.stride(0), V, *self.numbers()),
            HAS_TARGET=losses,
            HAS_SCALES=self.scales is not None,
            USE_ENTROPY=entropy,
            **self.flags(),
            tile=vocabulary_tile(V),
        )
        return made

    def gradient(
        self,
        logits: Tensor,
        out: Tensor,
        got: Rows,
        upstream: Tensor | None,
        part: slice = slice(None),
        scaled: bool = True,
        of_entropy: Tensor | None = None,
        is_loss: bool = True,
        is_padded: bool = True,
    ) -> None:
        """Writes the gradient of rows of logits to out, which may be the logits. upstream: the gradients of the rows'
        losses, or that of the scalar; None = 1. is_padded: out is padded()."""
        N, V = logits.shape
        tile = vocabulary_tile(V)
        blocks = cdiv(V, tile.blocks["BLOCK"])
        scales = self.scales if scaled else None
        launch(
            _vocabulary_gradient_kernel,
            (N * blocks,),
            *(logits, whole(out) if is_padded else out, self.target[part], self.class_weight, self.whole),
            *(scales, upstream, of_entropy),
            *(got.lse, got.rest, got.entropy, logits.stride(0), out.stride(0), V, blocks, *self.numbers()),
            IS_LOSS=is_loss,
            HAS_SCALES=scales is not None,
            HAS_UPSTREAM=upstream is not None,
            IS_SCALAR=upstream is not None and upstream.dim() == 0,
            USE_ENTROPY=of_entropy is not None,
            IS_PADDED=is_padded,
            **self.flags(),
            tile=tile,
        )


@dataclass
class Rows:
    """Statistics of rows, (rows) each. rest: what lse was rounded by."""

    loss: Tensor
    lse: Tensor
    rest: Tensor
    entropy: Tensor | None = None


def counted(counts: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows of x (..., C) count, given whether each does, and x. While a CUDA graph is captured nobody can wait
    for how many do: then all of them, the others as zeros, for which the kernels' results are zero."""
    if not _captured(counts):
        return counts.nonzero().squeeze(1), x
    return torch.arange(len(counts), device=counts.device), torch.where(counts.view(*x.shape[:-1], 1), x, 0)


def _captured(t: Tensor) -> bool:
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def total(losses: Tensor) -> Tensor:
    """The sum of the rows' losses, ()."""
    found = empty((), torch.float32, losses)
    launch(_sum_losses_kernel, (1,), losses, found, losses.shape[0], tile=SUMS)
    return found


class Head:
    """x (rows, C) against weight (V, C), for those of its rows that count; gradients summed over chunks of rows."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, wants: Sequence[bool] = (False,) * 3
    ) -> None:
        self.shape, self.index = x.shape, index
        self.x, self.weight = x.reshape(-1, x.shape[-1]), weight
        self.bias = None if bias is None else bias.contiguous()
        self.cols, self.depth = weight.shape

        def zeros(shape: Sequence[int], want: bool) -> Tensor | None:
            return torch.zeros(shape, device=x.device) if want else None

        dx, dweight, dbias = wants
        self.dx = zeros(self.x.shape, dx)
        self.dweight, self.dbias = zeros(weight.shape, dweight), zeros(weight.shape[:1], dbias)
        self.wants = any(wants)

    def chunks(self) -> Iterator[slice]:
        count, step = self.index.shape[0], logits_rows(self.cols)
        for begin in range(0, count, step):
            yield slice(begin, min(begin + step, count))

    def logits(self, part: slice) -> Tensor:
        """x W^T + bias of the rows index[part], (rows, V) in fp32."""
        x = self.x.index_select(0, self.index[part])
        return product(x, self.weight.t(), padded(x.shape[0], self.cols, torch.float32, x), self.bias, padded="N")

    def gradient_like(self, logits: Tensor) -> Tensor:
        """Where the gradient of logits goes: their place or, for products on tensor cores, as many 16-bit numbers."""
        rows, cols = logits.shape
        return logits if self.x.dtype == torch.float32 else padded(rows, cols, self.x.dtype, logits)

    def add(self, part: slice, gradient: Tensor, factor: Tensor | None) -> None:
        """Adds what a chunk of rows' gradients of logits, times the factor, give. They are padded(), with zeros."""
        index = self.index[part]
        if self.dx is not None:
            made = empty((index.shape[0], self.depth), torch.float32, gradient)
            self.dx[index] = product(gradient, self.weight, made, factor=factor, padded="K")
        if self.dweight is not None:
            x = self.x.index_select(0, index)
            product(gradient.t(), x, self.dweight, factor=factor, add=True, padded="M")
        if self.dbias is not None:
            found = gradient.sum(0, dtype=torch.float32)
            self.dbias += found if factor is None else found * factor

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of x, weight and bias that are wanted."""
        return None if self.dx is None else self.dx.reshape(self.shape), self.dweight, self.dbias


def rounded(gradient: Tensor | None, like: Tensor | None, beside: Tensor, factor: Tensor | None = None) -> Tensor:
    """gradient * factor in the dtype of the tensor that it is of; empty where there is none."""
    if gradient is None or like is None:
        return beside.new_empty(0, dtype=torch.float32 if like is None else like.dtype)
    return (gradient if factor is None else gradient * factor).to(like.dtype)


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
    return [rounded(g if want else None, t, inputs[0], factor) for g, want, t in zip(found, wants, inputs)]


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

    upstream: the gradients of the rows' losses where reduction is "none"; that of a scalar loss is taken for 1. A
    mean's 1 / sum of w is left to the products: 16-bit gradients of logits would vanish with it.
    """
    flat = target.reshape(-1)
    index, x = counted(flat != ignore_index, x)
    head = Head(x, weight, bias, index, wants)
    options = (class_weight, ignore_index, label_smoothing, z_loss, softcap)
    loss = Loss(flat[index], *options, reduction=reduction)
    losses = torch.zeros(flat.shape[0], device=x.device) if reduction == "none" else None
    of_chunks: list[Tensor] = []
    if upstream is not None:
        upstream = upstream.reshape(-1)[index].float()
    unscaled = loss.scales is not None and z_loss == 0
    for part in head.chunks():
        logits = head.logits(part)
        got = loss.of(logits, part)
        if losses is not None:
            losses[index[part]] = got.loss
        else:
            of_chunks.append(got.loss)
        if head.wants:
            gradient = head.gradient_like(logits)
            of_rows = None if upstream is None else upstream[part]
            loss.gradient(logits, gradient, got, of_rows, part, scaled=not unscaled)
            head.add(part, gradient, loss.scales[0] if unscaled and loss.scales is not None else None)
    if losses is None:
        if of_chunks:
            losses = total(torch.cat(of_chunks))
        else:
            losses = torch.full((), torch.nan if reduction == "mean" else 0.0, device=x.device)
    return losses.reshape(target.shape if reduction == "none" else ()), *head.results()


def supports_cross_entropy(logits: Tensor, **_: Any) -> str | None:
    return unsupported(logits, backward=True)


supports_cross_entropy_forward = supports_cross_entropy_backward = supports_cross_entropy


def cross_entropy(**arguments: Any) -> Tensor:
    return cross_entropy_forward((False,), **arguments)[0]


def cross_entropy_forward(wants: Sequence[bool], logits: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and lse and rest of each row."""
    loss = Loss(**options)
    got = loss.of(rows(logits.reshape(-1, logits.shape[-1]))[0])
    made = got.loss.reshape(options["target"].shape) if loss.reduction == "none" else total(got.loss)
    if loss.reduction == "mean" and got.loss.numel() == 0:
        made.fill_(torch.nan)
    return made, got.lse, got.rest


def cross_entropy_backward(
    upstream: Sequence[Tensor], wants: Sequence[bool], lse: Tensor, rest: Tensor, logits: Tensor, **options: Any
) -> list[Tensor]:
    """The gradient of the logits."""
    loss, made = Loss(**options), empty(logits.shape, logits.dtype, logits)
    g = upstream[0] if loss.reduction != "none" else upstream[0].reshape(-1).contiguous()
    V = logits.shape[-1]
    loss.gradient(rows(logits.reshape(-1, V))[0], made.reshape(-1, V), Rows(lse, lse, rest), g, is_padded=False)
    return [made]
