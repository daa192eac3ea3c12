"""Which backend serves a call, and why.

An explicit `backend=` raises with the reason if it can't; otherwise GPTFAST_BACKEND is preferred where it can, and
then the order below. Every automatic choice is logged once (logger "gptfast", level DEBUG) with its reason.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gptfast import kernels

ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
PLAIN = {type(None), bool, int, float, str, tuple}  # part of a key as they are
NAMES = ("reference", *kernels.BACKENDS)

log = logging.getLogger("gptfast")


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
    if isinstance(backend, Explain):
        return choose(op, backend.backend, device, arguments)[0]
    function = choose(op, backend, device, arguments)[1]
    return reference(**arguments) if function is None else function(**arguments)


def as_reference_compiled(
    op: str, backend: str | Explain | None, reference: Callable[..., Any], device: Tensor, **arguments: Any
) -> Any:
    """run() for ops that torch.compile fuses as well as any kernel could: it traces the reference and nothing of the
    choice."""
    if backend is None and torch.compiler.is_compiling():
        return reference(**arguments)
    return run(op, backend, reference, device, **arguments)


def prepared(
    op: str,
    backend: str | Explain | None,
    reference: Callable[..., Any],
    device: Tensor,
    arguments: dict[str, Any],
    check: Callable[..., None] = lambda **_: None,
) -> Callable[..., Any]:
    """run() for ops whose calls are so short that checking and choosing would take longer: the function to call with
    the same arguments.

    A call is checked by check(**arguments), its backend chosen and its launch prepared (by the backend's
    prepare_<function>, where it has one) once for each signature; what depends on the contents of tensors is the
    caller's to check each time.
    """
    if isinstance(backend, Explain):
        check(**arguments)
        choice = choose(op, backend.backend, device, arguments)[0]
        return lambda **_: choice
    key = (op, backend, preferred(), torch.is_grad_enabled(), torch.get_num_threads(), *signature(arguments))
    try:
        function = _prepared.get(key)
    except TypeError:  # what can't be part of a key fits no op: the check says what was expected
        check(**arguments)
        raise
    if function is None:
        check(**arguments)
        choice, function = choose(op, backend, device, arguments)
        kernel = None if function is None else _find(choice.backend, op)
        if isinstance(kernel, kernels.Kernel) and kernel.prepare is not None:
            function = kernel.prepare(**arguments)
        if len(_prepared) >= 1024:  # shapes that change from call to call
            _prepared.clear()
        function = _prepared[key] = function or reference
    return function


_prepared: dict[Any, Callable[..., Any]] = {}


class Plan:
    """What calls of one signature share: how they are launched, and each kind of backward pass that has followed one,
    once they are known."""

    __slots__ = "backward", "forward"

    def __init__(self) -> None:
        self.forward: Callable[..., Any] | None = None
        self.backward: dict[Any, Callable[..., Any]] = {}


def served(op: str, backend: str | None, arguments: dict[str, Any], check: Callable[..., None]) -> Plan | None:
    """The plan of a call that a kernel serves; checked and found out once for each signature, as in prepared()."""
    key = (op, backend, preferred(), torch.get_num_threads(), *signature(arguments))
    plan = UNKNOWN
    with suppress(TypeError):  # of what can't be part of a key
        plan = _served.get(key, UNKNOWN)
    if plan is UNKNOWN:
        check(**arguments)
        device = next(x for x in arguments.values() if isinstance(x, Tensor))
        plan = None if choose(op, backend, device, arguments)[1] is None else Plan()
        if len(_served) >= 1024:
            _served.clear()
        with suppress(TypeError):
            _served[key] = plan
    return plan


UNKNOWN = Plan()
_served: dict[Any, Plan | None] = {}


def signature(arguments: dict[str, Any]) -> list[Any]:
    """All of the arguments but what the tensors hold and where; a packed weight has its own `signature`.

    Whether a tensor wants a gradient counts where gradients are made.
    """
    grad = torch.is_grad_enabled()
    return [
        x
        if (kind := type(x)) in PLAIN
        else (x.shape, x.stride(), x.dtype, x.device, grad and x.requires_grad)
        if kind is Tensor or isinstance(x, Tensor)
        else getattr(x, "signature", x)
        for x in arguments.values()
    ]


# A mapping of bytes in CPython on POSIX: os.environ.get encodes, decodes and, for a variable that isn't there, raises
# and catches two errors, which takes 2 us.
_environment: dict[Any, Any] | None = getattr(os.environ, "_data", None) if os.name == "posix" else None


def preferred() -> Any:
    """GPTFAST_BACKEND as part of a key: its bytes, where that is quicker."""
    return os.environ.get("GPTFAST_BACKEND") if _environment is None else _environment.get(b"GPTFAST_BACKEND")


def choose(
    op: str, backend: str | None, device: Tensor, arguments: dict[str, Any]
) -> tuple[Choice, Callable[..., Any] | None]:
    """The backend for this call and its function (None = the reference)."""
    order = _order(backend, preferred(), device.device.type)
    passed_over: tuple[tuple[str, str], ...] = ()
    for name in order:
        if name == "reference":
            return _chosen(op, name, passed_over), None
        kernel = _find(name, op)
        reason = kernel if isinstance(kernel, str) else kernel.supports(**arguments)
        if reason is None:
            assert not isinstance(kernel, str)
            return _chosen(op, name, passed_over), kernel.function
        passed_over = (*passed_over, (name, reason))
    raise BackendError(f"{op} can't run on backend {backend!r}: {dict(passed_over)[order[0]]}")


@cache
def _order(backend: str | None, preferred: Any, device: str) -> tuple[str, ...]:
    """The backends to try, in order: the one asked for, or GPTFAST_BACKEND (`preferred`) and then the device's own."""
    wanted = os.fsdecode(preferred) if preferred else None
    for name, source in ((backend, "backend="), (wanted, "GPTFAST_BACKEND=")):
        if name is not None and name not in NAMES:
            raise ValueError(f"{source}{name!r}: expected one of {', '.join(NAMES)}")
    if backend is not None:
        return (backend,)
    order = ORDER.get(device, ("reference",))
    return order if wanted is None else (wanted, *(name for name in order if name != wanted))


@cache
def _find(backend: str, op: str) -> kernels.Kernel | str:
    page, _, function = op.partition(".")
    return kernels.find(backend, page, function or page)


@cache  # one Choice, and one line in the log, for each way a call was decided
def _chosen(op: str, backend: str, passed_over: tuple[tuple[str, str], ...]) -> Choice:
    choice = Choice(op, backend, dict(passed_over))
    log.debug("%s", choice)
    return choice


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


def require(condition: bool, message: str | Callable[[], str]) -> None:
    """Raises ValueError with a sentence that says expected and got; give it as a lambda where making it costs time."""
    if not condition:
        raise ValueError(message if isinstance(message, str) else message())


def require_numbers(op: str, **arguments: Any) -> None:
    """Raises ValueError for a tensor in a number's place: a prepared call is known again by the shapes of tensors, not
    by what they hold."""
    for name, x in arguments.items():
        if isinstance(x, Tensor) or (isinstance(x, tuple) and any(isinstance(y, Tensor) for y in x)):
            raise ValueError(f"{op}: expected {name} as a plain number, got a tensor, {x}")


def unreadable(t: Tensor) -> bool:
    """Whether a CUDA graph is captured now that this tensor's values are for: nobody may wait for them then."""
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def shape(t: Tensor | None) -> str:
    """A tensor for an error message: its shape and dtype."""
    if t is None:
        return "None"
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"
