"""That the limits which the kernels are held against refuse what is wrong."""

from __future__ import annotations

import pytest
import torch

from gptfast import ops
from gptfast.ops.spec import upstream
from tests.ops.limits import of_gradients, of_outputs


def find(op: str, name: str) -> tuple:
    page = ops.pages()[op]
    return page, next(c for c in page.cases() if c.name == name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_within_passes_and_what_is_beyond_does_not(dtype: torch.dtype) -> None:
    op, case = find("linear", "17x48x3072")
    limits = of_outputs(op, case, dtype)
    exact, first, widest = limits.exact[0], limits.first[0], limits.widest[0]
    assert first is not None and widest is not None and first <= widest <= 3 * first
    off = torch.zeros_like(exact)
    off[3, 5] = 1.0
    limits.check(0, exact + 0.99 * first * off, "a")
    limits.check(0, exact + 0.99 * widest * off, "a")
    with pytest.raises(AssertionError, match="a: max"):
        limits.check(0, exact - 1.01 * widest * off, "a")
    with pytest.raises(AssertionError, match="a: NaN"):
        limits.check(0, torch.where(off > 0, torch.nan, exact), "a")
    with pytest.raises(AssertionError):
        limits.check(0, exact[:-1], "a")


def test_gradients_have_limits_of_their_own() -> None:
    op, case = find("rms_norm", "2x3x64")
    arguments = case.arguments(torch.float32)
    limits = of_gradients(op, case, torch.float32, upstream(op, arguments, case.name))
    assert limits.first.keys() == set(op.differentiable) & arguments.keys()
    for key, exact in limits.exact.items():
        limits.check(key, exact, key)
        with pytest.raises(AssertionError, match="max"):
            limits.check(key, exact * 1.001, key)


def test_whole_numbers_are_equal_or_wrong() -> None:
    op, case = find("sample", ops.pages()["sample"].cases()[0].name)
    limits = of_outputs(op, case, torch.float32)
    limits.check(0, limits.exact[0], "ids")
    with pytest.raises(AssertionError, match="not equal"):
        limits.check(0, limits.exact[0] + 1, "ids")
