"""linear with a float weight as PyTorch's ops: gptfast::linear and gptfast::linear_backward.

    y = x W^T + bias,   dx = dy W,   dW = dy^T x,   dbias = sum of dy over all rows

On the CPU all three products are a kernel of ours: sums in fp32 in chunks of 384 of the summed dimension, in order
inside a chunk, the chunks added in order. So a row of y and of dx depends on that row alone, and dW and dbias on the
shape alone. Where both operands are bfloat16 and the machine has AVX512-BF16, two neighbours are added to a sum at
once, as its instruction does it. With backend="triton" y and dx have that property too, in the orders of
gptfast/ops/linear.py's page and of one chain over the summed dimension. Without a kernel they are PyTorch's own, whose
bits are theirs.

A quantised or packed weight is frozen: y is what it is without gradients, dx = dy W of the weight's values, which are
made for this product and let go, so that a model of 4-bit weights is never held in fp32. With activations="int8" the
rounding of x counts as the identity (the straight-through estimator of Bengio et al., arXiv:1308.3432).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.ops import dispatch, library
from gptfast.ops.library import nothing

FORWARD = "linear(Tensor x, Tensor weight, Tensor? bias, str? backend) -> Tensor"
BACKWARD = (
    "linear_backward(Tensor dy, Tensor x, Tensor weight, bool wants_x, bool wants_weight, Tensor? bias, str? backend) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)"
)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's own product, which knows its gradients; in fp32 where dtypes differ."""
    if x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype):
        return F.linear(x, weight, bias)
    wide = torch.promote_types(torch.float32, torch.promote_types(x.dtype, weight.dtype))
    return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)).to(x.dtype)


class Frozen(torch.autograd.Function):
    """run(x, bias) for a weight that isn't trained; values() gives it as a tensor for multiply(dy, W^T), the gradient
    of x, which is differentiable in turn."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        run: Callable[[Tensor, Tensor | None], Tensor],
        values: Callable[[], Tensor],
        multiply: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        ctx.values, ctx.multiply = values, multiply
        ctx.bias_dtype = None if bias is None else bias.dtype
        return run(x, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dy,) = gradients
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = ctx.multiply(dy, ctx.values().to(dy.dtype).t())
        if ctx.needs_input_grad[1]:
            wide = torch.promote_types(dy.dtype, torch.float32)
            dbias = dy.flatten(0, -2).sum(0, dtype=wide).to(ctx.bias_dtype)
        return dx, dbias, None, None, None


def register() -> Any:
    """Registers both ops and returns the first. A gradient that nobody wants is nothing(); bias is given to the second
    where its gradient is wanted."""

    def forward(backend: str | None, **arguments: Any) -> Tensor:
        made = dispatch.prepared("linear.linear_forward", backend, product, arguments["x"], arguments)
        return made(**arguments)

    def forward_fake(x: Tensor, weight: Tensor, **_: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], weight.shape[0]))

    def backward_reference(
        dy: Tensor, x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        given = {"x": x, "weight": weight, "bias": bias}
        wanted = ["x"] * wants_x + ["weight"] * wants_weight + ["bias"] * (bias is not None)
        found = dict(zip(wanted, library.gradients_through(product, given, wanted, [dy])))
        return tuple(nothing(x) if (g := found.get(name)) is None else g for name in given)

    def backward(backend: str | None, **arguments: Any) -> Any:
        made = dispatch.prepared("linear.linear_backward", backend, backward_reference, arguments["x"], arguments)
        return made(**arguments)

    def backward_fake(
        x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool, bias: Tensor | None, **_: Any
    ) -> tuple[Tensor, ...]:
        return (
            x.new_empty(x.shape) if wants_x else nothing(x),
            torch.empty_like(weight) if wants_weight else nothing(x),
            nothing(x) if bias is None else bias.new_empty(bias.shape),
        )

    def save(ctx: Any, arguments: dict[str, Any], output: Tensor) -> None:
        ctx.backend = arguments["backend"]
        ctx.save_for_backward(*(arguments[name] for name in ("x", "weight", "bias")))

    def gradients(ctx: Any, needs: dict[str, bool], dy: Tensor) -> Any:
        x, weight, bias = ctx.saved_tensors
        wants = needs["x"], needs["weight"], bias if needs["bias"] else None
        return dict(zip(("x", "weight", "bias"), second(dy, x, weight, *wants, ctx.backend)))

    first = library.define(FORWARD, forward, forward_fake)
    second = library.define(BACKWARD, backward, backward_fake)
    library.differentiate(first, save, gradients)
    library.differentiate_through(second, lambda backend, **arguments: backward_reference(**arguments))
    return first
