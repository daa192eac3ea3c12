from __future__ import annotations

from collections.abc import Iterator

import pytest

from gptfast.kernels import reason_missing


def _isas() -> list[str]:
    if reason_missing("cpu") is not None:
        return []
    from gptfast import _cpu

    return _cpu.isas()


@pytest.fixture(params=_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine runs, in use for the length of the test."""
    from gptfast import _cpu

    before = _cpu.isa()
    _cpu.use_isa(request.param)
    yield request.param
    _cpu.use_isa(before)
