"""Which backend serves a call, and why.

An explicit `backend=` raises with the reason if it can't; otherwise GPTFAST_BACKEND is preferred where it can, and
then the order below. Every automatic choice is logged once (logger "gptfast", level DEBUG) with its reason.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gptfast import kernels

ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
NAMES = ("reference", *kernels.BACKENDS)

log = logging.getLogger("gptfast")
_logged: set[tuple[str, str, tuple[str, ...]]] = set()


class BackendError(RuntimeError):
    """The backend that was asked for can't serve this call; the message says why."""


@dataclass(frozen=True)
class Choice:
    """Which backend serves a call; for each one that was passed over, the reason."""

    op: str
    backend: str
    passed_over: dict[str, str]

    def __str__(self) -> str:
        reasons = "".join(f"\n  not {name}: {reason}" for name, reason in self.passed_over.items())
        return f"{self.op} runs on {self.backend}{reasons}"


class Explain:
    """Given as `backend=`, makes a public function return its Choice instead of running."""

    def __init__(self, backend: str | None) -> None:
        self.backend = backend


def run(op: str, backend: str | Explain | None, reference: Callable[..., Any], device: Tensor, **arguments: Any) -> Any:
    """Calls the op on the backend that choose() picks. `device` is the tensor whose device decides.

    `op` is "page.function", or the page's name alone where its only function has the same name.
    """
    explain = isinstance(backend, Explain)
    choice, function = choose(op, backend.backend if isinstance(backend, Explain) else backend, device, arguments)
    if explain:
        return choice
    return reference(**arguments) if function is None else function(**arguments)


def choose(
    op: str, backend: str | None, device: Tensor, arguments: dict[str, Any]
) -> tuple[Choice, Callable[..., Any] | None]:
    """The backend for this call and its function (None = the reference)."""
    wanted = os.environ.get("GPTFAST_BACKEND") or None
    for name, source in ((backend, "backend="), (wanted, "GPTFAST_BACKEND=")):
        if name is not None and name not in NAMES:
            raise ValueError(f"{source}{name!r}: expected one of {', '.join(NAMES)}")
    if backend is not None:
        order: tuple[str, ...] = (backend,)
    else:
        order = ORDER.get(device.device.type, ("reference",))
        if wanted is not None:
            order = (wanted, *(name for name in order if name != wanted))
    passed_over: dict[str, str] = {}
    for name in order:
        if name == "reference":
            return _chosen(op, name, passed_over), None
        kernel = kernels.find(name, *_page_and_function(op))
        reason = kernel if isinstance(kernel, str) else kernel.supports(**arguments)
        if reason is None:
            assert not isinstance(kernel, str)
            return _chosen(op, name, passed_over), kernel.function
        passed_over[name] = reason
    raise BackendError(f"{op} can't run on backend {backend!r}: {passed_over[order[0]]}")


def _page_and_function(op: str) -> tuple[str, str]:
    page, _, function = op.partition(".")
    return page, function or page


def _chosen(op: str, backend: str, passed_over: dict[str, str]) -> Choice:
    if passed_over or log.isEnabledFor(logging.DEBUG):
        key = (op, backend, tuple(passed_over.values()))
        if key not in _logged:
            _logged.add(key)
            log.debug("%s", Choice(op, backend, passed_over))
    return Choice(op, backend, passed_over)


def explain(op: str | Callable[..., Any], *args: Any, backend: str | None = None, **kwargs: Any) -> Choice:
    """Which backend would serve this call and why the others would not.

    `op` is a public function of gptfast.ops or its name; the rest are the call's own arguments.
    """
    if isinstance(op, str):
        from gptfast import ops

        pages = ops.pages()
        if op not in pages:
            raise ValueError(f"no op is called {op!r}: expected one of {', '.join(sorted(pages))}")
        op = pages[op].function
    return op(*args, **kwargs, backend=Explain(backend))


def backends() -> dict[str, str | None]:
    """Every backend by name: None if it is here, else the reason why not."""
    return {"reference": None, **{name: kernels.reason_missing(name) for name in kernels.BACKENDS}}


def require(condition: bool, message: str) -> None:
    """Raises ValueError with a sentence that says expected and got."""
    if not condition:
        raise ValueError(message)


def shape(t: Tensor) -> str:
    """A tensor for an error message: its shape and dtype."""
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"
