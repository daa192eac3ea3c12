"""gptfast.patch: our kernels in a model that exists, one module at a time, and out of it again.

    report = gptfast.patch(model)          # which module got what, and for each that didn't, why not
    gptfast.unpatch(model)                 # bit for bit as before
    with gptfast.patched(model): ...

Nothing outside the model changes (but whose threads CPU kernels run on without gradients: linears.py). Its modules
keep their classes, parameters, state_dict keys and hooks; what is put in their place stands in each module's own
dictionary, and copies and pickles with it. What a module computes is recognised by trying it beside the formulas
(probe.py), not by its name; a model whose parts nobody knows is left alone, with the reasons in the report.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from gptfast.patch.changes import kept, undo
from gptfast.patch.linears import join_pytorch
from gptfast.patch.report import Entry, PatchReport

__all__ = ["Entry", "PatchReport", "patch", "patched", "unpatch"]


def patch(
    model: nn.Module,
    *,
    attention: bool = True,
    norm: bool = True,
    mlp: bool = True,
    rope: bool = True,
    loss: bool = True,
    linear: bool = True,
    backend: str | None = None,
) -> PatchReport:
    """Puts our kernels into a model: Hugging Face's, nanoGPT's, or any nn.Module with parts that we know.

    attention: attn_implementation="gptfast" where the model is transformers', else F.scaled_dot_product_attention
        inside the modules that call it.
    norm: modules that compute LayerNorm or RMSNorm over the last dimension. mlp: gelu, swiglu and geglu between
        projections, and GELUs that stand alone. rope: half-split rotary embeddings of transformers' attention modules.
    loss: the next-token loss of a transformers model that is being trained, without storing its logits; they are then
        made only for who asks the output for them.
    linear: projections of a few rows without gradients, as in decoding.
    backend: for all ops, as in gptfast.ops.

    Again on a patched model it changes nothing but a backend that differs. Raises TypeError for what is no nn.Module,
    ValueError for a backend that doesn't exist.
    """
    from gptfast.patch.apply import apply

    kinds = {"attention": attention, "norm": norm, "mlp": mlp, "rope": rope, "loss": loss, "linear": linear}
    return apply(model, {kind for kind, wanted in kinds.items() if wanted}, backend)


def unpatch(model: nn.Module) -> None:
    """Takes back all that patch() did to the model and the modules in it; harmless on one that isn't patched."""
    undo(model)
    join_pytorch(False)


@contextmanager
def patched(model: nn.Module, **options: Any) -> Iterator[PatchReport]:
    """patch(model, **options) for the length of a block, also where it ends by an exception; a model that was patched
    before is so afterwards, as it was."""
    with kept(model):
        yield patch(model, **options)


class _Callable(types.ModuleType):
    """`import gptfast.patch` makes the name gptfast.patch this module: it may be called like the function."""

    def __call__(self, model: nn.Module, **options: Any) -> PatchReport:
        return patch(model, **options)


sys.modules[__name__].__class__ = _Callable
