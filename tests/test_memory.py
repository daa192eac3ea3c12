"""The memory of large outputs: used again when nobody needs it any more, and not before."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest
import torch

from gptfast.kernels import reason_missing

if (reason := reason_missing("cpu")) is not None:
    pytest.skip(reason, allow_module_level=True)

from gptfast import _cpu
from gptfast.kernels.cpu import LARGE, empty

MIB = 1 << 20


def test_a_freed_output_serves_the_next_of_its_size() -> None:
    t = empty((9, MIB), torch.float32)
    where = t.data_ptr()
    view = t[1:]
    del t
    other = empty((9, MIB), torch.float32)
    assert other.data_ptr() != where, "a view still holds the first"
    both = {where, other.data_ptr()}
    del view, other
    assert empty((18, MIB), torch.bfloat16).data_ptr() in both


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_it_is_an_ordinary_tensor(dtype: torch.dtype) -> None:
    shape = (3, LARGE // 2, 2)
    t = empty(shape, dtype)
    assert t.shape == shape and t.dtype == dtype and t.is_contiguous() and t.data_ptr() % 64 == 0
    t.fill_(3)
    assert torch.equal(t, torch.full(shape, 3, dtype=dtype))
    copy = t.clone()
    t += 1
    assert torch.equal(t, copy + 1)
    if dtype.is_floating_point:
        (t.requires_grad_() * 2).sum().backward()
        assert t.grad is not None


def test_small_outputs_are_pytorchs_own() -> None:
    assert empty((3, 5), torch.float32).untyped_storage().resizable()


def test_a_capsule_that_nobody_takes_is_freed() -> None:
    for _ in range(100):
        _cpu.output((64 * MIB,), 2, 32)
    assert resident() < 2 << 30


def test_what_waits_is_bounded() -> None:
    before = resident()
    tensors = [empty((48 * MIB,), torch.uint8).fill_(1) for _ in range(24)]
    assert resident() - before > 1000 * MIB
    del tensors
    gc.collect()
    assert resident() - before < 300 * MIB


def test_threads_get_memory_of_their_own() -> None:
    wrong = []

    def work(value: int) -> None:
        for _ in range(30):
            t = empty((LARGE // 4 + value,), torch.float32).fill_(value)
            u = empty((LARGE // 4,), torch.float32).fill_(-value)
            if not (t == value).all() or not (u == -value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def resident() -> int:
    """Bytes of this process in memory."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("this system has no /proc")
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS:")) * 1024
