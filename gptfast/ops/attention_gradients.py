"""Attention as PyTorch's ops: gptfast::attention and gptfast::attention_backward.

With p the probabilities before dropout, m = 1 / (1 - dropout_p) where dropout kept and else 0, dp = m (dout . v):

    delta = dout . out - dlse          ds = p (dp - delta)          x = scale q . k, s = softcap tanh(x / softcap)
    dv = sum_i m p dout                dbias = sum of ds where it is broadcast
    dx = ds (1 - (s / softcap)^2)      dq = scale sum_j dx k        dk = scale sum_i dx q
    dsink = -sum_i e^(sink - lse) delta

A row that attends to nothing gives zeros. ALiBi's slopes get no gradient from kernels. These make p again from q, k and
lse by blocks of queries and keys, on the CPU 48 and 96 counted from the first of a sequence; sums are fp32, dk and dv
over the blocks of queries in order, dq over those of keys. For products of bfloat16 on a machine with AVX512-BF16, and
on GPUs, p and ds are rounded to bfloat16. Dao: FlashAttention-2 (arXiv:2307.08691).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptfast.ops import dispatch, library
from gptfast.ops.attention_checks import check_varlen
from gptfast.ops.library import nothing

TERMS = (
    "bool causal, float? scale, int[] window, float softcap, Tensor? alibi_slopes, Tensor? sinks, Tensor? mask, "
    "Tensor? bias, float dropout_p, Tensor? seed, int stream, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"
)
FORWARD = f"attention(Tensor q, Tensor k, Tensor v, {TERMS}, str? backend) -> (Tensor out, Tensor lse)"
BACKWARD = (
    f"attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {TERMS}, "
    "bool wants_bias, bool wants_sinks, str? backend) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)"
)
TENSORS = ("q", "k", "v", "alibi_slopes", "sinks", "mask", "bias", "seed", "cu_seqlens_q", "cu_seqlens_k")


def register(reference: Callable[..., Any]) -> Any:
    """Registers both ops and returns the first. A gradient that nobody wants is nothing()."""

    def forward_reference(**arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = reference(**arguments)
        return out.contiguous(), lse.contiguous()

    def forward(backend: str | None, **arguments: Any) -> Any:
        arguments = _read(arguments)
        if arguments["cu_seqlens_q"] is not None:  # its contents were unknown to whoever traced the call
            check_varlen(*(arguments[name] for name in ("q", "k", "cu_seqlens_q", "cu_seqlens_k")))
        return _run("attention.attention", backend, forward_reference, {**arguments, "return_lse": True})

    def forward_fake(q: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        heads = (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
        return q.new_empty(q.shape), q.new_empty(heads, dtype=_statistics(q))

    def backward_reference(
        dout: Tensor, dlse: Tensor | None, wants_bias: bool, wants_sinks: bool, backend: str | None = None,
        out: Tensor | None = None, lse: Tensor | None = None, **arguments: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        wanted = ["q", "k", "v"] + ["bias"] * wants_bias + ["sinks"] * wants_sinks
        arguments |= {"window": tuple(arguments["window"]), "return_lse": True}
        found = dict(zip(wanted, library.gradients_through(reference, arguments, wanted, [dout, dlse])))
        made = {n: torch.zeros_like(arguments[n]) if g is None else g.contiguous() for n, g in found.items()}
        return tuple(made.get(name, nothing(dout)) for name in ("q", "k", "v", "bias", "sinks"))

    def backward(backend: str | None, **arguments: Any) -> Any:
        return _run("attention.attention_backward", backend, backward_reference, _read(arguments))

    def backward_fake(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None, wants_bias: bool,
        wants_sinks: bool, **_: Any,
    ) -> Any:  # fmt: skip
        given = (q, k, v, bias if wants_bias else None, sinks if wants_sinks else None)
        return tuple(nothing(dout) if t is None else t.new_empty(t.shape) for t in given)

    def save(ctx: Any, arguments: dict[str, Any], output: tuple[Tensor, Tensor]) -> None:
        ctx.numbers = {name: x for name, x in arguments.items() if name not in TENSORS}
        ctx.save_for_backward(*(arguments[name] for name in TENSORS), *output)
        ctx.set_materialize_grads(False)

    def gradients(ctx: Any, needs: dict[str, bool], dout: Tensor | None, dlse: Tensor | None) -> Any:
        *tensors, out, lse = ctx.saved_tensors
        found = second(
            **dict(dout=torch.zeros_like(out) if dout is None else dout, dlse=dlse, out=out, lse=lse),
            **dict(zip(TENSORS, tensors)),
            **ctx.numbers,
            **dict(wants_bias=needs["bias"], wants_sinks=needs["sinks"]),
        )
        return dict(zip(("q", "k", "v", "bias", "sinks"), found))

    first = library.define(FORWARD, forward, forward_fake)
    second = library.define(BACKWARD, backward, backward_fake)
    library.differentiate(first, save, gradients)
    library.differentiate_through(second, backward_reference)
    return first


def _run(op: str, backend: str | None, reference: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    if arguments["dropout_p"] or arguments["cu_seqlens_q"] is not None:  # what they hold is another each time
        return dispatch.run(op, backend, reference, arguments["q"], **arguments)
    return dispatch.prepared(op, backend, reference, arguments["q"], arguments)(**arguments)


def _read(arguments: dict[str, Any]) -> dict[str, Any]:
    """A schema's arguments as kernels take them."""
    seed = arguments["seed"]
    return {**arguments, "window": tuple(arguments["window"]), "seed": 0 if seed is None else int(seed)}


def _statistics(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
