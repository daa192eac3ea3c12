"""Cross-entropy over a vocabulary: of logits, and of hidden states and a head without ever storing all the logits.

    l[r, v]  = x[r] . W[v] + bias[v]                       linear_cross_entropy; cross_entropy is given l
    l        = softcap * tanh(l / softcap)                 where softcap > 0
    lse[r]   = log(sum over v of e^l[r, v])
    ce[r]    = (1 - s) w[t] (lse[r] - l[r, t])  +  s / V * sum over v of w[v] (lse[r] - l[r, v])
    loss[r]  = ce[r] + z_loss * lse[r]^2

x             (..., C)  float32, bfloat16 or float16 (float64 on the reference); any strides, the last 1
weight        (V, C)    x's dtype
bias          (V)       x's dtype, or None; -inf rules a token out
logits        (..., V)  float32, bfloat16 or float16 (float64 on the reference)
target        (...)     integers, t of each row: 0 .. V-1, or ignore_index
class_weight  (V)       w, any float dtype; None = ones
s = label_smoothing     0 .. 1
z_loss, softcap         >= 0; 0 = none
loss                    float32 (float64 for float64): (...) for reduction="none"; a scalar for "sum", and for "mean",
                        sum of ce / sum of w[t] + z_loss * (sum of lse^2) / rows. Both run over the rows that count

A row whose target is ignore_index doesn't count: its loss and its gradients are 0, whatever x or logits hold there, and
it costs nothing. Where no row counts, the mean is NaN, the sum 0 and the gradients 0, as in PyTorch. A target beyond
the vocabulary raises before anything is computed. In a CUDA graph rows that don't count cost what others do, are zeros
in the sums for weight, whose blocks they shift, and targets aren't looked at: each must be in the vocabulary.

Products and sums in fp32 (fp64 for fp64), each gradient rounded once to its input's dtype; with bfloat16 on a machine
with AVX512-BF16 the logits' gradient is rounded to bfloat16 for its products. The logits of a chunk of
rows exist at a time, and their gradient takes their place: see the constants in kernels/cpu/cross_entropy.py. With a
scalar loss the gradients are made in the forward pass, for a loss that has an upstream gradient of 1, and scaled in the
backward pass; for reduction="none" the backward pass computes the logits again.

Orders of summation on the CPU, constants of this page; Triton's are its tiles' (kernels/triton/tiles.py), from the
shape, the dtype and the architecture, and its logits of 16-bit inputs have gradients rounded to 16 bits where they are
factors of products. Vocabulary: blocks of 192 columns, their (maximum, sum) merged in order.
x W^T: C in chunks of 256, in order. The gradient of x: the vocabulary in 32 parts (fewer, if it has fewer blocks), each
in order, and the parts in order. The gradients of weight and bias: the rows that count in order, in chunks of equal
size. So a row's loss and gradient of x depend on that row alone, and none of them on the number of threads. The
products are this library's own: no bit is left to PyTorch's.

Szegedy et al.: Rethinking the Inception Architecture (arXiv:1512.00567), label smoothing; de Brebisson, Vincent: The
Z-loss (arXiv:1604.08859); Gemma 2 (arXiv:2408.00118), soft cap; Wijmans et al.: Cut Your Losses in Large-Vocabulary
Language Models (arXiv:2411.09009).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.ops import dispatch, library, loss_gradients
from gptfast.ops.cross_entropy_cases import cross_entropy_cases, linear_cross_entropy_cases
from gptfast.ops.dispatch import require, shape
from gptfast.ops.spec import Cost, Op, nbytes, products

REDUCTIONS = ("mean", "sum", "none")


def wide(x: Tensor) -> Tensor:
    """x in the dtype of the arithmetic."""
    return x if x.dtype == torch.float64 else x.float()


def counting(x: Tensor, counts: Tensor) -> Tensor:
    """Rows of x (..., C) in the dtype of the arithmetic, those that don't count as zeros: no NaN comes from them."""
    return torch.where(counts[:, None], wide(x).reshape(-1, x.shape[-1]), 0.0)


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The meaning of linear_cross_entropy, in plain PyTorch."""
    counts = target.reshape(-1) != ignore_index
    logits = F.linear(counting(x, counts), wide(weight), None if bias is None else wide(bias))
    return _loss(logits, target, counts, class_weight, label_smoothing, z_loss, softcap, reduction)


def cross_entropy_reference(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The meaning of cross_entropy, in plain PyTorch."""
    counts = target.reshape(-1) != ignore_index
    return _loss(counting(logits, counts), target, counts, class_weight, label_smoothing, z_loss, softcap, reduction)


