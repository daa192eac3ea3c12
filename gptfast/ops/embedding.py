"""Token embedding, with an optional fused position embedding.

    out[i] = weight[ids[i]]                                      (a copy)
    out[i] = weight[ids[i]] + position_weight[positions[i]]      (added in fp32, rounded once)

ids              any shape, int64, 0 <= id < V
weight           (V, C)  float32, bfloat16 or float16 (float64 on the reference)
positions        int64, broadcasts to ids' shape, 0 <= position < P; with position_weight only
position_weight  (P, C)  weight's dtype
out              ids.shape + (C,)  weight's dtype

The sum of both is GPT-2's input: Radford et al., Language Models are Unsupervised Multitask Learners (2019).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.ops import dispatch, library
from gptfast.ops.dispatch import require, shape, unreadable
from gptfast.ops.spec import Case, Cost, Inputs, Op, nbytes


def reference(
    ids: Tensor, weight: Tensor, *, positions: Tensor | None = None, position_weight: Tensor | None = None
) -> Tensor:
    """The meaning of embedding, in plain PyTorch."""
    if positions is None or position_weight is None:
        return weight[ids]
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return (weight[ids].to(wide) + position_weight[positions].to(wide)).to(weight.dtype)


def baseline(
    ids: Tensor, weight: Tensor, *, positions: Tensor | None = None, position_weight: Tensor | None = None
) -> Tensor:
    """What one writes with PyTorch."""
    if positions is None or position_weight is None:
        return F.embedding(ids, weight)
    return F.embedding(ids, weight) + F.embedding(positions, position_weight)


def cost(
    ids: Tensor, weight: Tensor, *, positions: Tensor | None = None, position_weight: Tensor | None = None
) -> Cost:
    """Every row is read at most once, whether from memory or from a cache where ids repeat."""
    C, size = weight.shape[1], weight.element_size()
    gathered = min(ids.numel(), weight.shape[0])
    if positions is not None and position_weight is not None:
        gathered += min(positions.numel(), position_weight.shape[0])
    moved = nbytes(ids, positions) + (gathered + ids.numel()) * C * size
    return Cost(flops=ids.numel() * C * (positions is not None), bytes=moved)


def cases() -> list[Case]:
    def case(
        *shape: int, V: int, C: int, P: int = 0, shared: bool = False, strided: bool = False, tags: str = ""
    ) -> Case:
        def make(i: Inputs) -> dict[str, Any]:
            arguments = {"ids": i.randint(0, V, shape), "weight": i.randn(V, C + 3 * strided)[:, :C]}
            if P:
                positions = torch.arange(shape[-1]) if shared else i.randint(0, P, shape)
                arguments |= {"positions": positions, "position_weight": i.randn(P, C, scale=0.1)}
            return arguments

        kind = f"+positions{P}" * (P > 0) + "-shared" * shared + "-strided" * strided
        return Case("x".join(map(str, shape)) + f"-{V}x{C}{kind}", make, frozenset(tags.split()))

    return [
        case(7, V=11, C=33),
        case(2, 5, V=3, C=1, P=9),
        case(3, 4, 5, V=50, C=129, strided=True),
        case(3, 17, V=100, C=100, P=17, shared=True, strided=True),
        case(0, V=5, C=8),
        case(2, 0, V=5, C=8, P=3),
        case(2048, V=49152, C=576, tags="bench big"),
        case(4, 512, V=50257, C=768, P=1024, shared=True, tags="bench big"),
        case(1, 1, V=50257, C=768, P=1024, tags="bench"),
        case(8, 1, V=49152, C=576, tags="bench"),
    ]


def embedding(
    ids: Tensor,
    weight: Tensor,
    *,
    positions: Tensor | None = None,
    position_weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The rows of weight that ids name, plus those of position_weight. Shapes and dtypes: the top of this page.

    Raises ValueError for shapes and dtypes that don't fit and, before anything is read, for an id or position outside
    its table; BackendError where `backend` can't serve the call.
    """
    arguments = {"ids": ids, "weight": weight, "positions": positions, "position_weight": position_weight}
    backend, as_op = library.route("embedding", backend, arguments, _check)
    if as_op:  # that one looks at what the ids are
        return _registered(**arguments, backend=backend)
    function = dispatch.prepared("embedding", backend, reference, weight, arguments, _check)
    _check_contents("ids", ids, weight)
    _check_contents("positions", positions, position_weight)
    return function(**arguments)


