"""Other libraries' kernels that `make gpu-check` times where they are installed: flash-attn, Liger, FlashInfer. Each is
given a call only if it means the same by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

Call = Callable[..., Any]  # takes the arguments of our op


def rivals(op: str, arguments: Mapping[str, Any]) -> dict[str, Call]:
    """By library, what computes this call; empty where none is installed that does."""
    found: dict[str, Call] = {}
    for name, make in RIVALS.get(op, {}).items():
        try:
            call = make(arguments)
        except ImportError:
            continue
        if call is not None:
            found[name] = call
    return found


def _only(arguments: Mapping[str, Any], *names: str) -> bool:
    """Whether a call has no other arguments than these (or has them as None)."""
    return {name for name, value in arguments.items() if value is not None} <= set(names)


def _flash_attn(arguments: Mapping[str, Any]) -> Call | None:
    if not _only(arguments, "q", "k", "v", "causal", "scale") or arguments["q"].dtype == torch.float32:
        return None
    function = import_module("flash_attn").flash_attn_func

    def call(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None) -> Tensor:
        return function(q, k, v, causal=causal, softmax_scale=scale)

    return call


def _liger() -> Any:
    return import_module("liger_kernel.transformers.functional")


def _liger_layer_norm(arguments: Mapping[str, Any]) -> Call | None:
    if not _only(arguments, "x", "weight", "bias", "eps") or arguments.get("bias") is None:
        return None
    function = _liger().liger_layer_norm
    return lambda x, weight, bias, eps=1e-5: function(x, weight, bias, eps)


def _liger_rms_norm(arguments: Mapping[str, Any]) -> Call | None:
    if not _only(arguments, "x", "weight", "eps"):
        return None
    function = _liger().liger_rms_norm
    return lambda x, weight, eps=1e-6: function(x, weight, eps, in_place=False)


def _liger_swiglu(arguments: Mapping[str, Any]) -> Call | None:
    function = _liger().liger_swiglu
    return lambda gate, up: function(gate, up)


def _liger_geglu(arguments: Mapping[str, Any]) -> Call | None:
    if arguments.get("approximate", "tanh") != "tanh":
        return None
    function = _liger().liger_geglu
    return lambda gate, up, approximate="tanh": function(gate, up)


def _liger_cross_entropy(arguments: Mapping[str, Any]) -> Call | None:
    if not _only(arguments, "logits", "target"):
        return None
    function = _liger().liger_cross_entropy
    # It leaves the gradient where the logits were, so that a second run needs them again.
    return lambda logits, target: function(logits.clone(), target)


def _liger_linear_cross_entropy(arguments: Mapping[str, Any]) -> Call | None:
    if not _only(arguments, "x", "weight", "target"):
        return None
    function = _liger().liger_fused_linear_cross_entropy
    return lambda x, weight, target: function(x, weight, target)


def _flashinfer_rms_norm(arguments: Mapping[str, Any]) -> Call | None:
    x = arguments["x"]
    if not _only(arguments, "x", "weight", "eps") or x.dim() != 2 or x.dtype == torch.float32 or x.requires_grad:
        return None
    function = import_module("flashinfer.norm").rmsnorm
    return lambda x, weight, eps=1e-6: function(x, weight, eps)


def _flashinfer_sample(arguments: Mapping[str, Any]) -> Call | None:
    if not _only(arguments, "logits", "top_k", "top_p", "seed", "seeds") or "top_p" not in arguments:
        return None
    sampling = import_module("flashinfer.sampling")

    def call(logits: Tensor, top_p: float, top_k: int = 0, **_: Any) -> Tensor:
        logits = logits.float()
        if top_k:
            return sampling.top_k_top_p_sampling_from_logits(logits, top_k, top_p, filter_apply_order="top_k_first")
        return sampling.top_p_sampling_from_probs(logits.softmax(-1), top_p)

    return call


RIVALS: dict[str, dict[str, Callable[[Mapping[str, Any]], Call | None]]] = {
    "attention": {"flash-attn": _flash_attn},
    "layer_norm": {"liger": _liger_layer_norm},
    "rms_norm": {"liger": _liger_rms_norm, "flashinfer": _flashinfer_rms_norm},
    "swiglu": {"liger": _liger_swiglu},
    "geglu": {"liger": _liger_geglu},
    "cross_entropy": {"liger": _liger_cross_entropy},
    "linear_cross_entropy": {"liger": _liger_linear_cross_entropy},
    "sample": {"flashinfer": _flashinfer_sample},
}
NAMES = tuple(dict.fromkeys(name for by in RIVALS.values() for name in by))
