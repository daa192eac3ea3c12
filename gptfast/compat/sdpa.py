"""F.scaled_dot_product_attention on ops.attention: for the length of a block, or as a provider of PyTorch's own hook.

    with gptfast.compat.sdpa.routed():
        model(x)                       # in this thread, all calls inside

    gptfast.compat.sdpa.register()     # offers it; nothing changes until somebody activates it
    torch.nn.attention.activate_flash_attention_impl("gptfast")
    torch.nn.attention.restore_flash_attention_impl()

The hook replaces PyTorch's fused kernel for the CPU alone: what PyTorch sends to its unfused path (dropout, a mask that
wants a gradient) never reaches it. A routed block covers all.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gptfast import ops

NAME = "gptfast"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """PyTorch's function with its names, shapes (..., H, S, D) and meaning on ops.attention; what the op can't serve
    (heads of several widths, nested tensors, mixed dtypes) goes to PyTorch's.

    is_causal is aligned top-left, as there. A query that may attend to nothing gives 0.
    """
    if not _fits(query, key, value, attn_mask, is_causal, enable_gqa):
        given: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **given, enable_gqa=enable_gqa)
    Sq, Sk = query.shape[-2], key.shape[-2]
    terms: dict[str, Any] = {"scale": scale}
    if is_causal and Sq <= Sk:
        key, value = key[..., :Sq, :], value[..., :Sq, :]  # the last query sees as many keys as there are queries
        terms["causal"] = True
    elif is_causal:
        terms["mask"] = torch.ones(Sq, Sk, dtype=torch.bool, device=query.device).tril()
    elif attn_mask is not None:
        terms["mask" if attn_mask.dtype == torch.bool else "bias"] = _four(attn_mask)
    if dropout_p:
        terms |= {"dropout_p": dropout_p, "seed": int(torch.randint(2**62, ()))}
    q, k, v = (_four(t).transpose(1, 2) for t in (query, key, value))
    out = ops.attention(q, k, v, backend=backend, **terms).transpose(1, 2)
    return out.reshape(*query.shape[:-1], value.shape[-1])


def _four(t: Tensor) -> Tensor:
    """(..., H, S, D) with one batch dimension."""
    if t.dim() > 4:
        return t.flatten(0, -4)
    return t[(None,) * (4 - t.dim())]


def _fits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, enable_gqa: bool) -> bool:
    if not all(type(t) in (Tensor, torch.nn.Parameter) and t.layout == torch.strided for t in (q, k, v)):
        return False
    alike = q.dim() == k.dim() == v.dim() >= 2 and q.dtype == k.dtype == v.dtype and q.is_floating_point()
    if not alike or k.shape != v.shape or q.shape[-1] != k.shape[-1] or q.shape[:-3] != k.shape[:-3]:
        return False
    kind = q.device.type
    if q.shape[-1] == 0 or (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return False  # PyTorch casts inside the call
    if q.dim() > 2 and q.shape[-3] != k.shape[-3] and not (enable_gqa and q.shape[-3] % k.shape[-3] == 0):
        return False
    if mask is None:
        return True
    wanted = (torch.bool, torch.float32, q.dtype)
    return not is_causal and mask.dtype in wanted and mask.dim() <= (4 if q.dim() <= 4 else 3)


class routed(TorchFunctionMode):
    """A context in which this thread's F.scaled_dot_product_attention runs on ops.attention; `calls` counts them."""

    def __init__(self, backend: str | None = None) -> None:
        super().__init__()
        self.backend, self.calls = backend, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.calls += 1
            return scaled_dot_product_attention(*args, **kwargs, backend=self.backend)
        return func(*args, **kwargs)


def register() -> None:
    """Offers "gptfast" to torch.nn.attention.activate_flash_attention_impl; again is harmless.

    Raises RuntimeError where this PyTorch has no such hook (before 2.11).
    """
    attention = torch.nn.attention
    if not hasattr(attention, "register_flash_attention_impl"):
        raise RuntimeError(
            f"gptfast.compat.sdpa expected a PyTorch with register_flash_attention_impl, got {torch.__version__}"
        )
    attention.register_flash_attention_impl(NAME, register_fn=_activate)


class _Handle:
    """Holds the overrides; without them PyTorch's own kernels are back."""

    def __init__(self, library: torch.library.Library) -> None:
        self.library: torch.library.Library | None = library

    def remove(self) -> None:
        if self.library is not None:
            self.library._destroy()
        self.library = None


def _activate() -> _Handle:
    library = torch.library.Library("aten", "IMPL", "CPU")
    library.impl("_scaled_dot_product_flash_attention_for_cpu", _flash_forward, "CPU")
    library.impl("_scaled_dot_product_flash_attention_for_cpu_backward", _flash_backward, "CPU")
    return _Handle(library)


def _flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """aten's contract: q, k, v (B, H, S, D) -> out (B, H, Sq, D) and the log-sum-exp (B, H, Sq)."""
    terms = _flash_terms(query, key, is_causal, attn_mask, scale)
    q, k, v = (t.transpose(1, 2) for t in (query, _cut(key, query, is_causal), _cut(value, query, is_causal)))
    with torch.no_grad():
        out, lse = ops.attention(q, k, v, return_lse=True, **terms)
    # compiled graphs count on the strides that aten's own kernel gives
    return _as(torch.empty_like(query), out.transpose(1, 2)), lse.transpose(1, 2).contiguous().transpose(1, 2)


def _as(like: Tensor, t: Tensor) -> Tensor:
    return t if t.stride() == like.stride() else like.copy_(t)


def _cut(t: Tensor, query: Tensor, is_causal: bool) -> Tensor:
    return t[:, :, : query.shape[2]] if is_causal else t


def _flash_terms(q: Tensor, k: Tensor, is_causal: bool, mask: Tensor | None, scale: float | None) -> dict[str, Any]:
    terms: dict[str, Any] = {"scale": scale}
    if is_causal and q.shape[2] <= k.shape[2]:
        terms["causal"] = True
    elif is_causal:
        terms["mask"] = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    if mask is not None:
        terms["mask" if mask.dtype == torch.bool else "bias"] = _four(mask)
    return terms


def _flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, by the op's own backward on the same inputs."""
    terms = _flash_terms(query, key, is_causal, attn_mask, scale)

    def gradients() -> tuple[Tensor, Tensor, Tensor]:
        leaves = [t.detach().requires_grad_() for t in (query, key, value)]
        q, k, v = leaves[0], _cut(leaves[1], query, is_causal), _cut(leaves[2], query, is_causal)
        again = ops.attention(*(t.transpose(1, 2) for t in (q, k, v)), **terms)
        grads = torch.autograd.grad(again, leaves, grad_out.transpose(1, 2))
        dq, dk, dv = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in grads)  # aten's own strides
        return dq, dk, dv

    return _elsewhere().submit(gradients).result()


@cache
def _elsewhere() -> ThreadPoolExecutor:
    """A thread of its own: in the one that calls an aten kernel PyTorch has switched autograd off."""
    return ThreadPoolExecutor(1, "gptfast-sdpa")
