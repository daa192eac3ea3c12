"""policy_loss and value_loss as PyTorch's ops: gptfast::<op> gives the loss's gradient with the loss, in one pass, and
gptfast::<op>_backward multiplies it by the gradient that comes in. Second derivatives go through the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptfast.ops import dispatch, library

RESULTS = " -> (Tensor loss, Tensor gradient, Tensor statistics)"


def register(op: str, arguments: str, statistics: int, reference: Callable[..., Any]) -> Any:
    """Registers both ops of `policy.<op>` and returns the first: (loss, its gradient by the first argument, fp32
    and of its shape, the statistics (n)).

    arguments: the schema of the public function's, without backend.
    """
    first_name = arguments.split()[1].rstrip(",")

    def forward_reference(**given: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss, *others = reference(**given)
        (gradient,) = library.gradients_through(
            lambda **again: reference(**again)[0], given, [first_name], [torch.ones_like(loss)]
        )
        assert gradient is not None
        return loss, gradient.to(loss.dtype), torch.stack(others).detach()

    def forward(backend: str | None, **given: Any) -> Any:
        return dispatch.run(f"policy.{op}_forward", backend, forward_reference, given[first_name], **given)

    def forward_fake(**given: Any) -> Any:
        x = given[first_name]
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return tuple(x.new_empty(size, dtype=wide) for size in ((), x.shape, (statistics,)))

    def save(ctx: Any, given: dict[str, Any], output: tuple[Tensor, ...]) -> None:
        tensors = {name: x for name, x in given.items() if isinstance(x, Tensor)}
        ctx.names = list(tensors)
        ctx.others = {name: x for name, x in given.items() if name not in tensors and name != "backend"}
        ctx.save_for_backward(*tensors.values(), output[1])
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    def gradients(ctx: Any, needs: dict[str, bool], *outer: Tensor | None) -> library.Gradients:
        *tensors, gradient = ctx.saved_tensors
        given = {**ctx.others, **dict(zip(ctx.names, tensors))}
        dloss, dgradient, _ = outer
        if dgradient is not None:
            return dict(zip([first_name], library.gradients_through(forward_reference, given, [first_name], outer)))
        return {first_name: None if dloss is None else second(dloss, gradient).to(given[first_name].dtype)}

    def product(dloss: Tensor, gradient: Tensor) -> Tensor:
        return dloss * gradient

    first = library.define(f"{op}({arguments}, str? backend){RESULTS}", forward, forward_fake)
    second = library.define(f"{op}_backward(Tensor dloss, Tensor gradient) -> Tensor", product, product)
    library.differentiate(first, save, gradients)
    library.differentiate_through(second, lambda dloss, gradient: [product(dloss, gradient)])
    return first
