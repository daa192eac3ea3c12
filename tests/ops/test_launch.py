"""Starting a kernel a second time, past Triton's own way: on a driver that starts nothing and writes down what it was
told to start, so that this needs no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from gptfast import kernels, ops
from gptfast.ops import dispatch
from tests import where

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not where.on_the_cpu(), reason="the CPU's session does it")


class Driver:
    """An H100 that isn't there."""

    def __init__(self) -> None:
        self.started: list[tuple[Any, ...]] = []
        self.loaded: list[str] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
            load_binary=self._load,
            unload_module=lambda module: None,
        )

    def _load(self, name: str, *_: Any) -> tuple[Any, ...]:
        self.loaded.append(name)
        return f"module {len(self.loaded)}", f"function {len(self.loaded)}", 32, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *told: self.started.append(told)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7


@pytest.fixture
def machine() -> Iterator[Driver]:
    from triton.runtime import driver

    before = driver.__dict__.copy()
    made = Driver()
    driver.set_active(made)  # pyright: ignore[reportArgumentType]
    yield made
    driver.__dict__.clear()
    driver.__dict__.update(before)


def kernel() -> Any:
    """One that nobody has started: Triton keeps what it compiled in the kernel."""
    from gptfast.kernels.triton.embedding import _embedding_kernel

    return type(_embedding_kernel)(_embedding_kernel.fn, do_not_specialize=_embedding_kernel.do_not_specialize)


def call(N: int = 5, C: int = 64, stride: int = 64, dtype: torch.dtype = torch.float32, at: int = 0) -> tuple[Any, ...]:
    ids, out = torch.zeros(N, dtype=torch.int64), torch.empty(N, C, dtype=dtype)
    weight = torch.empty(3 * max(stride, C) + 8, dtype=dtype)[at:]
    return ids, weight, None, None, out, N, C, stride, 0


CALLS = {
    "as before": call(),
    "more rows": call(N=16),
    "one row": call(N=1),
    "another width": call(C=62, stride=62),
    "one column": call(C=1, stride=1),
    "another dtype": call(dtype=torch.bfloat16),
    "not aligned": call(at=1),
    "a long stride": (*call()[:7], 2**31, 0),
    "a stride of 2^31 + 1": (*call()[:7], 2**31 + 1, 0),
}


