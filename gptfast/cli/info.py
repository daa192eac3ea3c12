"""`gptfast info` for people."""

from __future__ import annotations

from rich.panel import Panel
from rich.table import Table

import gptfast
from gptfast.cli.console import out
from gptfast.hardware import Ceilings, Machine

UNITS = {"fp32": "GFLOP/s", "bf16": "GFLOP/s", "int8": "GOP/s"}


def print_info(machine: Machine, ceilings: Ceilings | None) -> None:
    """The machine, what it can do at most, and the backends."""
    out.print(Panel(summary(machine), title=f"gptfast {gptfast.__version__}", title_align="left", expand=False))
    if ceilings is not None:
        table = Table(title="measured ceilings", title_justify="left", box=None, pad_edge=False)
        table.add_column("")
        counts = sorted(next(iter(ceilings.rates.values())))
        for count in counts:
            table.add_column(f"{count} thread{'s' if count > 1 else ''}", justify="right")
        for name, rates in ceilings.rates.items():
            unit = UNITS.get(name, "GB/s")
            table.add_row(name, *(f"{rates[c].best / 1e9:,.0f} {unit}" for c in counts))
        out.print(table)
    out.print("backends", style="italic")
    for name, reason in gptfast.backends().items():
        out.print(f"  {name:10} ", end="")
        out.print("[green]here[/]" if reason is None else f"[dim]{reason}[/]")


def summary(machine: Machine) -> str:
    """The machine in a few lines."""
    caches = ", ".join(f"L{c.level} {_size(c.bytes)}" for c in machine.caches)
    kernels = f"{machine.isa} (of {', '.join(machine.isas)})" if machine.isa else "not built: the reference ops alone"
    return "\n".join(
        [
            f"[bold]{machine.cpu}[/], {machine.cores} cores, {_size(machine.memory)}"
            + (f"; {caches}" if caches else ""),
            f"CPU kernels: [bold]{kernels}[/]",
            f"PyTorch {machine.torch}, {machine.threads} threads; Python {machine.python}; {machine.os}",
        ]
    )


def _size(n: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= size:
            return f"{n / size:.0f} {unit}"
    return f"{n} B"
