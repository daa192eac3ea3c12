"""The ops: one page each, with its meaning, reference, cost, cases and public function."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from gptfast.ops.adamw import adamw, gradient_norm
from gptfast.ops.advantages import gae, group_advantages, whiten
from gptfast.ops.attention import attention, attention_kvcache
from gptfast.ops.cross_entropy import cross_entropy, linear_cross_entropy
from gptfast.ops.dispatch import BackendError, Choice, backends, explain
from gptfast.ops.embedding import embedding
from gptfast.ops.layer_norm import layer_norm
from gptfast.ops.linear import linear
from gptfast.ops.mlp import bias_gelu, geglu, swiglu
from gptfast.ops.policy import kl_estimate, policy_loss, value_loss
from gptfast.ops.preference import dpo_loss, kto_loss, orpo_loss, reward_loss, simpo_loss
from gptfast.ops.rms_norm import rms_norm
from gptfast.ops.rope import rope, rope_frequencies, rope_tables
from gptfast.ops.sampling import sample
from gptfast.ops.spec import Op
from gptfast.ops.speculative_sampling import speculative_sampling
from gptfast.ops.token_logprobs import token_kl, token_logprobs

__all__ = [
    "BackendError",
    "Choice",
    "adamw",
    "attention",
    "attention_kvcache",
    "backends",
    "bias_gelu",
    "cross_entropy",
    "dpo_loss",
    "embedding",
    "explain",
    "gae",
    "geglu",
    "gradient_norm",
    "group_advantages",
    "kl_estimate",
    "kto_loss",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "orpo_loss",
    "pages",
    "policy_loss",
    "reward_loss",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "rope_tables",
    "sample",
    "simpo_loss",
    "speculative_sampling",
    "swiglu",
    "token_kl",
    "token_logprobs",
    "value_loss",
    "whiten",
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