def told(machine: Driver, start: Any, arguments: tuple[Any, ...], BLOCK_R: int = 2) -> tuple[Any, ...]:
    """What the driver was told, without the places that hooks have."""
    start(arguments, {"BLOCK_R": BLOCK_R, "BLOCK_C": 64, "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True})
    x, y, z, stream, function, metadata, _, _, _, *given = machine.started[-1]
    return x, y, z, stream, function, metadata, [id(g) if isinstance(g, torch.Tensor) else g for g in given]


def test_a_second_start_is_told_the_driver_as_the_first(machine: Driver) -> None:
    from gptfast.kernels.triton.launching import start

    made = kernel()
    for arguments in (*CALLS.values(), *CALLS.values()):
        for BLOCK_R in (1, 2):
            by_triton = told(machine, lambda a, named: made[3, 2](*a, **named), arguments, BLOCK_R)
            for _ in range(2):
                assert told(machine, lambda a, named: start(made, (3, 2), a, named), arguments, BLOCK_R) == by_triton


def test_a_second_start_goes_past_triton(machine: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptfast.kernels.triton.launching import start

    made = kernel()
    told(machine, lambda a, named: start(made, (3,), a, named), call())
    monkeypatch.setattr(type(made), "run", lambda *_, **__: pytest.fail("Triton was asked again"))
    told(machine, lambda a, named: start(made, (3,), a, named), call())
    told(machine, lambda a, named: start(made, (3,), a, named), call(N=1))  # rows are counted at run time


def test_what_watches_launches_sees_each(machine: Driver) -> None:
    from gptfast.kernels.triton import launching as module

    made, seen = kernel(), []
    hook = module.knobs.runtime.launch_enter_hook
    hook.add(seen.append)
    try:
        for n in range(3):
            named = {"BLOCK_R": 2, "BLOCK_C": 64, "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
            module.start(made, (3,), call(), named)
            enter, metadata = machine.started[-1][7], machine.started[-1][6]
            assert enter is hook and metadata is not None, n
    finally:
        hook.remove(seen.append)


def cleared() -> None:
    for found in (kernels.reason_missing, kernels.find, dispatch._find):
        found.cache_clear()


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's backend serves calls, to be recorded."""
    monkeypatch.setattr(kernels, "_compiling", True)
    cleared()
    yield
    monkeypatch.undo()
    cleared()


# Elementwise, and contiguous tensors are one row to it: no order of summation, but blocks of another shape.
SHAPELESS = ("bias_gelu", "swiglu", "geglu")
# linear's few rows have a launch of their own for each chunk of K and one that adds: below.


@pytest.mark.parametrize(
    "name", [n for n, op in ops.pages().items() if op.take is not None and n not in (*SHAPELESS, "linear")]
)
def test_a_row_alone_is_computed_by_the_code_that_computes_it_among_others(name: str, compiling: None) -> None:
    """Triton makes a constant of 1 and wider accesses of multiples of 16: of a number of rows it must do neither."""
    op = ops.pages()[name]
    refused = compared = 0
    for case in op.cases():
        if where.too_large(case):
            continue
        arguments = case.unread(torch.float32)
        assert op.take is not None
        try:
            among, alone = specialised(op, arguments), specialised(op, op.take(arguments, 0))
        except (ValueError, ops.BackendError):  # what one row can't be taken from, or no kernel serves
            refused += 1
            continue
        if alone:  # no kernel runs where no row counts
            compared += 1
            assert alone == among, case.name
    assert compared or refused


@pytest.mark.parametrize("K", [96, 800])
@pytest.mark.parametrize("bias", [True, False])
def test_linears_rows_are_computed_by_the_code_of_their_kind(K: int, bias: bool, compiling: None) -> None:
    """Three kinds, each the same code whatever the number of rows in it; that all have the same bits conformance
    checks, for the order of their sums is the same."""
    from gptfast.kernels.triton import tiles

    def compiled(rows: int) -> list[Any]:
        arguments = {"x": torch.zeros(rows, K), "weight": torch.zeros(48, K), "bias": torch.zeros(48) if bias else None}
        return specialised(ops.pages()["linear"], arguments)

    for first, *others in ((1, 2, 5, tiles.SPLIT_ROWS), (9, 13, 16), (17, 48, 64, 100)):
        assert compiled(first) and all(compiled(n) == compiled(first) for n in others)
    assert (compiled(1) != compiled(9)) == (K > 256)  # one chunk needs nothing added
    for arch in ("sm_80", "sm_90", "gfx942"):
        orders = [{b: tiles.linear(M, 4, arch).blocks[b] for b in ("BLOCK_K", "CHUNK")} for M in (1, 9, 17)]
        assert orders[0] == orders[1] == orders[2]


def specialised(op: Any, arguments: dict[str, Any]) -> list[Any]:
    """What Triton would compile for a call."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from gptfast.kernels.triton import recording

    with recording("sm_90") as launches:
        op.function(**arguments, backend="triton")
    found = []
    for launch in launches:
        made: Any = launch.kernel
        bind = create_function_from_signature(made.signature, made.params, make_backend(GPUTarget("cuda", 90, 32)))
        _, specialization, options = bind(*launch.arguments, **launch.named)
        found.append((made.__name__, specialization, options))
    return found


@pytest.mark.parametrize("captures", [False, True])
def test_decoding_reads_nothing_from_the_gpu_while_a_graph_is_captured(
    captures: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of a GPU that isn't there, whose values nobody can read."""
    import gptfast.kernels.triton as triton

    monkeypatch.setattr(kernels, "reason_missing", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures)
    with FakeTensorMode(), triton.recording("sm_90") as launches:

        def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device="cuda")

        q, k, cache = numbers(3, 1, 8, 64), numbers(3, 1, 2, 64), numbers(12, 16, 2, 64)
        lengths, pages = numbers(3, dtype=torch.int32), numbers(3, 4, dtype=torch.int32)
        angles = numbers(64, 32, dtype=torch.float32)

        def decode() -> torch.Tensor:
            terms: dict[str, Any] = {"k": k, "v": k, "block_table": pages, "cos": angles, "sin": angles}
            return ops.attention_kvcache(q, cache, cache, lengths, **terms, backend="triton")

        if not captures:
            with pytest.raises(DataDependentOutputException):
                decode()
            return
        assert decode().shape == q.shape
    assert [one.kernel.__name__ for one in launches] == ["_append_kernel", "_chunk_kernel"]
