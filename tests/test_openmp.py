"""PyTorch's OpenMP threads beside our kernels' own (kernels/cpu/openmp.h): they sleep while kernels run on ours; or
single kernels run on them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gptfast.kernels import reason_missing

pytestmark = [
    pytest.mark.skipif(reason_missing("cpu") is not None, reason="the CPU kernels aren't built"),
    pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads are counted as Linux shows them"),
]

START = """
import os, threading, time
import torch
from gptfast import _cpu, ops
from gptfast.generate.replay import Recorded

torch.set_num_threads(2)
torch.manual_seed(0)
x, w, b = torch.randn(512, 768), torch.randn(768), torch.randn(768)
GOMP = any("libgomp" in line for line in open("/proc/self/maps"))

def call(threads=2, joined=False):
    _cpu.join_pytorch(joined)
    torch.set_num_threads(threads)
    y = ops.layer_norm(x, w, b, backend="cpu").numpy().tobytes()
    torch.set_num_threads(2)
    return y

_cpu.join_pytorch(True)  # none of our own threads yet
recorded = Recorded(lambda: ops.layer_norm(x, w, b, backend="cpu"))
_cpu.join_pytorch(False)

def replay(threads=2):
    torch.set_num_threads(threads)
    y = recorded.run().numpy().tobytes()
    torch.set_num_threads(2)
    return y

def until(true):
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)

def threads():
    return len(os.listdir("/proc/self/task"))
"""


def run(body: str, **environment: str) -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | environment
    done = subprocess.run([sys.executable, "-c", START + body], env=env, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_they_sleep_while_ours_work_and_spin_again_afterwards() -> None:
    run("""
if GOMP and len(os.sched_getaffinity(0)) > 1:
    assert not _cpu.shares_cores()
    replay(1)
    assert not _cpu.shares_cores()  # nobody is waited for
    call(joined=True)
    assert not _cpu.shares_cores()  # they did it themselves
    replay()
    until(lambda: not _cpu.shares_cores())
    settled = threads()
    for _ in range(3):
        replay()
        until(lambda: not _cpu.shares_cores())
        until(lambda: threads() <= settled)  # what stood in for our threads is gone
    _cpu.let_share(False)
    replay()
    assert not _cpu.shares_cores()
""")


def test_a_single_kernel_runs_on_pytorchs_threads_where_asked() -> None:
    run("""
if GOMP and len(os.sched_getaffinity(0)) > 1:
    (x @ x.T).softmax(-1)
    before = threads()
    for _ in range(20):
        call(joined=True)
    assert threads() == before  # none of ours were made
    _cpu.let_share(False)
    call()
    assert threads() == before + 1
""")


def test_it_starts_with_a_replay() -> None:
    run("""
if GOMP and len(os.sched_getaffinity(0)) > 1:
    def shown():
        replay()
        return _cpu.shares_cores()
    until(shown)
""")


@pytest.mark.parametrize(
    "environment", [{"OMP_WAIT_POLICY": "PASSIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "300000"}]
)
def test_what_the_environment_says_is_left_alone(environment: dict[str, str]) -> None:
    run(
        """
for _ in range(20):
    call(joined=True)
    replay()
    assert not _cpu.shares_cores()
""",
        **environment,
    )


def test_bits_are_the_same_in_any_number_of_threads_and_callers() -> None:
    run("""
expected = call(1)
_cpu.let_share(False)
assert call() == replay() == expected
_cpu.let_share(True)
assert all(call(n) == call(n, True) == replay(n) == expected for n in (1, 2, 4, 3, 2))
found = []
def several():
    for _ in range(20):
        (x @ x.T).softmax(-1)  # PyTorch's own threads in between
        found.append(ops.layer_norm(x, w, b, backend="cpu").numpy().tobytes())
for join in (False, True):
    _cpu.join_pytorch(join)
    callers = [threading.Thread(target=several) for _ in range(4)]
    for caller in callers: caller.start()
    for caller in callers: caller.join()
assert found == [expected] * 160
""")


def test_in_the_child_of_a_fork() -> None:
    run("""
(x @ x.T).softmax(-1)  # PyTorch's threads are there, and those that stand in
expected = call(joined=True)
assert replay() == expected
child = os.fork()
if child == 0:
    same = all(call(joined=True) == replay() == expected and not _cpu.shares_cores() for _ in range(5))
    os._exit(0 if same else 3)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0
assert call() == expected
""")


def test_the_kernels_alone_need_no_pytorch() -> None:
    run("""
import subprocess, sys
check = '''
import importlib.machinery, importlib.util, sys
loader = importlib.machinery.ExtensionFileLoader("_cpu", sys.argv[1])
_cpu = importlib.util.module_from_spec(importlib.util.spec_from_loader("_cpu", loader))
loader.exec_module(_cpu)
import array
data, work, sink = array.array("q", range(1 << 15)), array.array("d", [0.0]), array.array("f", [0.5] * 128)
at = lambda a: a.buffer_info()[0]
for n in (1, 2):
    _cpu.ceilings(n, work=at(work), sink=at(sink), data=at(data), copy=at(data), bytes=1 << 18, turns=2, what=2)
    assert not _cpu.shares_cores()
assert "torch" not in sys.modules
'''
subprocess.run([sys.executable, "-S", "-c", check, _cpu.__file__], check=True)
""")
