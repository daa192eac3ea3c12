from __future__ import annotations

from typing import Any

from torch import Tensor

from gptfast import _cpu
from gptfast.kernels.cpu.layer_norm import normalise, supports

__all__ = ["rms_norm", "supports"]


def rms_norm(x: Tensor, weight: Tensor, **rest: Any) -> Tensor | tuple[Tensor, Tensor]:
    return normalise(_cpu.rms_norm, x, weight, **rest)
