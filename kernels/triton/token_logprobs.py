from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptfast.kernels.triton import cdiv, empty, launch, unsupported
from gptfast.kernels.triton.cross_entropy import Head, Loss, counted, rounded
from gptfast.kernels.triton.divergence import _kl_gradient_kernel, _kl_rows_kernel
from gptfast.kernels.triton.product import whole
from gptfast.kernels.triton.tiles import vocabulary_tile


def supports_token_logprobs(x: Tensor, weight: Tensor, bias: Tensor | None, **_: Any) -> str | None:
    return unsupported(x, weight, bias, backward=True)


supports_token_logprobs_forward = supports_token_logprobs_backward = supports_token_logprobs


def token_logprobs(return_entropy: bool, **arguments: Any) -> Tensor | tuple[Tensor, ...]:
    made = token_logprobs_forward((), return_entropy=return_entropy, **arguments)
    return made if return_entropy else made[0]


def token_logprobs_forward(
    wants: Sequence[bool],
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    temperature: float,
    softcap: float,
    return_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """The log-probabilities, and the entropy or an empty tensor."""
    flat = target.reshape(-1)
    index, x = counted(flat != ignore_index, x)
    head = Head(x, weight, bias, index)
    loss = Loss(flat[index], None, ignore_index, softcap=softcap, temperature=temperature)
    logprobs = torch.zeros(flat.shape, device=x.device)
    entropy = torch.zeros(flat.shape if return_entropy else 0, device=x.device)
    for part in head.chunks():
        got = loss.of(head.logits(part), part, return_entropy)
        logprobs[index[part]] = -got.loss
        if got.entropy is not None:
            entropy[index[part]] = got.entropy
    return logprobs.reshape(target.shape), entropy.reshape(target.shape) if return_entropy else entropy


def token_logprobs_backward(
    upstream: Sequence[Tensor | None],
    wants: Sequence[bool],
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    temperature: float,
    softcap: float,
    return_entropy: bool,
) -> list[Tensor]:
    """The gradients of x, weight and bias, empty where nobody wants them. upstream: of both outputs."""
    flat = target.reshape(-1)
    index, x = counted(flat != ignore_index, x)
    of_logprobs, of_entropy = (None if g is None else g.reshape(-1)[index].float() for g in (*upstream, None)[:2])
    if of_logprobs is None:
        of_logprobs = torch.zeros(index.shape, device=x.device)
    head = Head(x, weight, bias, index, wants)
    loss = Loss(flat[index], None, ignore_index, softcap=softcap, temperature=temperature)
    for part in head.chunks():
        logits = head.logits(part)
        got = loss.of(logits, part, of_entropy is not None)
        gradient = head.gradient_like(logits)
        h = None if of_entropy is None else of_entropy[part]
        loss.gradient(logits, gradient, got, of_logprobs[part], part, of_entropy=h, is_loss=False)
        head.add(part, gradient, None)
    return [rounded(g, t, x) for g, t in zip(head.results(), (x, weight, bias))]


def supports_token_kl(
    x_p: Tensor,
    weight_p: Tensor,
    x_q: Tensor,
    weight_q: Tensor,
    bias_p: Tensor | None,
    bias_q: Tensor | None,
    **_: Any,
) -> str | None:
    return unsupported(x_p, weight_p, x_q, weight_q, bias_p, bias_q, backward=True)


supports_token_kl_forward = supports_token_kl_backward = supports_token_kl


def token_kl(**arguments: Any) -> Tensor:
    return _token_kl(None, (False,) * 6, **arguments)[0]


def token_kl_forward(wants: Sequence[bool], **arguments: Any) -> tuple[Tensor]:
    return (token_kl(**arguments),)


def token_kl_backward(upstream: Sequence[Tensor], wants: Sequence[bool], **arguments: Any) -> list[Tensor]:
    """The gradients of x, weight and bias of p and then of q, empty where nobody wants them."""
    found = _token_kl(upstream[0], wants, **arguments)[1]
    inputs = [arguments[f"{name}_{side}"] for side in "pq" for name in ("x", "weight", "bias")]
    return [rounded(g, t, arguments["x_p"]) for g, t in zip(found, inputs)]


def _token_kl(
    upstream: Tensor | None,
    wants: Sequence[bool],
    x_p: Tensor,
    weight_p: Tensor,
    x_q: Tensor,
    weight_q: Tensor,
    bias_p: Tensor | None,
    bias_q: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    softcap_p: float,
    softcap_q: float,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    shape = x_p.shape[:-1]
    count, device = shape.numel(), x_p.device
    index = torch.arange(count, device=device) if mask is None else mask.reshape(-1).nonzero().squeeze(1)
    p, q = Head(x_p, weight_p, bias_p, index, wants[:3]), Head(x_q, weight_q, bias_q, index, wants[3:])
    of_p, of_q = (Loss(index, softcap=softcap, temperature=temperature) for softcap in (softcap_p, softcap_q))
    kl, tile = torch.zeros(count, device=device), vocabulary_tile(p.cols)
    g = None if upstream is None else upstream.reshape(-1)[index].float()
    flags: dict[str, Any] = {
        "IS_CAPPED_P": softcap_p > 0,
        "IS_CAPPED_Q": softcap_q > 0,
        "IS_TEMPERED": temperature != 1,
    }
    for part in p.chunks():
        rows_p, rows_q = p.logits(part), q.logits(part)
        got_p, got_q = of_p.of(rows_p, losses=False), of_q.of(rows_q, losses=False)
        N, V = rows_p.shape
        found = empty((N,), torch.float32, rows_p)
        read = (rows_p, rows_q, got_p.lse, got_p.rest, got_q.lse, got_q.rest)
        numbers = (rows_p.stride(0), V, float(softcap_p), float(softcap_q), 1 / temperature)
        launch(_kl_rows_kernel, (N,), *read, found, *numbers, **flags, tile=tile)
        kl[index[part]] = found
        if g is None:
            continue
        made_p, made_q = p.gradient_like(rows_p), q.gradient_like(rows_q)
        blocks = cdiv(V, tile.blocks["BLOCK"])
        launch(
            _kl_gradient_kernel,
            (N * blocks,),
            *(*read, found, g[part], whole(made_p), whole(made_q), blocks, *numbers),
            **flags,
            tile=tile,
        )
        for head, made in ((p, made_p), (q, made_q)):
            if head.wants:
                head.add(part, made, None)
    return kl.reshape(shape), (*p.results(), *q.results())
