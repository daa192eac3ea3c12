"""The losses over a vocabulary as PyTorch's ops: gptfast::<op> and gptfast::<op>_backward.

The forward op returns its results and what the backward reads beside the arguments: for linear_cross_entropy with a
scalar loss the gradients themselves, in fp32, made where the logits are there anyway; for cross_entropy the
log-sum-exp of each row and what it was rounded by. The others' backward computes the logits again. Gradients of
gradients are autograd's, through the reference.

Gradients that the forward made are the largest tensors of a training step. So the first backward takes them from the
graph, scales them where they are, which a loss's own backward() needn't, and hands them on: they become the parameters'
.grad as they are. A second one over a retained graph makes them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gptfast.ops import dispatch, library
from gptfast.ops.library import nothing


def register(
    page: str,
    op: str,
    arguments: str,
    reference: Callable[..., Any],
    differentiable: tuple[str, ...],
    results: Callable[..., tuple[Tensor, ...]],
    check: Callable[..., None] = lambda **_: None,
    outputs: int = 1,
    kept: tuple[str, ...] = (),
    kept_fake: Callable[..., tuple[Tensor, ...]] = lambda **_: (),
    kept_reference: Callable[..., tuple[Tensor, ...]] = lambda **_: (),
    kept_are_gradients: bool = False,
) -> Callable[..., tuple[Tensor, ...]]:
    """Registers both ops and returns the first, which gives a call's results.

    arguments: of the schema. results(**arguments): empty tensors like the `outputs` results. kept: the names of what
    the backward reads too; empty tensors like it, and its values where no kernel makes them, of (wants=, **arguments).
    kept_are_gradients: it is the gradients of `differentiable` by the first result, a number, or empty.
    check(**arguments): raises where the arguments' contents don't fit.
    """
    names = [part.split()[-1] for part in arguments.split(", ")]
    device = differentiable[0]

    def forward_reference(wants: Sequence[bool], **given: Any) -> tuple[Tensor, ...]:
        made: Any = reference(**given)
        made = made if isinstance(made, tuple) else (made,)
        return *made, *results(**given)[len(made) :], *kept_reference(wants=wants, **given)

    def forward(wants: Sequence[bool], backend: str | None, **given: Any) -> Any:
        check(**given)
        made = dispatch.run(
            f"{page}.{op}_forward", backend, forward_reference, given[device], wants=tuple(wants), **given
        )
        return made if len(made) > 1 else made[0]

    def forward_fake(wants: Sequence[bool], backend: str | None, **given: Any) -> Any:
        made: list[Tensor] = [*results(**given), *kept_fake(wants=tuple(wants), **given)]
        return tuple(made) if len(made) > 1 else made[0]

    def backward_reference(upstream: Sequence[Tensor | None], wants: Sequence[bool], **given: Any) -> list[Tensor]:
        mine = {name: given[name] for name in names}
        asked = [name for name, want in zip(differentiable, wants) if want]
        found = dict(zip(asked, library.gradients_through(reference, mine, asked, upstream)))
        return [nothing(mine[device]) if (g := found.get(name)) is None else g for name in differentiable]

    def upstreams(given: dict[str, Any]) -> list[Tensor | None]:
        return [given.pop(f"d{i}") for i in range(outputs)]

    def backward(wants: Sequence[bool], backend: str | None, **given: Any) -> Any:
        made = dispatch.run(
            *(f"{page}.{op}_backward", backend, backward_reference, given[device]),
            upstream=upstreams(given),
            wants=tuple(wants),
            **given,
        )
        return tuple(made) if len(made) > 1 else made[0]

    def backward_fake(wants: Sequence[bool], backend: str | None, **given: Any) -> Any:
        made = [
            given[name].new_empty(given[name].shape) if want else nothing(given[device])
            for name, want in zip(differentiable, wants)
        ]
        return tuple(made) if len(made) > 1 else made[0]

    def through(wants: Sequence[bool], backend: str | None, **given: Any) -> list[Tensor]:
        return backward_reference(upstreams(given), wants, **given)

    def save(ctx: Any, given: dict[str, Any], output: Any) -> None:
        output = output if isinstance(output, tuple) else (output,)
        extra = output[outputs:]
        ctx.numbers = {name: x for name, x in given.items() if not isinstance(x, Tensor)}
        ctx.names = [name for name in names if name not in ctx.numbers]
        own = kept_are_gradients and not library.watched(dict(zip(kept, extra)))
        ctx.own = extra if own else None
        ctx.save_for_backward(*(given[name] for name in ctx.names), *(() if own else extra))
        ctx.mark_non_differentiable(*extra)
        ctx.set_materialize_grads(False)

    def gradients(ctx: Any, needs: dict[str, bool], *upstream: Tensor | None) -> library.Gradients:
        if ctx.numbers.get("return_entropy") is False:  # the second output is empty
            upstream = (upstream[0], None)
        if all(g is None for g in upstream):
            return {}
        saved = dict(zip([*ctx.names, *kept], ctx.saved_tensors))
        wants = [needs[name] for name in differentiable]
        if ctx.own is not None:
            if not torch.is_grad_enabled():
                own, ctx.own = ctx.own, ()
                if all(g.shape == saved[n].shape for n, g, want in zip(differentiable, own, wants) if want) and own:
                    return {n: _scaled(g, upstream[0], saved[n]) for n, g, w in zip(differentiable, own, wants) if w}
            saved |= dict(zip(kept, ctx.own or [nothing(saved[device])] * len(kept)))
        made = second(
            **{f"d{i}": upstream[i] for i in range(outputs)},
            **{**ctx.numbers, **saved, "wants": wants},
        )
        return dict(zip(differentiable, made if isinstance(made, tuple) else (made,)))

    ends = "bool[] wants, str? backend"
    of_results = ", ".join(f"Tensor? d{i}" for i in range(outputs))
    of_kept = "".join(f", Tensor {name}" for name in kept)
    first = library.define(f"{op}({arguments}, {ends}) -> {_tensors(outputs + len(kept))}", forward, forward_fake)
    second = library.define(
        f"{op}_backward({of_results}, {arguments}{of_kept}, {ends}) -> {_tensors(len(differentiable))}",
        *(backward, backward_fake),
    )
    library.differentiate(first, save, gradients)
    library.differentiate_through(second, through)

    def call(backend: str | None, **given: Any) -> tuple[Tensor, ...]:
        grad = torch.is_grad_enabled()
        wants = [grad and (x := given[name]) is not None and x.requires_grad for name in differentiable]
        made = first(**given, wants=wants, backend=backend)
        return made[:outputs] if isinstance(made, tuple) else (made,)

    return call


def _scaled(gradient: Tensor, factor: Tensor | None, like: Tensor) -> Tensor:
    """gradient * factor, in place, in the dtype of the tensor that it is of."""
    assert factor is not None
    if gradient.device.type != "cpu" or factor.item() != 1:  # a GPU's factor isn't waited for
        gradient *= factor.to(gradient.dtype)
    return gradient.to(like.dtype)


def _tensors(n: int) -> str:
    return "Tensor" if n == 1 else "(" + ", ".join(["Tensor"] * n) + ")"
