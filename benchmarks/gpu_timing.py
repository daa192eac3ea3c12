"""Times each case on the GPU: ours and eager first, for all of them; then torch.compile, which takes its time, for as
long as the budget lasts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_cases, gpu_rivals
from benchmarks.gpu_check import Report
from gptfast.bench.check import check
from gptfast.ops import dispatch
from gptfast.ops.attention_cases import sdpa
from gptfast.ops.spec import Case, Inputs, Op, leaves, map_tensors, outputs
from gptfast.quantize import QuantizedWeight

LARGEST_CHECKED = 3e8  # elements of a case that is compared with the fp64 reference before it is timed
Run = Callable[[], Any]


def run_timings(report: Report, seconds: float, only: str) -> None:
    """Fills the report's ceilings and timings."""
    end = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    rates = ceilings()
    report.add("ceilings", rates)
    todo = list(gpu_cases.cases(only))
    for op, case in todo:
        for dtype in (torch.bfloat16, torch.float32) if "gpu" not in case.tags else (torch.bfloat16,):
            if dtype in op.dtypes and time.monotonic() < end:
                for row in timed(op, case, dtype, rates):
                    rows.append(row)
                    report.add("timings", rows)
                    print_row(row)
    for row in rows:  # those of a GPU's size come first
        if time.monotonic() < end and row.get("us") and row["op"] in COMPILED:
            op, case = next((o, c) for o, c in todo if (o.name, c.name) == (row["op"], row["case"]))
            compiled(op, case, row)
            report.add("timings", rows)
            print_row(row)


# torch.compile of these baselines is one graph of PyTorch's ops that it can fuse.
COMPILED = {"layer_norm", "rms_norm", "bias_gelu", "swiglu", "geglu", "rope", "embedding", "cross_entropy",
            "linear_cross_entropy", "sample", "token_logprobs", "gae"}  # fmt: skip


def ceilings() -> dict[str, float]:
    """Bytes a second of a copy, operations a second of matrix products."""
    a = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    found = {"copy GB/s": 2 * a.numel() / median(lambda: b.copy_(a)) / 1e3}
    for dtype in (torch.bfloat16, torch.float32):
        x, y = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        name = f"{str(dtype).removeprefix('torch.')} matmul TFLOP/s"
        found[name] = 2 * 8192**3 / median(lambda: x @ y) / 1e6  # noqa: B023
    print(", ".join(f"{k} {v:,.0f}" for k, v in found.items()), flush=True)
    return found


def median(run: Run) -> float:
    """Microseconds, with a cold L2 cache."""
    from triton.testing import do_bench

    return 1e3 * float(do_bench(run, warmup=15, rep=60, return_mode="median"))  # pyright: ignore[reportArgumentType]


def timed(op: Op, case: Case, dtype: torch.dtype, rates: dict[str, float]) -> Iterator[dict[str, Any]]:
    """The forward, and forward and backward together: one row each."""
    row: dict[str, Any] = {"op": op.name, "case": case.name, "dtype": str(dtype).removeprefix("torch.")}
    try:
        arguments = made(op, case, dtype)
        choice = dispatch.explain(op.function, **arguments)
    except Exception as error:
        yield row | {"pass": "forward", "note": _said(error)}
        return
    if choice.backend == "reference":
        yield row | {"pass": "forward", "note": "reference: " + "; ".join(choice.passed_over.values())}
        return
    row["backend"] = choice.backend
    forward = row | {"pass": "forward"}
    _try(forward, "error", lambda: _error(op, arguments))
    contend(forward, op, arguments, _plain)
    _bound(forward, op.name, op.cost(**_costed(arguments)), dtype, rates)
    yield forward
    if op.differentiable:
        both = row | {"pass": "forward+backward"}
        contend(both, op, arguments, _training)
        if op.train_cost is not None:
            _try(both, None, lambda: _bound(both, op.name, op.train_cost(**_costed(arguments)), dtype, rates))  # pyright: ignore
        elif op.name == "attention":
            cost = op.cost(**_costed(arguments))
            rate = rates[f"{both['dtype']} matmul TFLOP/s"]
            _percent(both, 3.5 * cost.flops / rate / 1e6)  # the backward has five products to the forward's two
        yield both
    torch.cuda.empty_cache()


def _costed(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in arguments.items() if k != "backend"}


