from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gptfast.kernels.cpu.layer_norm import normalise, normalise_backward, normalise_forward, supports
from gptfast.kernels.cpu.layer_norm import supports_layer_norm_backward as supports_rms_norm_backward

__all__ = [
    "prepare_rms_norm",
    "prepare_rms_norm_backward",
    "prepare_rms_norm_forward",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_forward",
    "supports",
    "supports_rms_norm_backward",
]


def rms_norm(**arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
    return prepare_rms_norm(**arguments)(**arguments)


def prepare_rms_norm(**arguments: Any) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    return normalise("rms_norm", **arguments)


def rms_norm_forward(**arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return prepare_rms_norm_forward(**arguments)(**arguments)


def prepare_rms_norm_forward(**arguments: Any) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    return normalise_forward("rms_norm", **arguments)


def rms_norm_backward(**arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return prepare_rms_norm_backward(**arguments)(**arguments)


def prepare_rms_norm_backward(**arguments: Any) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    return normalise_backward("rms_norm", **arguments)
