"""MLPs: the activation fused with the bias before it (bias_gelu) or with the product after it (swiglu, geglu).

The projections stay the model's own modules and are called as such, so that adapters and hooks on them go on working;
only the bias of a plain one is taken over by the activation behind it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from gptfast import ops
from gptfast.patch import probe
from gptfast.patch.changes import Replacement
from gptfast.patch.linears import is_projection, product, sizes

GELUS = {"tanh": "ops.bias_gelu", "none": "ops.bias_gelu, the exact one"}


class Plain(NamedTuple):
    """dropout(down(gelu(up(x)))), by the children's names; no dropout where its name is None."""

    up: str
    down: str
    dropout: str | None
    approximate: str

    def __str__(self) -> str:
        return f"{GELUS[self.approximate]} between {self.up} and {self.down}"


class Gated(NamedTuple):
    """down(act(gate(x)) * up(x)), by the children's names; act is "silu" or one of gelu's two forms."""

    gate: str
    up: str
    down: str
    act: str

    def __str__(self) -> str:
        op = "ops.swiglu" if self.act == "silu" else "ops.geglu" + ", the exact one" * (self.act == "none")
        return f"{op} of {self.gate} and {self.up}"


class PlainMLP(Replacement):
    """The forward of an MLP of two projections."""

    def __init__(self, module: nn.Module, form: Plain, backend: str | None) -> None:
        super().__init__(module, backend)
        self.form = form

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs:
            return self.original(*args, **kwargs)
        children = self.module._modules
        up, down = children[self.form.up], children[self.form.down]
        assert up is not None and down is not None
        h, bias = product(up, args[0], self.backend)
        if bias is not None and bias.dtype != h.dtype:  # as under autocast
            h, bias = h + bias, None
        y = down(ops.bias_gelu(h, bias, approximate=self.form.approximate, backend=self.backend))
        dropout = children[self.form.dropout] if self.form.dropout is not None else None
        return y if dropout is None else dropout(y)


class GatedMLP(Replacement):
    """The forward of an MLP of three projections."""

    def __init__(self, module: nn.Module, form: Gated, backend: str | None) -> None:
        super().__init__(module, backend)
        self.form = form

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs:
            return self.original(*args, **kwargs)
        gate, up, down = (self.module._modules[name] for name in self.form[:3])
        assert gate is not None and up is not None and down is not None
        g, u, act = gate(args[0]), up(args[0]), self.form.act
        if act == "silu":
            return down(ops.swiglu(g, u, backend=self.backend))
        return down(ops.geglu(g, u, approximate=act, backend=self.backend))


class Activation(Replacement):
    """The forward of a GELU that stands alone."""

    def __init__(self, module: nn.Module, approximate: str, backend: str | None) -> None:
        super().__init__(module, backend)
        self.approximate = approximate

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs:
            return self.original(*args, **kwargs)
        return ops.bias_gelu(args[0], approximate=self.approximate, backend=self.backend)


def recognise(module: nn.Module) -> Plain | Gated | str | None:
    """What an MLP computes; a sentence where no op does, None where it is none."""
    children = dict(module.named_children())
    layers = {name: sizes(m) for name, m in children.items() if is_projection(m)}
    others = {name: m for name, m in children.items() if name not in layers}
    dropouts = [name for name, m in others.items() if isinstance(m, nn.Dropout)]
    if any(_holds_something(m) for m in others.values()) or len(dropouts) > 1 or len(layers) not in (2, 3):
        return None
    width = next(iter(layers.values()))[0]
    names = list(layers)
    down = names[-1]
    if any(layers[n] != layers[down][::-1] or layers[n][0] != width for n in names[:-1]):
        return None
    candidates: list[Plain | Gated] = []
    if len(names) == 2:
        candidates = [Plain(names[0], down, (dropouts or [None])[0], a) for a in ("tanh", "none")]
    elif not dropouts:
        pairs = (names[:2], names[1::-1])
        candidates = [Gated(g, u, down, act) for act in ("silu", "tanh", "none") for g, u in pairs]
    return probe.first_match(module, candidates, _build, (3, width))


def _build(module: nn.Module, form: Plain | Gated) -> Replacement:
    return PlainMLP(module, form, None) if isinstance(form, Plain) else GatedMLP(module, form, None)


def _holds_something(module: nn.Module) -> bool:
    """Whether a module beside the projections is more than an activation or a dropout."""
    return any(True for _ in module.children()) or any(True for _ in (*module.parameters(), *module.buffers()))


def recognise_activation(module: nn.Module) -> str | None:
    """The form of GELU that a module is: "tanh" or "none"; None where it is neither."""
    if type(module) is nn.GELU:
        return module.approximate
    if _holds_something(module) or isinstance(module, nn.Dropout | nn.Identity | nn.ModuleList | nn.ModuleDict):
        return None
    found = probe.first_match(module, ("tanh", "none"), lambda m, a: Activation(m, a, None), (3, 64), (1.0, 3.0))
    return found if found in ("tanh", "none") else None


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation of torch's or transformers' own."""
    return type(module).__module__ in ("torch.nn.modules.activation", "transformers.activations") and not (
        _holds_something(module)
    )
