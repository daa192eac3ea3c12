"""Is it right? Asked before anything is timed, with the tolerance that the tests derive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptfast.ops.spec import Op, double, gradients, map_tensors, outputs, tolerance, upstream, written


@dataclass(frozen=True)
class Check:
    """The worst output of a call: its largest absolute error and the error it may have."""

    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


def check(op: Op, arguments: Mapping[str, Any], backend: str | None = None) -> Check:
    """Compares a call with the fp64 reference. The arguments stay as they are.

    The limit is twice what the op's baseline (PyTorch's own) errs in the same dtype, plus one unit in the last place;
    whole numbers and exact ops must equal the reference.
    """
    got = _call(op, lambda **a: op.function(**a, backend=backend), arguments)
    if op.exact:
        same = all(_equal(g, w) for g, w in zip(got, _call(op, op.reference, arguments)))
        return Check(0.0 if same else float("inf"), 0.0)
    exact = _call(op, op.reference, double(arguments))
    plain = _call(op, op.plain or op.baseline or op.reference, arguments)
    checks = [_compare(g, e, p) for g, e, p in zip(got, exact, plain)]
    return max(checks, key=lambda c: (not c.passed, c.error - c.limit), default=Check(0.0, 0.0))


def check_gradients(op: Op, arguments: Mapping[str, Any]) -> Check:
    """The same of the gradients, against fp64 autograd through the reference."""
    given = upstream(op, arguments)
    got = gradients(op.function, op, arguments, given)
    exact = gradients(op.reference, op, double(arguments), [u.double() for u in given])
    plain = gradients(op.plain or op.baseline or op.reference, op, arguments, given)
    checks = [_compare(got[name], exact[name], plain[name]) for name in got]
    return max(checks, key=lambda c: (not c.passed, c.error - c.limit), default=Check(0.0, 0.0))


def _call(op: Op, function: Any, arguments: Mapping[str, Any]) -> list[Tensor]:
    """The outputs and the arguments written in place, on copies."""
    mine = map_tensors(torch.Tensor.clone, arguments)
    return outputs(function(**mine)) + written(op, mine)


def _compare(got: Tensor, exact: Tensor, plain: Tensor) -> Check:
    if not exact.is_floating_point():
        return Check(0.0 if _equal(got, exact) else float("inf"), 0.0)
    limit = tolerance(plain, exact)
    finite = exact.isfinite()
    if got.shape != exact.shape or not _equal(got.double()[~finite], exact.double()[~finite]):
        return Check(float("inf"), limit)
    error = (got.double() - exact)[finite].abs().nan_to_num(nan=float("inf"))
    return Check(error.max().item() if error.numel() else 0.0, limit)


def _equal(a: Tensor, b: Tensor) -> bool:
    """The same, NaN where the other has NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
