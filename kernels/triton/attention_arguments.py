"""What attention's launches have in common: what they refuse, sizes, strides and terms as kernels take them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gptfast.kernels.triton import arch, cdiv, tiles, unsupported
from triton.tools.tensor_descriptor import TensorDescriptor


def refuses(q: Tensor, k: Tensor, v: Tensor, terms: dict[str, Any], backward: bool = False) -> str | None:
    if q.shape[-1] > 256:
        return f"it takes heads of up to 256 dimensions, not {q.shape[-1]}"
    others = (terms.get(n) for n in ("k", "v", "cos", "sin", "bias", "sinks"))
    return unsupported(q, k, v, *others, backward=backward)


def shared(
    q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None, alibi_slopes: Tensor | None, causal: bool,
    scale: float | None, window: tuple[int, int], softcap: float, cu: Tensor | None,
) -> dict[str, Any]:  # fmt: skip
    """The arguments that forward and backward have in common."""
    H, D = q.shape[-2:]
    scale = 1 / math.sqrt(D) if scale is None else scale
    right = 0 if causal and window[1] != 0 else window[1]
    named: dict[str, Any] = {}
    for name, t in (("mask", mask), ("bias", bias)):
        full = (0, 0, 0, 0) if t is None else t.expand(q.shape[0], H, q.shape[1], k.shape[1]).stride()
        named |= {f"{name}_{axis}": stride for axis, stride in zip("bhij", full)}
    return named | {
        **{"left": window[0], "right": right, "scale": float(scale), "softcap": float(softcap)},
        **{"HAS_LEFT": window[0] >= 0, "HAS_RIGHT": right >= 0, "USE_SOFTCAP": softcap > 0},
        # Scores of a scale that isn't positive are scaled before their maximum is taken.
        "HAS_TERMS": softcap > 0 or alibi_slopes is not None or bias is not None or scale <= 0,
        "slopes_batch": H if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0,
        "IS_EXACT": q.dtype == torch.float32,
        "BLOCK_B": 1 if cu is None else tiles.next_power_of_2(len(cu)),
    }


def is_plain(terms: dict[str, Any], mask: Tensor | None, dropout_p: float) -> bool:
    """Whether scores are products of q and k alone, with shared()'s arguments: tiles then have more registers."""
    return not terms["HAS_TERMS"] and mask is None and not dropout_p


def grid(q: Tensor, BLOCK: int, cu: Tensor | None, H: int | None = None) -> tuple[int, int]:
    """(heads x batch, blocks). Of sequences end to end: as many blocks as there can be at most."""
    H = q.shape[-2] if H is None else H
    if cu is None:
        return q.shape[0] * H, cdiv(q.shape[1], BLOCK)
    N = len(cu) - 1
    return H, min(q.shape[0], q.shape[0] // BLOCK + N) if q.shape[0] else 0


def described(t: Tensor, block: list[int]) -> TensorDescriptor | None:
    """What Hopper and later copy blocks of (B, S, H, D) by, without addresses in registers; None where it can't be: its
    addresses and strides are multiples of 16 bytes. Sequences end to end would be read beyond their own end. It is one
    of (B, H, S, D): leading dimensions of 1 drop out of a block, and copies of two tensors share a barrier."""
    if not arch(t).startswith("sm_") or int(arch(t)[3:]) < 90 or t.dim() != 4 or t.element_size() != 2:
        return None
    steps = t.stride()[:-1]
    if t.numel() == 0 or t.data_ptr() % 16 or any(n <= 0 or n % 8 for n in steps):
        return None
    t = t.transpose(1, 2)
    return TensorDescriptor(t, list(t.shape), list(t.stride()), block)


def with_rows(t: Tensor) -> Tensor:
    """t with a contiguous last dimension, copied only where it hasn't one."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def floats(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous().float()


def edges(cu: Tensor | None) -> Tensor | None:
    return None if cu is None else cu.contiguous()


def strides(**tensors: Tensor) -> dict[str, Any]:
    """Batch, row and head stride of (B, S, H, D) or (T, H, D), by the names of the kernels' arguments."""
    named = {}
    for name, t in tensors.items():
        batch = t.stride(0) if t.dim() == 4 else 0
        named |= {f"{name}_batch": batch, f"{name}_row": t.stride(-3), f"{name}_head": t.stride(-2)}
    return named
