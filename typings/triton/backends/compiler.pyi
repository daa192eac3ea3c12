"""Triton, as far as type checkers are told: its kernels are a language of their own that only looks like Python."""

from typing import Any

def __getattr__(name: str) -> Any: ...
