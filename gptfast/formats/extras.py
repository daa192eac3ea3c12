"""Optional dependencies: imported when first needed, and named with their pip command when missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def need(module: str, extra: str) -> Any:
    """The imported module, or an ImportError that says how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        message = f"this needs the package {package}: run `pip install 'gptfast-kernels[{extra}]'`"
        raise ImportError(message, name=package) from error
