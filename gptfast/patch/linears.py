"""Projections by ops.linear: those of a few rows without gradients, as in decoding, where PyTorch's read the weights at
half the speed that memory has, and those in training. Nothing is copied or laid out anew, also not the weights of
transformers' Conv1D, which lie the other way round."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptfast import kernels, ops
from gptfast.patch.changes import Replacement

ROWS = 16  # beyond, without gradients, the large products are PyTorch's

_joined = False


def join_pytorch(join: bool) -> None:
    """Whether CPU kernels run on PyTorch's threads (kernels/cpu/openmp.h). In decoding they come between many small ops
    of PyTorch's, each of which would wait for its threads to wake; in training they are long, and better on our own."""
    global _joined
    if join != _joined and kernels.reason_missing("cpu") is None:
        from gptfast.kernels.cpu import join_pytorch as join_kernels

        join_kernels(join)
        _joined = join


class Linear(Replacement):
    """The forward of a projection."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) == 1 and not kwargs and (y := served(self.module, args[0], True, self.backend)) is not None:
            return y
        return self.original(*args, **kwargs)


def served(layer: Any, x: Tensor, bias: bool, backend: str | None) -> Tensor | None:
    """The projection of x by ops.linear, with or without its bias, where it is for that; else None."""
    weight: Any = layer.weight
    if not x.is_cpu or x.dtype != weight.dtype or x.numel() == 0:
        return None
    trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    join_pytorch(not trained)
    if not trained and x.numel() > ROWS * x.shape[-1]:
        return None
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return None
    rows = weight if isinstance(layer, nn.Linear) else weight.t()  # whose class a parametrization changes
    if x.shape[-1] != rows.shape[1]:
        return None  # PyTorch says what is wrong
    return ops.linear(x, rows, layer.bias if bias else None, backend=backend)


def product(layer: nn.Module, x: Tensor, backend: str | None) -> tuple[Tensor, Tensor | None]:
    """layer(x) as a product and the bias still to be added; whole, and None, where the layer is no plain projection."""
    forward = layer.__dict__.get("forward")
    plain = forward is None or type(forward) is Linear
    bias = layer._parameters.get("bias")
    if not plain or bias is None or layer._forward_hooks or layer._forward_pre_hooks or not is_projection(layer):
        return layer(x), None
    if forward is not None and (h := served(layer, x, False, backend)) is not None:
        return h, bias
    weight: Any = layer.weight
    return F.linear(x, weight if type(layer) is nn.Linear else weight.t()), bias


def is_projection(module: nn.Module) -> bool:
    """An nn.Linear, or transformers' Conv1D, whose weight lies the other way round; no subclass of theirs."""
    if type(module) is nn.Linear:
        return True
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def sizes(module: nn.Module) -> tuple[int, int]:
    """The widths that a projection takes and gives."""
    weight: Any = module.weight
    N, K = weight.shape
    return (K, N) if type(module) is nn.Linear else (N, K)
