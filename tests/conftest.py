from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from gptfast.kernels import reason_missing
from tests import where
from tests.interpreter.faithful import faithful


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the ops' tests run: cpu, or cuda for the GPU's backends")
    parser.addoption("--record", help="a file that gets a line of JSON for each test as soon as it has ended")


class Record:
    """Writes what became of each test, so that nothing is lost if the session is stopped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report.longrepr, "reprcrash", "")
        line = {"test": report.nodeid, "outcome": report.outcome, "why": str(getattr(why, "message", why))[:2000],
                "seconds": round(report.duration, 3)}  # fmt: skip
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    where.device = config.getoption("--device")
    if (path := config.getoption("--record")) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Record(Path(path)))
    if where.INTERPRETED:
        mended = ExitStack()
        mended.enter_context(faithful())
        config.add_cleanup(mended.close)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and item.config.pluginmanager.hasplugin("timeout"):
            item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture(autouse=True)
def nan_filled_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN: an output element that a kernel forgets to write is seen."""
    real = torch.empty

    def empty(*size, **kwargs):
        t = real(*size, **kwargs)
        return _poisoned(t) if t.device.type in ("cpu", "cuda") else t

    monkeypatch.setattr(torch, "empty", empty)
    if reason_missing("cpu") is None:  # its large outputs come from memory of its own
        cpu = importlib.import_module("gptfast.kernels.cpu")
        large = cpu.large
        monkeypatch.setattr(cpu, "large", lambda shape, dtype: _poisoned(large(shape, dtype)))


def _poisoned(t: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunction():  # a recording watches what is called
        return t.fill_(float("nan")) if t.is_floating_point() else t


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
