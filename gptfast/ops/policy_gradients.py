"""The losses of policies, values and preferences as PyTorch's ops: gptfast::<op> gives the loss's gradients with the
loss, in one pass, and gptfast::<op>_backward multiplies them by the gradient that comes in. Second derivatives go
through the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptfast.ops import dispatch, library

RESULTS = " -> (Tensor loss, Tensor gradient, Tensor statistics)"
Shapes = Callable[[dict[str, Any]], tuple[Sequence[int], Sequence[int]]]


@dataclass(frozen=True)
class Loss:
    """A loss that PyTorch knows: its name as dispatch.run takes it, its reference, and the op.

    compiled: whether it is an op to torch.compile too, not what the reference does
    """

    name: str
    reference: Callable[..., Any]
    op: library.Registered
    compiled: bool

    def run(self, backend: Any, **arguments: Any) -> Any:
        """The results of the reference, a tensor or several, from the backend that dispatch.choose picks."""
        if backend is None and not self.compiled and torch.compiler.is_compiling():
            return self.reference(**arguments)
        backend, as_op = library.route(self.name, backend, arguments)
        if not as_op:
            device = next(x for x in arguments.values() if isinstance(x, Tensor))
            return dispatch.run(self.name, backend, self.reference, device, **arguments)
        loss, _, statistics = self.op(**arguments, backend=backend)
        return (loss, *statistics.unbind()) if statistics.numel() or statistics.dim() > 1 else loss


def register(
    name: str,
    arguments: str,
    wanted: Sequence[str],
    shapes: Shapes,
    reference: Callable[..., Any],
    compiled: bool = True,
) -> Loss:
    """Registers both ops of `name` ("page.function"). The first gives the loss, its gradients by the arguments `wanted`
    (fp32, of their shape, or stacked where there are several), and the statistics, stacked.

    arguments: the schema of the public function's, without backend
    shapes: those of the loss and of the statistics, (0) where there are none
    reference: gives the loss, and the statistics behind it
    compiled: False where torch.compile fuses it as well as any kernel could
    """
    op = name.partition(".")[2]
    first_name = wanted[0]

    def forward_reference(**given: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss, *others = _several(reference(**given))
        found = library.gradients_through(
            lambda **again: _several(reference(**again))[0], given, wanted, [torch.ones_like(loss)]
        )
        gradients = [torch.zeros_like(given[n]) if g is None else g for n, g in zip(wanted, found)]
        gradient = gradients[0] if len(wanted) == 1 else torch.stack(gradients)
        statistics = torch.stack(others) if others else loss.new_empty(0)
        return loss, gradient.to(loss.dtype), statistics.detach()

    def forward(backend: str | None, **given: Any) -> Any:
        return dispatch.run(f"{name}_forward", backend, forward_reference, given[first_name], **given)

    def forward_fake(**given: Any) -> Any:
        x = given[first_name]
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        loss, statistics = shapes(given)
        stacked = x.shape if len(wanted) == 1 else (len(wanted), *x.shape)
        return tuple(x.new_empty(size, dtype=wide) for size in (loss, stacked, statistics))

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
            return dict(zip(wanted, library.gradients_through(forward_reference, given, wanted, outer)))
        if dloss is None:
            return {}
        found = second(dloss, gradient)
        each = [found] if len(wanted) == 1 else found.unbind()
        return {name: g.to(given[name].dtype) for name, g in zip(wanted, each)}

    def product(dloss: Tensor, gradient: Tensor) -> Tensor:
        return dloss * gradient

    first = library.define(f"{op}({arguments}, str? backend){RESULTS}", forward, forward_fake)
    second = library.define(f"{op}_backward(Tensor dloss, Tensor gradient) -> Tensor", product, product)
    library.differentiate(first, save, gradients)
    library.differentiate_through(second, lambda dloss, gradient: [product(dloss, gradient)])
    return Loss(name, reference, first, compiled)


def _several(results: Any) -> Sequence[Tensor]:
    return [results] if isinstance(results, Tensor) else results
