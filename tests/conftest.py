from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch

from gptfast.kernels import reason_missing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture(autouse=True)
def nan_filled_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN: an output element that a kernel forgets to write is seen."""
    real = torch.empty

    def empty(*size, **kwargs):
        t = real(*size, **kwargs)
        if t.is_floating_point() and t.device.type == "cpu":
            with torch._C.DisableTorchFunction():  # a recording watches what is called
                t.fill_(float("nan"))
        return t

    monkeypatch.setattr(torch, "empty", empty)
    if reason_missing("cpu") is None:  # its large outputs come from memory of its own
        cpu = importlib.import_module("gptfast.kernels.cpu")
        large = cpu.large
        monkeypatch.setattr(cpu, "large", lambda shape, dtype: _poisoned(large(shape, dtype)))


def _poisoned(t: torch.Tensor) -> torch.Tensor:
    return t.fill_(float("nan")) if t.is_floating_point() else t


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
