"""bias_gelu, swiglu and geglu as PyTorch's ops, with their gradients.

    bias_gelu   dx = dy gelu'(x + bias),  dbias = sum of dx over all rows
    swiglu      dgate = dy up silu'(gate),  dup = dy silu(gate);  silu'(g) = s (1 + g (1 - s)),  s = sigmoid(g)
    geglu       dgate = dy up gelu'(gate),  dup = dy gelu(gate)

The inputs are kept for the backward, not the activations. dbias is summed in fp32 from gradients not yet rounded, in
chunks of rows whose number depends on the shape alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gptfast.ops import dispatch, library
from gptfast.ops.library import nothing


def register_bias_gelu(reference: Callable[..., Tensor]) -> Any:
    """gptfast::bias_gelu and its backward; returns the first."""

    def backward_reference(
        dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str, wants_bias: bool
    ) -> tuple[Tensor, Tensor]:
        given = {"x": x, "bias": bias, "approximate": approximate}
        dx, *dbias = library.gradients_through(reference, given, ["x", "bias"] if wants_bias else ["x"], [dy])
        assert dx is not None
        return dx, dbias[0] if dbias and dbias[0] is not None else nothing(x)

    def backward_fake(x: Tensor, wants_bias: bool, **_: Any) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape), x.new_empty(x.shape[-1:]) if wants_bias else nothing(x)

    first = library.define(
        "bias_gelu(Tensor x, Tensor? bias, str approximate, str? backend) -> Tensor",
        _runner("bias_gelu", reference, "x"),
        lambda x, **_: x.new_empty(x.shape),
    )
    second = library.define(
        "bias_gelu_backward(Tensor dy, Tensor x, Tensor? bias, str approximate, bool wants_bias, str? backend) "
        "-> (Tensor dx, Tensor dbias)",
        _runner("bias_gelu_backward", backward_reference, "x"),
        backward_fake,
    )

    def save(ctx: Any, arguments: dict[str, Any], output: Tensor) -> None:
        ctx.save_for_backward(arguments["x"], arguments["bias"])
        ctx.approximate, ctx.backend = arguments["approximate"], arguments["backend"]

    def gradients(ctx: Any, needs: dict[str, bool], dy: Tensor) -> Any:
        x, bias = ctx.saved_tensors
        dx, dbias = second(dy, x, bias, ctx.approximate, needs["bias"], ctx.backend)
        return {"x": dx, "bias": dbias}

    library.differentiate(first, save, gradients)
    library.differentiate_through(second, lambda backend, **arguments: backward_reference(**arguments))
    return first


def register_gated(op: str, reference: Callable[..., Tensor], approximate: bool) -> Any:
    """gptfast::<op> of gate and up and its backward; returns the first. approximate: whether it takes that argument."""
    more = ", str approximate" if approximate else ""

    def backward_reference(dy: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
        dgate, dup = library.gradients_through(reference, arguments, ["gate", "up"], [dy])
        assert dgate is not None and dup is not None
        return dgate, dup

    first = library.define(
        f"{op}(Tensor gate, Tensor up{more}, str? backend) -> Tensor",
        _runner(op, reference, "gate"),
        lambda gate, **_: gate.new_empty(gate.shape),
    )
    second = library.define(
        f"{op}_backward(Tensor dy, Tensor gate, Tensor up{more}, str? backend) -> (Tensor dgate, Tensor dup)",
        _runner(f"{op}_backward", backward_reference, "gate"),
        lambda gate, **_: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)),
    )

    def save(ctx: Any, arguments: dict[str, Any], output: Tensor) -> None:
        ctx.save_for_backward(arguments["gate"], arguments["up"])
        ctx.rest = {name: x for name, x in arguments.items() if name not in ("gate", "up")}

    def gradients(ctx: Any, needs: dict[str, bool], dy: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        dgate, dup = second(dy=dy, gate=gate, up=up, **ctx.rest)
        return {"gate": dgate, "up": dup}

    library.differentiate(first, save, gradients)
    library.differentiate_through(second, lambda backend, **arguments: backward_reference(**arguments))
    return first


def _runner(op: str, reference: Callable[..., Any], device: str) -> Callable[..., Any]:
    def run(backend: str | None, **arguments: Any) -> Any:
        return dispatch.prepared(f"mlp.{op}", backend, reference, arguments[device], arguments)(**arguments)

    return run
