from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptfast.kernels.cpu import DTYPES, prepare, threads, unsupported


def supports(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **_) -> str | None:
    if cos.dtype != torch.float32:
        return f"it takes cos and sin in float32, not {str(cos.dtype).removeprefix('torch.')}"
    return unsupported(q, k, backward=True) or unsupported(cos, sin)


def supports_rope_backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, **_) -> str | None:
    return supports(dq, dk, cos, sin)


def rope_backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return rope(q=dq, k=dk, cos=cos, sin=-sin, interleaved=interleaved)


def prepare_rope_backward(
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A rotation's gradient is the rotation back."""
    turn = prepare_rope(dq, dk, cos, -sin, interleaved)
    return lambda dq, dk, cos, sin, **_: turn(q=dq, k=dk, cos=cos, sin=-sin)


def rope(**arguments: Any) -> tuple[Tensor, Tensor]:
    return prepare_rope(**arguments)(**arguments)


def prepare_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> Callable[..., tuple[Tensor, Tensor]]:
    B, S, Hq, D = q.shape
    (q_b, q_s, q_h, _), (k_b, k_s, k_h, _) = _last_whole(q).stride(), _last_whole(k).stride()
    return prepare(
        "rope",
        threads(q.numel() + k.numel()),
        {"q_out": (q.shape, q.dtype), "k_out": (k.shape, k.dtype)},
        {
            **{"q": ("q", _last_whole), "k": ("k", _last_whole)},
            **{"cos": ("cos", Tensor.contiguous), "sin": ("sin", Tensor.contiguous)},
        },
        dict(q=q, k=k, cos=cos, sin=sin),
        results=2,
        **dict(B=B, S=S, Hq=Hq, Hk=k.shape[2], D=D, R=2 * cos.shape[-1]),
        **dict(q_b=q_b, q_s=q_s, q_h=q_h, k_b=k_b, k_s=k_s, k_h=k_h),
        table_b=cos.shape[-2] * cos.shape[-1] if cos.dim() == 3 else 0,
        table_s=cos.shape[-1],
        interleaved=interleaved,
        dtype=DTYPES[q.dtype],
    )


def _last_whole(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()