def _check(ids: Tensor, weight: Tensor, positions: Tensor | None, position_weight: Tensor | None) -> None:
    """Raises where arguments don't fit together."""
    require(
        weight.dim() == 2 and weight.is_floating_point(),
        lambda: f"embedding: expected weight (V, C) of floats, got {shape(weight)}",
    )
    require(
        (positions is None) == (position_weight is None),
        lambda: (
            f"embedding: expected positions and position_weight together, got {shape(positions)} and "
            f"{shape(position_weight)}"
        ),
    )
    for name, t in (("ids", ids), ("positions", positions)):
        require(t is None or t.dtype == torch.int64, lambda: f"embedding: expected {name} of int64, got {shape(t)}")  # noqa: B023
    if positions is None or position_weight is None:
        return
    C = weight.shape[1]
    require(
        position_weight.dim() == 2 and position_weight.shape[1] == C and position_weight.dtype == weight.dtype,
        lambda: (
            f"embedding: expected position_weight (P, {C}) like weight {shape(weight)}, got {shape(position_weight)}"
        ),
    )
    require(
        positions.dim() <= ids.dim() and all(p in (1, i) for p, i in zip(positions.shape[::-1], ids.shape[::-1])),
        lambda: f"embedding: expected positions that broadcast to ids {shape(ids)}, got {shape(positions)}",
    )


FEW = 64  # ids that are looked at one by one: less than two reductions take


def _check_contents(name: str, ids: Tensor | None, table: Tensor | None) -> None:
    """Raises for an id outside its table, where there are values to look at."""
    if ids is None or table is None or ids.is_meta or torch.compiler.is_compiling() or ids.numel() == 0:
        return
    if unreadable(ids):
        return
    if ids.is_cpu and ids.numel() <= FEW:
        values = ids.flatten().tolist()
        low, high = min(values), max(values)
    else:
        ends = ids.aminmax()
        low, high = (int(end) for end in ends) if ids.is_cpu else torch.stack(ends).tolist()  # one copy from the device
    count = table.shape[0]
    if low < 0 or high >= count:
        bad = ids[(ids < 0) | (ids >= count)][0].item()
        raise ValueError(f"embedding: expected {name} in [0, {count}), got {bad}")


def _take(arguments: Any, b: int) -> dict[str, Any]:
    ids, positions = arguments["ids"], arguments.get("positions")
    row = {"ids": ids[b : b + 1]}
    if positions is not None and positions.dim() == ids.dim():
        row["positions"] = positions[b : b + 1]
    return {**arguments, **row}


def _run(backend: str | None, **arguments: Any) -> Tensor:
    _check_contents("ids", arguments["ids"], arguments["weight"])
    _check_contents("positions", arguments["positions"], arguments["position_weight"])
    return dispatch.run("embedding", backend, reference, arguments["weight"], **arguments)


def _backward_reference(dout: Tensor, ids: Tensor, count: int) -> Tensor:
    wide = torch.float64 if dout.dtype == torch.float64 else torch.float32
    rows = dout.reshape(-1, dout.shape[-1]).to(wide)
    return rows.new_zeros(count, dout.shape[-1]).index_add(0, ids.reshape(-1), rows).to(dout.dtype)


def _run_backward(dout: Tensor, ids: Tensor, count: int, backend: str | None) -> Tensor:
    """dweight (count, C): each row the sum, in fp32 and in order, of the gradients of the places that took it."""
    return dispatch.run("embedding.embedding_backward", backend, _backward_reference, dout, dout=dout, ids=ids,
                        count=count)  # fmt: skip


def _save(ctx: Any, arguments: dict[str, Any], output: Tensor) -> None:
    ids, positions = arguments["ids"], arguments["positions"]
    ctx.save_for_backward(ids, positions)
    tables = [(name, arguments[name]) for name in ("weight", "position_weight")]
    ctx.counts = {name: table.shape[0] for name, table in tables if table is not None}
    ctx.backend = arguments["backend"]


def _gradients(ctx: Any, needs: dict[str, bool], dout: Tensor) -> dict[str, Tensor | None]:
    ids, positions = ctx.saved_tensors
    places = {"weight": ids, "position_weight": None if positions is None else positions.expand(ids.shape)}
    return {
        name: _registered_backward(dout, places[name], count, ctx.backend)
        for name, count in ctx.counts.items()
        if needs[name]
    }


_registered = library.define(
    "embedding(Tensor ids, Tensor weight, Tensor? positions, Tensor? position_weight, str? backend) -> Tensor",
    _run,
    lambda ids, weight, **_: weight.new_empty((*ids.shape, weight.shape[1])),
)
_registered_backward = library.define(
    "embedding_backward(Tensor dout, Tensor ids, SymInt count, str? backend) -> Tensor",
    _run_backward,
    lambda dout, count, **_: dout.new_empty((count, dout.shape[-1])),
)
library.differentiate(_registered, _save, _gradients)
library.differentiate_through(
    _registered_backward, lambda dout, ids, count, backend: _backward_reference(dout, ids, count)
)

OP = Op(
    *("embedding", embedding, reference, cost, cases, baseline),
    take=_take,
    differentiable=("weight", "position_weight"),
    double_backward=True,
)