def made(op: Op, case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """A case's arguments on the GPU."""
    large = "gpu" in case.tags  # others mix what they draw with tensors of the CPU
    arguments = case.make(gpu_cases.OnDevice(dtype, "cuda") if large else Inputs(dtype, case.name))
    moved = {k: v if k in op.host else map_tensors(Tensor.cuda, {k: v})[k] for k, v in arguments.items()}
    return {k: v.moved(Tensor.cuda) if isinstance(v, QuantizedWeight) else v for k, v in moved.items()}


def contend(row: dict[str, Any], op: Op, arguments: dict[str, Any], way: Callable[..., Run]) -> None:
    """Ours, eager, SDPA and the libraries that are installed, each as far as it gets."""
    _try(row, "us", lambda: median(way(op, op.function, arguments)))
    _try(row, "eager", lambda: median(way(op, op.baseline or op.reference, arguments)))
    if op.name == "attention" and set(arguments) <= {"q", "k", "v", "causal"}:
        _try(row, "sdpa", lambda: median(way(op, sdpa, arguments)))
    for name, call in gpu_rivals.rivals(op.name, arguments).items():
        if way is _plain or name != "flashinfer":  # which has no gradients
            _try(row, name, lambda: median(way(op, call, arguments)))  # noqa: B023
    _ratios(row)


def compiled(op: Op, case: Case, row: dict[str, Any]) -> None:
    """torch.compile of the baseline, in the same pass."""
    torch._dynamo.reset()
    arguments = made(op, case, getattr(torch, row["dtype"]))
    way = _plain if row["pass"] == "forward" else _training
    function = torch.compile(op.baseline or op.reference, dynamic=False)
    _try(row, "compiled", lambda: median(way(op, function, arguments)))
    _ratios(row)


def _ratios(row: dict[str, Any]) -> None:
    for name in ("eager", "compiled", "sdpa", *gpu_rivals.NAMES):
        if row.get("us") and row.get(name):
            row[f"x {name}"] = round(row[name] / row["us"], 2)


def _plain(op: Op, function: Callable[..., Any], arguments: dict[str, Any]) -> Run:
    return lambda: function(**arguments)


def _training(op: Op, function: Callable[..., Any], arguments: dict[str, Any]) -> Run:
    asking = leaves(op, arguments)
    wanted = [asking[name] for name in op.differentiable if isinstance(asking.get(name), Tensor)]
    with torch.enable_grad():
        results = [r for r in outputs(function(**asking)) if r.is_floating_point() and r.requires_grad]
    given = [torch.randn_like(r) for r in results]

    def run() -> Any:
        made = [r for r in outputs(function(**asking)) if r.is_floating_point() and r.requires_grad]
        return torch.autograd.grad(made, wanted, given, allow_unused=True)

    return run


def _error(op: Op, arguments: dict[str, Any]) -> float | None:
    """The error of the result over what it may be; None where the reference would take too much memory."""
    sizes: list[int] = []
    map_tensors(lambda t: sizes.append(t.numel()) or t, arguments)
    q = arguments.get("q")
    if sum(sizes) > LARGEST_CHECKED or (op.name == "attention" and q is not None and q.shape[0] * q.shape[1] > 4096):
        return None
    found = check(op, arguments)
    return found.error / found.limit if found.limit else found.error


def _bound(row: dict[str, Any], op: str, cost: Any, dtype: torch.dtype, rates: dict[str, float]) -> None:
    """The least time that the call can take here, and how much of its time that is."""
    least = cost.bytes / rates["copy GB/s"] / 1e3
    if op in gpu_cases.PRODUCTS:
        least = max(least, cost.flops / rates[f"{str(dtype).removeprefix('torch.')} matmul TFLOP/s"] / 1e6)
    _percent(row, least)


def _percent(row: dict[str, Any], least: float) -> None:
    row["bound"] = least
    if row.get("us"):
        row["%"] = round(100 * least / row["us"])


def _try(row: dict[str, Any], name: str | None, run: Run) -> None:
    """row[name] = run(); or, where that fails, the reason as a note."""
    try:
        found = run()
        if name is not None:
            row[name] = found
    except Exception as error:
        row["note"] = f"{row.get('note', '')} {name}: {_said(error)}".strip()
        if isinstance(error, torch.cuda.OutOfMemoryError):
            torch.cuda.empty_cache()


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:300]


def print_row(row: dict[str, Any]) -> None:
    def number(name: str, digits: int = 1) -> str:
        value = row.get(name)
        return "-" if value is None else f"{value:.{digits}f}"

    print(
        f"{row['op']:20s} {row['case'][:34]:34s} {row['dtype']:8s} {row['pass'][:16]:16s} {number('us'):>9s} us"
        f"  eager {number('eager'):>9s} ({number('x eager', 2)}x)  compiled {number('compiled'):>9s}"
        f" ({number('x compiled', 2)}x)  sdpa {number('x sdpa', 2)}x  {number('%', 0):>4s}%  err {number('error', 2)}"
        + "".join(f"  {name} {number(f'x {name}', 2)}x" for name in gpu_rivals.NAMES if row.get(name))
        + f"  {row.get('note', '')[:200]}",
        flush=True,
    )
