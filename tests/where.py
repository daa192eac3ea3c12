"""What this session tests: the CPU's backends; in a process with TRITON_INTERPRET=1, Triton's kernels, interpreted; and
with `pytest --device cuda`, a GPU's backends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gptfast import ops
from gptfast.kernels import reason_missing
from gptfast.ops.spec import Case, Op, map_tensors
from gptfast.quantize import QuantizedWeight

device = "cpu"  # conftest.py sets it before tests are imported
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Elements of a case's tensors. An interpreted program takes milliseconds whatever it does, and a row may be a program.
LARGEST_INTERPRETED = 1 << 19


def on_the_cpu() -> bool:
    """Whether this is the session of the CPU's backends, whose tests the others don't repeat."""
    return device == "cpu" and not INTERPRETED


def backends() -> list[str]:
    """The backends with kernels that this session tests."""
    wanted = ["cpu"] if on_the_cpu() else ["triton"] if INTERPRETED else ["triton", "cuda"]
    return [name for name in wanted if reason_missing(name) is None]


# Kernels whose names don't begin with that of each op that they serve.
SERVES = {
    "product": ("linear",),
    "vocabulary_logits": ("linear_cross_entropy", "token_logprobs", "token_kl"),
    "vocabulary_gradients": ("linear_cross_entropy", "token_logprobs", "token_kl"),
}


def kernels(op: str) -> Iterator[str]:
    """Each backend of this session by name; the CPU's with each instruction set, in use, that has kernels of its own
    for the op."""
    for name in backends():
        if name != "cpu":
            yield name
            continue
        from gptfast import _cpu

        before, every = _cpu.isa(), set(_cpu.own_kernels("baseline"))
        try:
            for isa in _cpu.isas():
                own = _cpu.own_kernels(isa)
                if every.difference(own) and not any(k.startswith(op) or op in SERVES.get(k, ()) for k in own):
                    continue
                _cpu.use_isa(isa)
                yield f"cpu ({isa})"
        finally:
            _cpu.use_isa(before)


def refusal(op: Op, arguments: dict[str, Any], backend: str) -> str | None:
    """Why a backend doesn't serve a call; None where it does."""
    try:
        ops.explain(op.function, **arguments, backend=backend)
    except ops.BackendError as error:
        return str(error)
    return None


def here(op: Op, arguments: dict[str, Any]) -> dict[str, Any]:
    """A case's arguments on the device of this session. Strides and places in memory stay, so that what is aligned is
    and what isn't is not."""

    def move(t: Tensor) -> Tensor:
        whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())  # pyright: ignore[reportArgumentType]
        return whole.to(device).as_strided(t.shape, t.stride(), t.storage_offset())

    if device == "cpu":
        return arguments
    moved = {name: x if name in op.host else map_tensors(move, {name: x})[name] for name, x in arguments.items()}
    return {name: x.moved(move) if isinstance(x, QuantizedWeight) else x for name, x in moved.items()}


# Ops whose interpreted cases take seconds each: in `make test` a case is run in one dtype, the dtypes in turn;
# `make test-triton-all` runs all.
PATIENT = frozenset(
    ["sample", "attention", "attention_kvcache", "linear", "token_kl", "value_loss", "linear_cross_entropy"]
)


def waits(op: Op, number: int, dtype: torch.dtype) -> bool:
    """Whether the op's case of this number isn't run in this dtype unless everything is."""
    return INTERPRETED and op.name in PATIENT and op.dtypes[number % len(op.dtypes)] != dtype


def some_rows(rows: int) -> set[int]:
    """Of a batch, those that are computed alone too: the first, one in the middle, the last; interpreted the last."""
    return {rows - 1} if INTERPRETED else {0, rows // 2, rows - 1}


def too_large(case: Case) -> bool:
    """Whether a case is too large for this session: a benchmark's, where kernels are interpreted."""
    return INTERPRETED and bool(case.tags & {"big", "bench"})


def skip_unfit(arguments: dict[str, Any]) -> None:
    """Skips a case that is too large to be interpreted."""
    if INTERPRETED and (n := elements(arguments)) > LARGEST_INTERPRETED:
        pytest.skip(f"{n} elements are too many to interpret")


def elements(arguments: dict[str, Any]) -> int:
    """Of all tensors among the arguments together."""
    sizes: list[int] = []

    def note(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t

    map_tensors(note, arguments)
    return sum(sizes)
