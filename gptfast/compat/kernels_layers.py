"""Layers that fit Hugging Face's `kernels` library: stateless modules whose forward takes the place of a layer's own.

    from kernels import LayerRepository, Mode, kernelize, register_kernel_mapping
    ...                                    # or, without a hub, for one instance:
    norm.forward = types.MethodType(gptfast.compat.kernels_layers.RMSNorm.forward, norm)

Each has the name that transformers' layers ask for (use_kernel_forward_from_hub), no constructor, no state: `self` is
the module that it serves, whose attributes it reads. has_backward and can_torch_compile are what kernelize() looks at.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gptfast import ops


class RMSNorm(nn.Module):
    """x (..., C) -> weight * x / sqrt(mean(x^2) + variance_epsilon)."""

    has_backward = True
    can_torch_compile = True
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class LayerNorm(nn.Module):
    """torch.nn.LayerNorm over the last dimension, with a weight."""

    has_backward = True
    can_torch_compile = True
    weight: Tensor
    bias: Tensor | None
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        return ops.layer_norm(input, self.weight, self.bias, self.eps)


class GeLU(nn.Module):
    """x (...) -> the exact GELU."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return ops.bias_gelu(input, approximate="none")


class GeluTanh(nn.Module):
    """x (...) -> the tanh form of GELU; NewGELU and FastGELU are other ways to write it."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return ops.bias_gelu(input, approximate="tanh")


NewGELU = FastGELU = GeluTanh


class SiluAndMul(nn.Module):
    """x (..., 2 F) -> silu(x[..., :F]) * x[..., F:]."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return ops.swiglu(gate, up)


class GeluAndMul(nn.Module):
    """x (..., 2 F) -> gelu(x[..., :F]) * x[..., F:], the exact GELU."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return ops.geglu(gate, up, approximate="none")


class SwiGLUMLP(nn.Module):
    """Llama's MLP: down_proj(silu(gate_proj(x)) * up_proj(x))."""

    has_backward = True
    can_torch_compile = True
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


LAYERS: dict[str, Any] = {
    layer.__name__: layer for layer in (RMSNorm, LayerNorm, GeLU, GeluTanh, SiluAndMul, GeluAndMul, SwiGLUMLP)
} | {"NewGELU": NewGELU, "FastGELU": FastGELU}


def rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """transformers' apply_rotary_pos_emb: q (B, H, S, D), k (B, Hk, S, D), cos and sin (B or 1, S, R), halves alike;
    with unsqueeze_dim = 2, q (B, S, H, D) and k (B, S, Hk, D)."""
    half = cos.shape[-1] // 2
    cos, sin = (t[..., :half].float().expand(q.shape[0], -1, -1) for t in (cos, sin))
    if unsqueeze_dim == 2:
        return ops.rope(q, k, cos, sin)
    q, k = ops.rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)