def _loss(
    logits: Tensor,
    target: Tensor,
    counts: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> Tensor:
    """The loss from the rows' logits."""
    chosen = torch.where(counts, target.reshape(-1), 0).long()
    w = logits.new_ones(logits.shape[-1]) if class_weight is None else class_weight.to(logits.dtype)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    ce = F.cross_entropy(logits, chosen, w, reduction="none", label_smoothing=label_smoothing)
    ce = torch.where(counts, ce, 0.0)
    z = torch.where(counts, z_loss * logits.logsumexp(-1) ** 2, 0.0) if z_loss else torch.zeros_like(ce)
    if reduction == "mean":
        return ce.sum() / torch.where(counts, w[chosen], 0.0).sum() + (z.sum() / counts.sum() if z_loss else 0)
    return ce.sum() + z.sum() if reduction == "sum" else (ce + z).reshape(target.shape)


def linear_cross_entropy_baseline(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """What one writes with PyTorch: the logits in x's dtype, all of them, then the loss in fp32."""
    logits = F.linear(x, weight, bias)
    return cross_entropy_baseline(
        logits,
        target,
        class_weight=class_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        reduction=reduction,
    )


def cross_entropy_baseline(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """What one writes with PyTorch."""
    logits = wide(logits).flatten(0, -2)
    flat = target.reshape(-1).long()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    w = None if class_weight is None else class_weight.to(logits.dtype)
    loss = F.cross_entropy(
        logits, flat, w, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    if z_loss:
        counts = flat != ignore_index
        z = z_loss * torch.where(counts, logits.logsumexp(-1) ** 2, 0.0)
        loss = loss + (z if reduction == "none" else z.sum() / (counts.sum() if reduction == "mean" else 1))
    return loss.reshape(target.shape) if reduction == "none" else loss


def linear_cross_entropy_cost(x: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Cost:
    """The product of the forward pass, and 14 operations for each logit: a transcendental function counts as 10. The
    backward pass costs two products more."""
    rows = (target != options.get("ignore_index", -100)).sum().item()
    moved = nbytes(x, weight, target, options.get("bias"), options.get("class_weight"))
    flops = rows * weight.shape[0] * (2.0 * weight.shape[1] + 14)
    return Cost(flops=flops, bytes=moved, unit=products(x, weight))


def cross_entropy_cost(logits: Tensor, target: Tensor, **options: Any) -> Cost:
    rows = (target != options.get("ignore_index", -100)).sum().item()
    moved = rows * logits.shape[-1] * logits.element_size() + nbytes(target, options.get("class_weight"))
    return Cost(flops=14.0 * rows * logits.shape[-1], bytes=moved)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of softmax(x W^T + bias). Formula, shapes and dtypes: the top of this page.

    Raises ValueError for arguments that don't fit and targets beyond the vocabulary; BackendError where `backend` can't
    serve the call.
    """
    op, V = "linear_cross_entropy", weight.shape[0] if weight.dim() else 0
    x, weight, bias = library.as_autocast(x, weight, bias)
    arguments = {
        "x": x, "weight": weight, "target": target, "bias": bias, "class_weight": class_weight,
        "ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap,
        "reduction": reduction,
    }  # fmt: skip
    check_head(op, x, weight, bias)
    _check_loss(op, target, x, V, class_weight, label_smoothing, z_loss, softcap, reduction)
    backend, as_op = library.route("cross_entropy.linear_cross_entropy", backend, arguments)
    if as_op:
        return _linear_registered(**arguments, backend=backend)[0]
    check_targets(op, target, V, ignore_index)
    return dispatch.run("cross_entropy.linear_cross_entropy", backend, linear_cross_entropy_reference, x, **arguments)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of softmax(logits). Formula, shapes and dtypes: the top of this page.

    Raises ValueError for arguments that don't fit and targets beyond the vocabulary; BackendError where `backend` can't
    serve the call.
    """
    require(
        logits.dim() >= 1 and logits.is_floating_point() and logits.shape[-1] > 0,
        lambda: f"cross_entropy: expected logits (..., V) of floats, V > 0, got {shape(logits)}",
    )
    op, V = "cross_entropy", logits.shape[-1]
    arguments = {
        "logits": logits, "target": target, "class_weight": class_weight, "ignore_index": ignore_index,
        "label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap, "reduction": reduction,
    }  # fmt: skip
    _check_loss(op, target, logits, V, class_weight, label_smoothing, z_loss, softcap, reduction)
    backend, as_op = library.route(op, backend, arguments)
    if as_op:
        return _registered(**arguments, backend=backend)[0]
    check_targets(op, target, V, ignore_index)
    return dispatch.run(op, backend, cross_entropy_reference, logits, **arguments)


def check_head(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, of: str = "") -> None:
    """Raises where hidden states and a head don't fit together. of: the end of their names."""
    require(
        weight.dim() == 2 and weight.is_floating_point() and min(weight.shape) > 0,
        lambda: f"{op}: expected weight{of} (V, C) of floats, neither of them 0, got {shape(weight)}",
    )
    V, C = weight.shape
    require(
        x.dim() >= 1 and x.shape[-1] == C and x.dtype == weight.dtype,
        lambda: f"{op}: expected x{of} (..., {C}) of weight{of}'s dtype, got {shape(x)} beside {shape(weight)}",
    )
    require(
        bias is None or (bias.shape == (V,) and bias.dtype == x.dtype),
        lambda: f"{op}: expected bias{of} ({V},) of x{of}'s dtype, got {shape(bias)} beside {shape(x)}",
    )


def check_target_shape(op: str, target: Tensor, x: Tensor, name: str) -> None:
    """Raises where target isn't one whole number for each row of x."""
    require(
        target.shape == x.shape[:-1] and not target.is_floating_point() and target.dtype != torch.bool,
        lambda: (
            f"{op}: expected target {tuple(x.shape[:-1])} of integers beside {name} {shape(x)}, got {shape(target)}"
        ),
    )


def check_targets(op: str, target: Tensor, cols: int, ignore_index: int) -> None:
    """Raises where a target is neither in the vocabulary nor ignore_index; a traced graph's ops do so when it runs, a
    CUDA graph's don't: nothing may wait for what it finds."""
    if torch.compiler.is_compiling() or target.numel() == 0 or dispatch.unreadable(target):
        return
    if target.is_cpu:
        low, high = target.aminmax()
        if low.item() >= 0 and high.item() < cols:
            return
    wrong = ((target < 0) | (target >= cols)) & (target != ignore_index)
    if wrong.any():
        raise ValueError(
            f"{op}: expected targets 0 to {cols - 1}, or {ignore_index} to ignore a row, got {int(target[wrong][0])}"
        )


def _check_loss(
    op: str,
    target: Tensor,
    x: Tensor,
    cols: int,
    class_weight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> None:
    check_target_shape(op, target, x, "logits" if op == "cross_entropy" else "x")
    require(
        class_weight is None or (class_weight.shape == (cols,) and class_weight.is_floating_point()),
        lambda: f"{op}: expected class_weight ({cols},) of floats, got {shape(class_weight)}",
    )
    require(0 <= label_smoothing <= 1, lambda: f"{op}: expected label_smoothing from 0 to 1, got {label_smoothing}")
    require(z_loss >= 0, lambda: f"{op}: expected z_loss >= 0, got {z_loss}")
    require(softcap >= 0, lambda: f"{op}: expected softcap >= 0 (0 = none), got {softcap}")
    require(reduction in REDUCTIONS, lambda: f"{op}: expected reduction {', '.join(REDUCTIONS)}, got {reduction!r}")


def _take(arguments: Mapping[str, Any], b: int) -> dict[str, Any]:
    return {k: v[b : b + 1] if k in ("x", "logits", "target") else v for k, v in arguments.items()}


def _rows(arguments: Mapping[str, Any]) -> int:
    """Only a loss for each row can be held against that of the row alone."""
    return arguments["target"].shape[0] if arguments.get("reduction") == "none" else 0


_OPTIONS = "Tensor? class_weight, int ignore_index, float label_smoothing, float z_loss, float softcap, str reduction"
_HEAD = ("x", "weight", "bias")


def _result(target: Tensor, reduction: str, like: Tensor) -> tuple[Tensor]:
    dtype = torch.promote_types(like.dtype, torch.float32)
    return (like.new_empty(target.shape if reduction == "none" else (), dtype=dtype),)


def _made(wants: tuple[bool, ...], reduction: str, **arguments: Any) -> tuple[Tensor, ...]:
    """Empty tensors like the gradients that a forward pass makes."""
    x = arguments["x"]
    dtype = torch.promote_types(x.dtype, torch.float32)
    made = [want and reduction != "none" for want in wants]
    shapes = [arguments[name].shape if make else (0,) for name, make in zip(_HEAD, made)]
    return tuple(x.new_empty(shape, dtype=dtype) for shape in shapes)


def _made_reference(wants: tuple[bool, ...], reduction: str, **arguments: Any) -> tuple[Tensor, ...]:
    empty = _made(wants, reduction, **arguments)
    asked = [name for name, want in zip(_HEAD, wants) if want]
    if reduction == "none" or not asked:
        return empty
    arguments["reduction"] = reduction
    one = [arguments["x"].new_ones((), dtype=empty[0].dtype)]
    found = dict(zip(asked, library.gradients_through(linear_cross_entropy_reference, arguments, asked, one)))
    return tuple(e if (g := found.get(name)) is None else g.to(e.dtype) for name, e in zip(_HEAD, empty))


_linear_registered = loss_gradients.register(
    *("cross_entropy", "linear_cross_entropy"),
    f"Tensor x, Tensor weight, Tensor target, Tensor? bias, {_OPTIONS}",
    linear_cross_entropy_reference,
    _HEAD,
    lambda x, target, reduction, **_: _result(target, reduction, x),
    lambda weight, target, ignore_index, **_: check_targets(
        "linear_cross_entropy", target, weight.shape[0], ignore_index
    ),
    kept=("made_x", "made_weight", "made_bias"),
    kept_fake=_made,
    kept_reference=_made_reference,
    kept_are_gradients=True,
)
_registered = loss_gradients.register(
    *("cross_entropy", "cross_entropy"),
    f"Tensor logits, Tensor target, {_OPTIONS}",
    cross_entropy_reference,
    ("logits",),
    lambda logits, target, reduction, **_: _result(target, reduction, logits),
    lambda logits, target, ignore_index, **_: check_targets("cross_entropy", target, logits.shape[-1], ignore_index),
    kept=("lse", "rest"),
    kept_fake=lambda logits, target, **_: tuple(logits.new_empty(target.numel(), dtype=torch.float32) for _ in "12"),
    kept_reference=lambda logits, target, **_: tuple(
        logits.new_zeros(target.numel(), dtype=torch.float32) for _ in "12"
    ),
)

OPS = [
    Op(
        "linear_cross_entropy",
        linear_cross_entropy,
        linear_cross_entropy_reference,
        linear_cross_entropy_cost,
        linear_cross_entropy_cases,
        linear_cross_entropy_baseline,
        take=_take,
        batch=_rows,
        differentiable=_HEAD,
    ),
    Op(
        "cross_entropy",
        cross_entropy,
        cross_entropy_reference,
        cross_entropy_cost,
        cross_entropy_cases,
        cross_entropy_baseline,
        take=_take,
        batch=_rows,
        differentiable=("logits",),
    ),
]
