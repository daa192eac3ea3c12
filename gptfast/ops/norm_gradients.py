"""What layer_norm and rms_norm share as PyTorch's ops: gptfast::<op> and gptfast::<op>_backward.

The backward reads s, the rounded sum that was normalised (x itself without a residual and without dropout), and the
mean and 1 / sqrt(variance + eps) of each row in fp32. With xhat = (s - mean) rstd and g = dy * weight:

    ds = (g - mean(g) - xhat * mean(g * xhat)) * rstd + dsum           without mean(g) for rms_norm
    dx = ds, where dropout kept it, scaled as it was;  dresidual = ds
    dweight = sum of dy * xhat over all rows,  dbias = sum of dy

Sums over rows are fp32, in chunks whose number depends on the shape alone. Xiong et al.: On Layer Normalization in the
Transformer Architecture (arXiv:2002.04745).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptfast.ops import dispatch, library
from gptfast.ops.library import nothing
from gptfast.ops.philox import dropout_keep

FORWARD = (
    "(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor? residual, float dropout_p, Tensor? seed, int stream, "
    "str? backend) -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)"
)
BACKWARD = (
    "(Tensor dy, Tensor? dsum, Tensor s, Tensor weight, Tensor mean, Tensor rstd, float eps, float dropout_p, "
    "Tensor? seed, int stream, bool wants_residual, bool wants_weight, bool wants_bias, str? backend) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
)


def register(op: str, reference: Callable[..., Any], statistics: Callable[..., tuple[Tensor | None, Tensor]]) -> Any:
    """Registers both ops and returns the first. Tensors that a call doesn't have are nothing(): sum without a residual
    and dropout, rms_norm's mean, gradients that nobody wants, dresidual where it is dx.

    statistics(s, eps) -> (mean or None, rstd), where no kernel makes them.
    """
    centred = op == "layer_norm"

    def forward_reference(x: Tensor, eps: float, residual: Tensor | None, dropout_p: float, **others: Any) -> Any:
        y, total = reference(
            x, eps=eps, residual=torch.zeros_like(x) if residual is None else residual, dropout_p=dropout_p, **others
        )
        mean, rstd = statistics(total, eps)
        kept = total if residual is not None or dropout_p else nothing(x)
        return y, kept, nothing(rstd) if mean is None else mean, rstd

    def run(
        name: str,
        backend: str | None,
        reference: Callable[..., Any],
        device: Tensor,
        arguments: dict[str, Any],
        seed: Tensor | None,
    ) -> Any:
        arguments["seed"] = 0 if seed is None else int(seed)
        if arguments["dropout_p"]:  # each call has a seed of its own: nothing to prepare
            return dispatch.run(name, backend, reference, device, **arguments)
        return dispatch.prepared(name, backend, reference, device, arguments)(**arguments)

    def forward(bias: Tensor | None, seed: Tensor | None, backend: str | None, **arguments: Any) -> Any:
        if centred:
            arguments["bias"] = bias
        return run(f"{op}.{op}_forward", backend, forward_reference, arguments["x"], arguments, seed)

    def forward_fake(x: Tensor, residual: Tensor | None, dropout_p: float, **_: Any) -> Any:
        rstd = x.new_empty(x.shape[:-1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        total = x.new_empty(x.shape) if residual is not None or dropout_p else nothing(x)
        return x.new_empty(x.shape), total, torch.empty_like(rstd) if centred else nothing(rstd), rstd

    def backward_reference(
        dy: Tensor, dsum: Tensor | None, s: Tensor, weight: Tensor, eps: float, dropout_p: float,
        seed: Tensor | int | None, stream: int, wants_residual: bool, wants_weight: bool, wants_bias: bool, **_: Any,
    ) -> Any:  # fmt: skip
        given = {"x": s, "weight": weight, "eps": eps} | ({"bias": torch.zeros_like(weight)} if centred else {})
        names = ["x", "weight", "bias"] if centred else ["x", "weight"]
        ds, dweight, *dbias = library.gradients_through(reference, given, names, [dy])
        assert ds is not None and dweight is not None
        dx = dresidual = ds if dsum is None else ds + dsum
        if dropout_p:
            keep = dropout_keep(tuple(s.shape), dropout_p, 0 if seed is None else seed, stream, s.device)
            dx = torch.where(keep, dx * (1 / (1 - dropout_p)), 0.0)
        return (
            dx,
            dresidual if wants_residual and dropout_p else nothing(s),
            dweight if wants_weight else nothing(weight),
            dbias[0] if wants_bias else nothing(weight),
        )

    def backward(seed: Tensor | None, backend: str | None, **arguments: Any) -> Any:
        return run(f"{op}.{op}_backward", backend, backward_reference, arguments["s"], arguments, seed)

    def backward_fake(
        s: Tensor,
        weight: Tensor,
        dropout_p: float,
        wants_residual: bool,
        wants_weight: bool,
        wants_bias: bool,
        **_: Any,
    ) -> Any:
        return (
            s.new_empty(s.shape),
            s.new_empty(s.shape) if wants_residual and dropout_p else nothing(s),
            weight.new_empty(weight.shape) if wants_weight else nothing(weight),
            weight.new_empty(weight.shape) if wants_bias else nothing(weight),
        )

    def save(ctx: Any, arguments: dict[str, Any], output: tuple[Tensor, ...]) -> None:
        _, total, mean, rstd = output
        x, weight, seed, residual = (arguments[name] for name in ("x", "weight", "seed", "residual"))
        ctx.numbers = {name: arguments[name] for name in ("eps", "dropout_p", "stream", "backend")}
        ctx.summed = residual is not None or arguments["dropout_p"] > 0
        ctx.save_for_backward(total if ctx.summed else x, weight, mean, rstd, seed)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)

    def gradients(ctx: Any, needs: dict[str, bool], dy: Tensor | None, dsum: Tensor | None, *_: Any) -> Any:
        s, weight, mean, rstd, seed = ctx.saved_tensors
        wants = {f"wants_{name}": needs[name] for name in ("residual", "weight", "bias")}
        dx, dresidual, dweight, dbias = second(
            **dict(dy=torch.zeros_like(s) if dy is None else dy, dsum=dsum if ctx.summed else None, s=s),
            **dict(weight=weight, mean=mean, rstd=rstd, seed=seed, **ctx.numbers, **wants),
        )
        dresidual = dresidual if ctx.numbers["dropout_p"] else dx
        return {"x": dx, "weight": dweight, "bias": dbias, "residual": dresidual}

    class Planned(torch.autograd.Function):
        """A call without dropout, for all with its signature: `save` and `gradients` without what need not be done
        again."""

        @staticmethod
        def forward(
            ctx: Any,
            plan: dispatch.Plan,
            eps: float,
            backend: str | None,
            x: Tensor,
            weight: Tensor,
            bias: Tensor | None,
            residual: Tensor | None,
        ) -> Any:
            given = dict(x=x, weight=weight, eps=eps, residual=residual, dropout_p=0.0, seed=0, stream=0)
            if centred:
                given["bias"] = bias
            if (launch := plan.forward) is None:
                launch = plan.forward = dispatch.prepared(f"{op}.{op}_forward", backend, forward_reference, x, given)
            y, total, mean, rstd = launch(**given)
            ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)
            ctx.plan, ctx.eps, ctx.backend = plan, eps, backend
            ctx.set_materialize_grads(False)
            return y if residual is None else (y, total)

        @staticmethod
        def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            s, weight, mean, rstd = ctx.saved_tensors
            _, _, _, _, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad
            tensors = dict(dy=dy, dsum=dsum, s=s, weight=weight, mean=mean, rstd=rstd)
            given: dict[str, Any] = dict(
                **tensors, eps=ctx.eps, dropout_p=0.0, seed=0, stream=0,
                wants_residual=wants_residual, wants_weight=wants_weight, wants_bias=wants_bias,
            )  # fmt: skip
            if dy is None or library.needed(tensors):
                given |= dict(dy=torch.zeros_like(s) if dy is None else dy, seed=None, backend=ctx.backend)
                launch = second
            else:
                # all tensors: hooks on saved ones may lay them out anew
                layouts, wants = dispatch.signature(tensors), (wants_weight, wants_bias)
                key = *layouts, *wants, torch.get_num_threads(), dispatch.preferred()
                if (launch := ctx.plan.backward.get(key)) is None:
                    name = f"{op}.{op}_backward"
                    launch = dispatch.prepared(name, ctx.backend, backward_reference, s, given)
                    ctx.plan.backward[key] = launch
            dx, _, dweight, dbias = launch(**given)
            dweight, dbias = dweight if wants_weight else None, dbias if wants_bias else None
            return None, None, None, dx, dweight, dbias, dx if wants_residual else None

    first = library.define(op + FORWARD, forward, forward_fake)
    second = library.define(f"{op}_backward" + BACKWARD, backward, backward_fake)
    library.differentiate(first, save, gradients)
    first.planned = library.direct(Planned)
    library.differentiate_through(second, backward_reference)
    return first
