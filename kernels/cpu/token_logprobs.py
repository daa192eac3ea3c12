from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptfast import _cpu
from gptfast.kernels.cpu import empty, pointer, unsupported
from gptfast.kernels.cpu.cross_entropy import TILE, Gradients, Head, ceil, rounded


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
    head = Head(x, weight, bias, None, softcap, 1 / temperature)
    flat = target.reshape(-1)
    index = (flat != ignore_index).nonzero().squeeze(1)
    logprobs, entropy = torch.zeros(flat.shape), torch.zeros(flat.shape if return_entropy else 0)
    for part, _ in head.chunks(index.shape[0], False):
        rows = index[part]
        got = head.logits(rows, flat[rows].int(), None, False, return_entropy)
        logprobs[rows] = -got.nll
        if return_entropy:
            entropy[rows] = got.entropy
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
    of_logprobs, of_entropy = upstream if return_entropy else (upstream[0], None)
    head = Head(x, weight, bias, None, softcap, 1 / temperature)
    flat, made = target.reshape(-1), Gradients(head, wants)
    index = (flat != ignore_index).nonzero().squeeze(1)
    for part, room in head.chunks(index.shape[0], True):
        rows = index[part]
        assert room is not None
        ids = flat[rows].int()
        got = head.logits(rows, ids, room, False, of_entropy is not None)
        g = torch.zeros(rows.shape) if of_logprobs is None else of_logprobs.reshape(-1)[rows].float()
        coefficients = {"lse": got.lse, "rest": got.rest, "scale": -g, "hit": -g, "even": torch.zeros_like(g)}
        if of_entropy is not None:  # dH/dl = -p (l - lse + H)
            h = of_entropy.reshape(-1)[rows].float()
            coefficients["scale"] = h * (got.lse - got.entropy) - g
            coefficients["slope"] = -h
        made.add_rows(room, rows, ids, coefficients)
    return [rounded(g, t) for g, t in zip(made.results(), (x, weight, bias))]


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
    return [rounded(g, t) for g, t in zip(found, inputs)]


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
    p = Head(x_p, weight_p, bias_p, None, softcap_p, 1 / temperature)
    q = Head(x_q, weight_q, bias_q, None, softcap_q, 1 / temperature)
    shape = x_p.shape[:-1]
    count = shape.numel()
    index = torch.arange(count) if mask is None else mask.reshape(-1).nonzero().squeeze(1)
    kl, made = torch.zeros(count), [Gradients(p, wants[:3]), Gradients(q, wants[3:])]
    for (part, p_room), (_, q_room) in zip(p.chunks(index.shape[0], True), q.chunks(index.shape[0], True)):
        rows = index[part]
        assert p_room is not None and q_room is not None
        p_got, q_got = p.logits(rows, None, p_room, False, False), q.logits(rows, None, q_room, False, False)
        of_rows, partial = torch.empty(rows.shape[0]), empty((rows.shape[0] * p.blocks,), torch.float32)
        g = None if upstream is None else upstream.reshape(-1)[rows].float()
        _cpu.token_kl(
            p.threads,
            kl=of_rows.data_ptr(),
            p=p_room.data_ptr(),
            q=q_room.data_ptr(),
            partial=partial.data_ptr(),
            p_lse=p_got.lse.data_ptr(),
            p_rest=p_got.rest.data_ptr(),
            q_lse=q_got.lse.data_ptr(),
            q_rest=q_got.rest.data_ptr(),
            upstream=pointer(g),
            rows=rows.shape[0],
            padded=ceil(rows.shape[0], TILE),
            cols=p.cols,
            p_softcap=softcap_p,
            q_softcap=softcap_q,
            inverse_temperature=1 / temperature,
        )
        kl[rows] = of_rows
        if upstream is not None:
            for of_side, room, wanted in ((made[0], p_room, wants[:3]), (made[1], q_room, wants[3:])):
                if any(wanted):
                    of_side.add_rows(room, rows, None, None)
    return kl.reshape(shape), (*made[0].results(), *made[1].results())
