from __future__ import annotations

import torch
from torch import Tensor

from gptfast import _cpu
from gptfast.kernels.cpu import DTYPES, empty, threads, unsupported


def supports(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **_) -> str | None:
    if cos.dtype != torch.float32:
        return f"it takes cos and sin in float32, not {str(cos.dtype).removeprefix('torch.')}"
    return unsupported(q, k, backward=True) or unsupported(cos, sin)


def supports_rope_backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, **_) -> str | None:
    return supports(dq, dk, cos, sin)


def rope_backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """A rotation's gradient is the rotation back."""
    return rope(dq, dk, cos, -sin, interleaved)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    cos, sin = cos.contiguous(), sin.contiguous()
    B, S, Hq, D = q.shape
    q_out, k_out = empty(q.shape, q.dtype), empty(k.shape, k.dtype)
    _cpu.rope(
        threads(q.numel() + k.numel()),
        q_out=q_out.data_ptr(),
        k_out=k_out.data_ptr(),
        q=q.data_ptr(),
        k=k.data_ptr(),
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        B=B,
        S=S,
        Hq=Hq,
        Hk=k.shape[2],
        D=D,
        R=2 * cos.shape[-1],
        q_b=q.stride(0),
        q_s=q.stride(1),
        q_h=q.stride(2),
        k_b=k.stride(0),
        k_s=k.stride(1),
        k_h=k.stride(2),
        table_b=cos.stride(0) if cos.dim() == 3 else 0,
        table_s=cos.shape[-1],
        interleaved=interleaved,
        dtype=DTYPES[q.dtype],
    )
    return q_out, k_out
