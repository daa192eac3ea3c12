"""The ops: one page each, with its meaning, reference, cost, cases and public function."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from gptfast.ops.attention import attention, attention_kvcache
from gptfast.ops.cross_entropy import cross_entropy, linear_cross_entropy
from gptfast.ops.dispatch import BackendError, Choice, backends, explain
from gptfast.ops.embedding import embedding
from gptfast.ops.layer_norm import layer_norm
from gptfast.ops.linear import linear
from gptfast.ops.mlp import bias_gelu, geglu, swiglu
from gptfast.ops.rms_norm import rms_norm
from gptfast.ops.rope import rope, rope_frequencies, rope_tables
from gptfast.ops.sampling import sample
from gptfast.ops.spec import Op
from gptfast.ops.token_logprobs import token_kl, token_logprobs

__all__ = [
    "BackendError",
    "Choice",
    "attention",
    "attention_kvcache",
    "backends",
    "bias_gelu",
    "cross_entropy",
    "embedding",
    "explain",
    "geglu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "pages",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "rope_tables",
    "sample",
    "swiglu",
    "token_kl",
    "token_logprobs",
]


@cache
def pages() -> dict[str, Op]:
    """Every op by name: each module of this package that declares one."""
    found: dict[str, Op] = {}
    for info in pkgutil.iter_modules(__path__):
        page = importlib.import_module(f"gptfast.ops.{info.name}")
        for op in getattr(page, "OPS", [page.OP] if hasattr(page, "OP") else []):
            found[op.name] = op
    return found
