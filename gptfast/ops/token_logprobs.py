"""What policies and distillation want of a vocabulary's distribution, without ever storing all the logits: the
log-probability of chosen tokens and the entropy at a temperature, and the divergence between two models.

    l[r, v]      = softcap * tanh(u / softcap) / temperature,  u = x[r] . W[v] + bias[v]     (no tanh where softcap = 0)
    logprob[r]   = l[r, t] - lse[r],  lse[r] = log(sum over v of e^l[r, v])
    entropy[r]   = - sum over v of p log p,  p = e^(l[r, v] - lse[r])
    token_kl[r]  = KL(p || q) = sum over v of p (log p - log q)

x            (..., C)  float32, bfloat16 or float16 (float64 on the reference); any strides, the last 1
weight       (V, C)    x's dtype
bias         (V)       x's dtype, or None; -inf rules a token out
target       (...)     integers, t of each row: 0 .. V-1, or ignore_index
temperature            > 0: that of the sampling
softcap                >= 0; 0 = none
logprob, entropy, kl   (...)  float32 (float64 for float64)

token_kl takes two heads, x_p, weight_p, bias_p and x_q, weight_q, bias_q, over one vocabulary: the depths C and the
dtypes may differ, and each side gets gradients where it wants them. For distillation p is the teacher, whose tensors
want none; for a penalty in policy training p is the policy and q the reference model; swap the sides for the reverse
divergence. `mask` (...) bool says which rows count; None = all.

A row whose target is ignore_index, or whose mask is False, gives 0, passes no gradient on, whatever its x holds, and
costs nothing. A column with p = 0 adds nothing to entropy or divergence; one with q = 0 < p makes the divergence inf.

Arithmetic, chunks of rows and orders of summation: those of cross_entropy, so that a token's log-probability is the
same in every batch, and that of linear_cross_entropy. The backward pass computes the logits of each chunk again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.ops import dispatch, library, loss_gradients
from gptfast.ops.cross_entropy import check_head, check_target_shape, check_targets, counting, wide
from gptfast.ops.cross_entropy_cases import token_kl_cases, token_logprobs_cases
from gptfast.ops.dispatch import require, shape
from gptfast.ops.spec import Cost, Op, nbytes, products


def _logprobs(
    x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor, temperature: float, softcap: float
) -> Tensor:
    """log p of every token in every row."""
    logits = F.linear(counting(x, counts), wide(weight), None if bias is None else wide(bias))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits / temperature, -1)


def _entropy(logprobs: Tensor) -> Tensor:
    return -(logprobs.exp() * torch.where(logprobs == -torch.inf, 0.0, logprobs)).sum(-1)


def token_logprobs_reference(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float = 0.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The meaning of token_logprobs, in plain PyTorch."""
    counts = target.reshape(-1) != ignore_index
    logprobs = _logprobs(x, weight, bias, counts, temperature, softcap)
    chosen = logprobs.gather(-1, torch.where(counts, target.reshape(-1), 0).long()[:, None]).squeeze(-1)

    def where_counted(rows: Tensor) -> Tensor:
        return torch.where(counts, rows, 0.0).reshape(target.shape)

    return (where_counted(chosen), where_counted(_entropy(logprobs))) if return_entropy else where_counted(chosen)


