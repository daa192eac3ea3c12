"""gptfast: fused kernels that make GPT models fast and mean the same thing on every machine."""

from __future__ import annotations

from gptfast import ops
from gptfast.ops.dispatch import BackendError, Choice, backends, explain

__version__ = "0.1.0"
__all__ = ["BackendError", "Choice", "backends", "explain", "ops"]
