"""How far a kernel may be from the fp64 reference: twice the largest error of PyTorch's own ops in the same dtype, plus
one unit in the last place.

One draw's largest error is a matter of luck and of the machine: for one row of a linear MKL makes 1.5 times the error
on one draw as on the next, and for attention of 9 rows with heads of 256 its AVX-512 is three times as exact as the
formula in PyTorch. So what is beyond the limit of PyTorch's fast op on the case's own numbers is held against both of
PyTorch's ways, the fast op and the formula, over four draws of the case. In the usual case nothing else is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gptfast.ops.spec import Case, Op, double, gradients, map_tensors, outputs, tolerance, upstream, written

DRAWS = 4
Function = Callable[..., Any]


class Limits:
    """Of every output of one case in one dtype.

    compute: the results, by name or number, of a function of PyTorch's on a draw of the case, in fp64 or in the dtype.
    """

    def __init__(self, op: Op, compute: Callable[[Function, int, bool], dict[Any, Tensor]]) -> None:
        self.op, self._compute = op, compute
        self._finite: dict[Any, Tensor | None] = {}
        self.exact = compute(op.reference, 0, True)
        self.first = self._of(op.plain or op.baseline or op.reference, 0, self.exact)

    def _of(self, function: Function, draw: int, exact: dict[Any, Tensor]) -> dict[Any, float | None]:
        """None where the results aren't numbers with a fraction: they must be equal."""
        plain = self._compute(function, draw, False)
        assert plain.keys() == exact.keys()
        return {k: tolerance(p, exact[k]) if p.is_floating_point() else None for k, p in plain.items()}

    @cached_property
    def widest(self) -> dict[Any, float | None]:
        widest = dict(self.first)
        for draw in range(DRAWS):
            exact = self._compute(self.op.reference, draw, True) if draw else self.exact
            for function in {self.op.plain or self.op.baseline or self.op.reference, self.op.reference}:
                for key, limit in self._of(function, draw, exact).items():
                    widest[key] = None if limit is None else max(limit, widest[key] or 0.0)
        return widest

    def finite(self, key: Any) -> Tensor | None:
        """Which elements are no infinities and no NaN; None where all are, as usual, so that none need be taken out."""
        if key not in self._finite:
            finite = self.exact[key].isfinite()
            self._finite[key] = None if finite.all() else finite
        return self._finite[key]

    def check(self, key: Any, got: Tensor, name: str) -> None:
        """Asserts that one output is within its limit; infinities and NaN are where the reference's are."""
        exact, limit = self.exact[key], self.first[key]
        assert got.shape == exact.shape, name
        if limit is None:
            assert torch.equal(got, exact), f"{name}: not equal"
            return
        error = got.double() - exact
        if (finite := self.finite(key)) is not None:
            assert same(got.double()[~finite], exact[~finite].double()), f"{name}: infinities and NaN differ"
            error = error[finite]
        worst = error.abs_().max().item() if error.numel() else 0.0
        assert worst == worst, f"{name}: NaN"
        if worst > limit:
            limit = self.widest[key] or limit
        assert worst <= limit, f"{name}: max |error| {worst:.3g} > {limit:.3g}"


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit but for zeros' signs, NaN equal to NaN."""
    if a.shape != b.shape:
        return False
    return torch.equal(a, b) or torch.equal(a.nan_to_num(nan=1e9), b.nan_to_num(nan=1e9))


def of_outputs(op: Op, case: Case, dtype: torch.dtype, first: Mapping[str, Any] | None = None) -> Limits:
    """Of a call's outputs, and of what it writes in place, by number; first: the case's arguments, where they are known
    (to draw them takes longer than many a kernel)."""

    def compute(function: Function, draw: int, exactly: bool) -> dict[int, Tensor]:
        arguments = first if first is not None and draw == 0 else case.arguments(dtype, draw=draw)
        arguments = map_tensors(Tensor.clone, arguments)
        arguments = double(arguments) if exactly and not op.exact else arguments
        found = outputs(function(**arguments)) + written(op, arguments)
        return dict(enumerate(found))

    limits = Limits(op, compute)
    if op.exact:
        limits.first = dict.fromkeys(limits.first)
    return limits


def of_gradients(op: Op, case: Case, dtype: torch.dtype, given: Sequence[Tensor]) -> Limits:
    """Of the gradients, by their arguments' names; given: those of the outputs, on the first draw."""

    def compute(function: Function, draw: int, exactly: bool) -> dict[str, Tensor]:
        arguments = case.arguments(dtype, draw=draw)
        above = given if draw == 0 else upstream(op, arguments, f"{case.name}/{draw}")
        if exactly:
            return gradients(function, op, double(arguments), [u.double() for u in above])
        return gradients(function, op, arguments, above)

    return Limits(op, compute)