def token_logprobs_baseline(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float = 0.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What one writes with PyTorch: the logits in x's dtype, all of them, then their log-softmax in fp32."""
    logits = wide(F.linear(x, weight, bias))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logprobs, counts = torch.log_softmax(logits / temperature, -1), target != ignore_index
    chosen = logprobs.gather(-1, torch.where(counts, target, 0).long()[..., None]).squeeze(-1)
    chosen = torch.where(counts, chosen, 0.0)
    return (chosen, torch.where(counts, _entropy(logprobs), 0.0)) if return_entropy else chosen


def token_kl_reference(
    x_p: Tensor,
    weight_p: Tensor,
    x_q: Tensor,
    weight_q: Tensor,
    *,
    bias_p: Tensor | None = None,
    bias_q: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap_p: float = 0.0,
    softcap_q: float = 0.0,
) -> Tensor:
    """The meaning of token_kl, in plain PyTorch."""
    shape = x_p.shape[:-1]
    counts = torch.ones(shape, dtype=torch.bool, device=x_p.device) if mask is None else mask
    flat = counts.reshape(-1)
    log_p = _logprobs(x_p, weight_p, bias_p, flat, temperature, softcap_p)
    log_q = _logprobs(x_q, weight_q, bias_q, flat, temperature, softcap_q)
    p = log_p.exp()
    rows = (p * torch.where(p == 0, 0.0, log_p - log_q)).sum(-1)
    return torch.where(flat, rows, 0.0).reshape(shape)


def token_kl_baseline(
    x_p: Tensor,
    weight_p: Tensor,
    x_q: Tensor,
    weight_q: Tensor,
    *,
    bias_p: Tensor | None = None,
    bias_q: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap_p: float = 0.0,
    softcap_q: float = 0.0,
) -> Tensor:
    """What one writes with PyTorch: both models' logits, all of them, then F.kl_div in fp32."""

    def logprobs(x: Tensor, weight: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
        logits = wide(F.linear(x, weight, bias))
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        return torch.log_softmax(logits / temperature, -1)

    log_p, log_q = logprobs(x_p, weight_p, bias_p, softcap_p), logprobs(x_q, weight_q, bias_q, softcap_q)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return kl if mask is None else torch.where(mask, kl, 0.0)


def token_logprobs_cost(x: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Cost:
    """The product of the forward pass, and 14 operations for each logit; the backward pass costs three products."""
    rows = (target != options.get("ignore_index", -100)).sum().item()
    moved = nbytes(x, weight, target, options.get("bias"))
    flops = rows * weight.shape[0] * (2.0 * weight.shape[1] + 14)
    return Cost(flops=flops, bytes=moved, unit=products(x, weight))


def token_kl_cost(x_p: Tensor, weight_p: Tensor, x_q: Tensor, weight_q: Tensor, **options: Any) -> Cost:
    """Both products, and 44 operations for each pair of logits."""
    mask = options.get("mask")
    rows = x_p.shape[:-1].numel() if mask is None else mask.sum().item()
    (V, C), D = weight_p.shape, weight_q.shape[1]
    moved = nbytes(x_p, weight_p, x_q, weight_q, options.get("bias_p"), options.get("bias_q"))
    flops = rows * V * (2.0 * (C + D) + 44)
    return Cost(flops=flops, bytes=moved, unit=products(x_p, weight_p, x_q, weight_q))


def token_logprobs(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float = 0.0,
    return_entropy: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The log-probability of each row's target, and the entropy of its distribution if that is asked for. Formulas,
    shapes and dtypes: the top of this page.

    Raises ValueError for arguments that don't fit and targets beyond the vocabulary; BackendError where `backend` can't
    serve the call.
    """
    op = "token_logprobs"
    x, weight, bias = library.as_autocast(x, weight, bias)
    arguments = {
        "x": x, "weight": weight, "target": target, "bias": bias, "ignore_index": ignore_index,
        "temperature": temperature, "softcap": softcap, "return_entropy": return_entropy,
    }  # fmt: skip
    check_head(op, x, weight, bias)
    check_target_shape(op, target, x, "x")
    _check_scales(op, temperature, softcap)
    backend, as_op = library.route(op, backend, arguments)
    if as_op:
        logprobs, entropy = _logprobs_registered(**arguments, backend=backend)
        return (logprobs, entropy) if return_entropy else logprobs
    check_targets(op, target, weight.shape[0], ignore_index)
    return dispatch.run(op, backend, token_logprobs_reference, x, **arguments)


def token_kl(
    x_p: Tensor,
    weight_p: Tensor,
    x_q: Tensor,
    weight_q: Tensor,
    *,
    bias_p: Tensor | None = None,
    bias_q: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap_p: float = 0.0,
    softcap_q: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """KL(p || q) of each row, p and q from two heads. Formulas, shapes and dtypes: the top of this page.

    Raises ValueError for arguments that don't fit; BackendError where `backend` can't serve the call.
    """
    op = "token_kl"
    x_p, weight_p, bias_p = library.as_autocast(x_p, weight_p, bias_p)
    x_q, weight_q, bias_q = library.as_autocast(x_q, weight_q, bias_q)
    arguments = {
        "x_p": x_p, "weight_p": weight_p, "x_q": x_q, "weight_q": weight_q, "bias_p": bias_p, "bias_q": bias_q,
        "mask": mask, "temperature": temperature, "softcap_p": softcap_p, "softcap_q": softcap_q,
    }  # fmt: skip
    check_head(op, x_p, weight_p, bias_p, "_p")
    check_head(op, x_q, weight_q, bias_q, "_q")
    require(
        x_p.shape[:-1] == x_q.shape[:-1] and weight_p.shape[0] == weight_q.shape[0],
        lambda: (
            f"{op}: expected as many rows and tokens of q as of p, got x_q {shape(x_q)} and weight_q "
            f"{shape(weight_q)} beside x_p {shape(x_p)} and weight_p {shape(weight_p)}"
        ),
    )
    require(
        mask is None or (mask.shape == x_p.shape[:-1] and mask.dtype == torch.bool),
        lambda: f"{op}: expected mask {tuple(x_p.shape[:-1])} bool beside x_p {shape(x_p)}, got {shape(mask)}",
    )
    _check_scales(op, temperature, softcap_p, softcap_q)
    backend, as_op = library.route("token_logprobs.token_kl", backend, arguments)
    if as_op:
        return _kl_registered(**arguments, backend=backend)[0]
    return dispatch.run("token_logprobs.token_kl", backend, token_kl_reference, x_p, **arguments)


def _check_scales(op: str, temperature: float, *softcaps: float) -> None:
    require(temperature > 0, lambda: f"{op}: expected temperature > 0, got {temperature}")
    require(min(softcaps) >= 0, lambda: f"{op}: expected a softcap >= 0 (0 = none), got {min(softcaps)}")


def _take(arguments: Mapping[str, Any], b: int) -> dict[str, Any]:
    rows = ("x", "x_p", "x_q", "target", "mask")
    return {k: v[b : b + 1] if k in rows and v is not None else v for k, v in arguments.items()}


def _results(target: Tensor, x: Tensor, return_entropy: bool, **_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    logprobs = x.new_empty(target.shape, dtype=dtype)
    return logprobs, torch.empty_like(logprobs) if return_entropy else x.new_empty(0, dtype=dtype)


_HEAD = ("x", "weight", "bias")
_HEADS = tuple(f"{name}_{side}" for side in "pq" for name in _HEAD)
_logprobs_registered = loss_gradients.register(
    *("token_logprobs", "token_logprobs"),
    "Tensor x, Tensor weight, Tensor target, Tensor? bias, int ignore_index, float temperature, float softcap, "
    "bool return_entropy",
    token_logprobs_reference,
    _HEAD,
    _results,
    lambda weight, target, ignore_index, **_: check_targets("token_logprobs", target, weight.shape[0], ignore_index),
    outputs=2,
)
_kl_registered = loss_gradients.register(
    *("token_logprobs", "token_kl"),
    "Tensor x_p, Tensor weight_p, Tensor x_q, Tensor weight_q, Tensor? bias_p, Tensor? bias_q, Tensor? mask, "
    "float temperature, float softcap_p, float softcap_q",
    token_kl_reference,
    _HEADS,
    lambda x_p, **_: (x_p.new_empty(x_p.shape[:-1], dtype=torch.promote_types(x_p.dtype, torch.float32)),),
)

OPS = [
    Op(
        "token_logprobs",
        token_logprobs,
        token_logprobs_reference,
        token_logprobs_cost,
        token_logprobs_cases,
        token_logprobs_baseline,
        take=_take,
        differentiable=_HEAD,
    ),
    Op(
        "token_kl",
        token_kl,
        token_kl_reference,
        token_kl_cost,
        token_kl_cases,
        token_kl_baseline,
        take=_take,
        differentiable=_HEADS,
    ),
]
