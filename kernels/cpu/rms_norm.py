from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gptfast.kernels.cpu.layer_norm import normalise, supports

__all__ = ["prepare_rms_norm", "rms_norm", "supports"]


def rms_norm(**arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
    return prepare_rms_norm(**arguments)(**arguments)


def prepare_rms_norm(**arguments: Any) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    return normalise("rms_norm", **arguments)
