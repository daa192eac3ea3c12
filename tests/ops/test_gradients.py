"""The gradients of every op that has them, from the op pages: against fp64 autograd through the reference with derived
tolerances, on each backend and instruction set of the session (tests/where.py); bitwise for one thread and two, two
runs and a row's place in the batch; PyTorch's own checks of the ops it knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.config
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from gptfast import ops
from gptfast.kernels import reason_missing
from gptfast.ops import library
from gptfast.ops.spec import Case, Op, gradients, leaves, outputs, upstream
from tests import where
from tests.ops.limits import of_gradients

Results = list[Tensor]


def differentiable() -> list[Any]:
    return [
        pytest.param(
            *(op, case, dtype),
            id=f"{op.name}-{case.name}-{str(dtype).removeprefix('torch.')}",
            marks=[pytest.mark.slow] if case.tags & {"big", "bench"} or where.waits(op, number, dtype) else [],
        )
        for op in ops.pages().values()
        if op.differentiable
        for number, case in enumerate(op.cases())
        if not where.too_large(case)
        for dtype in op.dtypes
    ]


def call(op: Op, arguments: dict[str, Any], given: Results, backend: str, threads: int = 2) -> dict[str, Tensor]:
    """The gradients, computed on this session's device, as tensors of the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        given = [u.to(where.device) for u in given]
        found = gradients(op.function, op, where.here(op, arguments), given, backend=backend)
    finally:
        torch.set_num_threads(before)
    return {name: g.cpu() for name, g in found.items()}


@pytest.mark.parametrize(("op", "case", "dtype"), differentiable())
def test_every_gradient(op: Op, case: Case, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    where.skip_unfit(arguments)
    refused = {b: where.refusal(op, leaves(op, where.here(op, arguments)), b) for b in where.backends()}
    if not where.on_the_cpu() and all(refused.values()):
        pytest.skip("; ".join(filter(None, refused.values())))
    given = upstream(op, arguments, case.name)
    limits = of_gradients(op, case, dtype, given)
    for name in where.kernels(op.name):
        backend = name.partition(" ")[0]
        if refused[backend]:
            continue
        got = call(op, arguments, given, backend)
        for key, one in got.items():
            limits.check(key, one, f"{name}, d{key}")
        if not where.INTERPRETED:
            again = call(op, arguments, given, backend, threads=1)
            same = all(torch.equal(got[key], again[key]) for key in got)
            assert same, f"{name}: one thread and two, or two runs, differ"
        check_rows(op, arguments, given, got, backend, name)


def check_rows(
    op: Op, arguments: dict[str, Any], given: Results, whole: dict[str, Tensor], backend: str, name: str
) -> None:
    """Bitwise: a row's own gradients, alone or in a batch. A dropout mask depends on the place, so it is left out."""
    rows = op.batch(arguments)
    if op.take is None or rows == 0 or arguments.get("dropout_p"):
        return
    for b in where.some_rows(rows):
        mine = op.take(arguments, b)
        alone = call(op, mine, [u[b : b + 1] for u in given], backend)
        for key, gradient in alone.items():
            if mine[key] is not arguments[key]:
                assert torch.equal(whole[key][b : b + 1], gradient), f"{name}: d{key} of row {b} differs alone"


@pytest.mark.parametrize("backend", where.backends())
@pytest.mark.parametrize("op", [op for op in ops.pages().values() if op.differentiable], ids=lambda op: op.name)
def test_most_gradients_come_from_kernels(op: Op, backend: str) -> None:
    if backend not in op.kernels:
        pytest.skip(f"{backend} has no kernel for {op.name}")
    for dtype in op.dtypes:
        asked = [leaves(op, where.here(op, case.unread(dtype))) for case in op.cases() if not where.too_large(case)]
        asked = [a for a in asked if all(isinstance(a.get(n), Tensor | None) for n in op.differentiable)]
        served = [not where.refusal(op, arguments, backend) for arguments in asked]  # a quantised weight asks for none
        assert sum(served) > len(served) / 2, f"{op.name}, {dtype}: {sum(served)} of {len(served)} cases"


class Calls(TorchDispatchMode):
    """Keeps the arguments of each call of our own ops."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "gptfast":
            self.made.append((func, args))
        return func(*args, **(kwargs or {}))


def calls(op: Op, arguments: dict[str, Any]) -> list[tuple[Any, tuple[Any, ...]]]:
    """The calls of PyTorch's ops that one forward and backward makes: op and arguments."""
    with Calls() as seen:
        gradients(op.function, op, arguments, upstream(op, arguments))
    return seen.made


def small(by_kind: bool) -> list[Any]:
    """Of each op with gradients the cases that PyTorch's checks, which call an op many times, can take. by_kind: one of
    each kind of call, for a check that sees which arguments there are, not their sizes."""
    found: dict[Any, Any] = {}
    for op in ops.pages().values():
        for case in op.cases() if op.differentiable else ():
            arguments = {} if case.tags & {"big", "bench"} else case.unread(torch.float32)
            if 0 < sum(x.numel() for x in arguments.values() if isinstance(x, Tensor)) < 3000:
                kind = (op.name, *((name, _kind(x)) for name, x in arguments.items() if x is not None))
                kind = kind if by_kind else (op.name, case.name)
                found.setdefault(kind, pytest.param(op, case, id=f"{op.name}-{case.name}"))
    return list(found.values())


def _kind(x: Any) -> Any:
    """Of a tensor its dtype and dimensions, and whether it is empty; of anything else whether it is something."""
    return (x.dtype, x.dim(), x.numel() == 0) if isinstance(x, Tensor) else (type(x), bool(x))


def skip_without_a_kernel(op: Op, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """An op is checked as PyTorch knows it where a kernel serves it: in the CPU's session, or, where a CPU has none, in
    that of interpreted kernels, which are preferred then."""
    backend = "cpu" if "cpu" in op.kernels else "triton"
    if not where.on_the_cpu() and not (where.INTERPRETED and backend == "triton"):
        pytest.skip("another session does it")
    if (reason := reason_missing(backend)) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("GPTFAST_BACKEND", backend)
    if backend in ops.explain(op.function, **leaves(op, arguments)).passed_over:
        pytest.skip("no kernel serves this case")


def ask(x: Any, dtype: torch.dtype | None = None) -> Any:
    """A floating tensor of its own that asks for a gradient; anything else as it is."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x.detach().to(dtype or x.dtype, copy=True).requires_grad_()


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize(("op", "case"), small(by_kind=True))
def test_pytorch_knows_the_ops(op: Op, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """opcheck: schemas, fakes, the autograd key, and AOT tracing with dynamic shapes, of an op with its backward."""
    arguments = case.arguments(torch.float32)
    skip_without_a_kernel(op, arguments, monkeypatch)
    made = calls(op, arguments)
    assert {func._opname for func, _ in made} == {op.name, f"{op.name}_backward"}
    # What it keeps of one tracing never serves another, of other symbols, and to keep it is a fifth of the time.
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        for func, given in made:
            traced = func._opname == op.name or op.double_backward
            opcheck(func, tuple(ask(x) for x in given), test_utils=CHECKS if traced else CHECKS[:-1])


@pytest.mark.parametrize(("op", "case"), small(by_kind=False))
def test_numerical_gradients(op: Op, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """gradcheck in fp64 of the ops as registered, whose kernels are the reference then."""
    arguments = case.arguments(torch.float32)
    skip_without_a_kernel(op, arguments, monkeypatch)
    if not all(r.isfinite().all() for r in outputs(op.reference(**arguments)) if r.is_floating_point()):
        pytest.skip("differences of infinities are no gradients")
    for func, given in calls(op, arguments):
        if not func._opname.endswith("_backward") or op.double_backward:
            asking = [ask(x, torch.float64) for x in given]
            if func._opname == op.name:  # what else it is given, it takes as a constant
                names = library.argument_names(func)
                asking = [x.detach() if isinstance(x, Tensor) and n not in op.differentiable else x
                          for n, x in zip(names, asking)]  # fmt: skip
            assert torch.autograd.gradcheck(func, tuple(asking), fast_mode=True)


@pytest.mark.skipif(not where.on_the_cpu(), reason="the CPU's session does it")
@pytest.mark.parametrize("op", [op for op in ops.pages().values() if op.differentiable], ids=lambda op: op.name)
def test_inference_mode_records_nothing(op: Op) -> None:
    """Also within enable_grad(), where PyTorch's own ops do as they do without it."""
    arguments = op.cases()[0].arguments(torch.float32)
    wanted = outputs(op.function(**arguments))
    first, *others = [name for name in op.differentiable if arguments.get(name) is not None]
    for name in (first, *others):
        arguments[name].requires_grad_()
    with torch.inference_mode(), torch.enable_grad():
        if others:  # what was made in inference mode can't be saved for a backward pass
            arguments[first] = arguments[first].clone()
        got = outputs(op.function(**arguments))
    assert not any(y.requires_grad for y in got)
    assert all(torch.equal(y, z) for y, z in zip(got, wanted))


@pytest.mark.skipif(not where.on_the_cpu(), reason="the CPU's session does it")
@pytest.mark.parametrize("op", [op for op in ops.pages().values() if op.differentiable], ids=lambda op: op.name)
def test_functional_transforms_go_through_the_reference(op: Op) -> None:
    """torch.func.grad gives autograd's gradients, forward mode their products with tangents; a kernel asked for by name
    is refused with a sentence."""
    case = op.cases()[0]
    arguments = case.arguments(torch.float32)
    given = upstream(op, arguments)
    name = op.differentiable[0]

    def loss(x: Tensor, backend: str | None = None) -> Tensor:
        results = [r for r in outputs(op.function(**{**arguments, name: x}, backend=backend)) if r.is_floating_point()]
        return torch.stack([(r * u).sum() for r, u in zip(results, given)]).sum()

    wanted = gradients(op.reference, op, arguments, given)[name]
    assert torch.allclose(torch.func.grad(loss)(arguments[name]), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ops.BackendError, match=r"torch\.func"):
        torch.func.grad(lambda x: loss(x, "cpu"))(arguments[name])
    tangent = torch.randn(arguments[name].shape, generator=torch.Generator().manual_seed(0))
    with forward_ad.dual_level():  # where nothing wants a gradient, a kernel would drop the tangent
        moved = forward_ad.unpack_dual(loss(forward_ad.make_dual(arguments[name], tangent))).tangent
        with pytest.raises(ops.BackendError, match="forward mode"):
            loss(arguments[name], "cpu")
    assert moved is not None and torch.allclose(moved, (wanted * tangent).sum(), rtol=1e-4, atol=1e-5)
