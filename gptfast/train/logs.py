"""What a run writes down and shows: CSV, TensorBoard, texts that it samples as it goes, and a progress bar."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gptfast.formats.extras import need
from gptfast.formats.files import replacing

PATIENCE = 2.0  # seconds before a wait is explained
T = TypeVar("T")


class Table:
    """A CSV file that grows by rows with a step each. Numbers are written so that they read back bit for bit."""

    def __init__(self, path: Path, after: int) -> None:
        """after: rows of later steps are dropped; they come again when a run goes on from a checkpoint."""
        self.path = path
        self.names: list[str] = []
        kept: list[dict[str, str]] = []
        if path.is_file():
            with open(path, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                for row in reader:
                    # A process that was killed may have written half of its last row.
                    if None in row or any(v is None for v in row.values()) or not row["step"].isdigit():
                        break
                    if int(row["step"]) <= after:
                        kept.append(row)
                self.names = list(reader.fieldnames or ())
        # The newest row's numbers by name, its step left out.
        self.last = {n: float(v) for n, v in kept[-1].items() if n != "step" and v} if kept else {}
        self._rewrite(kept)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """A row; a name that wasn't there before becomes a new column."""
        row = {"step": step, **values}
        new = [name for name in row if name not in self.names]
        if new:
            old = []
            if self.path.is_file():
                with open(self.path, newline="", encoding="utf-8") as file:
                    old = list(csv.DictReader(file))
            self.names += new
            self._rewrite(old)
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            file.write(self._line(row))

    def _line(self, row: Mapping[str, Any]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self.names, restval="", lineterminator="\n").writerow(
            {k: _plain(v) for k, v in row.items()}
        )
        return text.getvalue()

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if not self.names:
            return
        with replacing(self.path) as temporary:
            lines = [",".join(self.names) + "\n", *(self._line(row) for row in rows)]
            temporary.write_text("".join(lines), encoding="utf-8")


def _plain(value: Any) -> Any:
    return repr(value) if isinstance(value, float) else value


def read_table(path: Path) -> list[dict[str, float]]:
    """A CSV file's rows; cells that are empty are left out."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]


class Logs:
    """Everything that one run writes besides checkpoints."""

    def __init__(self, run: Path, after: int, tensorboard: bool = False) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self.train, self.evaluations = Table(run / "train.csv", after), Table(run / "evaluations.csv", after)
        self._samples = run / "samples.jsonl"
        self._drop_samples(after)
        self._board: Any = None
        if tensorboard:
            need("tensorboard", "train")
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=after + 1)

    def row(self, table: Table, step: int, values: Mapping[str, float]) -> None:
        table.add(step, values)
        if self._board is not None:
            kind = "train" if table is self.train else "evaluation"
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def samples(self, step: int, texts: Sequence[Mapping[str, Any]]) -> None:
        """Texts of a step, a JSON object a line."""
        with open(self._samples, "a", encoding="utf-8") as file:
            for text in texts:
                file.write(json.dumps({"step": step, **text}, ensure_ascii=False) + "\n")
        if self._board is not None:
            shown = "\n\n".join(f"**{t.get('prompt', '')}** {t.get('text', '')}" for t in texts)
            self._board.add_text("samples", shown, step)

    def _drop_samples(self, after: int) -> None:
        if not self._samples.is_file():
            return
        kept = []
        for line in self._samples.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= after:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                break
        with replacing(self._samples) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


class Bar:
    """A line at the foot of a terminal: step, loss, speed, time left. Nothing where stderr isn't a terminal."""

    def __init__(self, name: str, start: int, steps: int, shown: bool = True) -> None:
        self.start, self.steps, self._since = start, steps, time.perf_counter()
        self._progress = _progress() if shown else None
        if self._progress is None:
            return
        self._task = self._progress.add_task(name, total=steps, completed=start, status="")
        self._progress.start()

    def update(self, step: int, status: str) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=step, status=status)

    def say(self, text: str) -> None:
        """A line above the bar (stdout)."""
        if self._progress is not None:
            self._progress.stop()
        print(text, flush=True)
        if self._progress is not None:
            self._progress.start()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def _progress() -> Any:
    """rich's Progress on stderr; None where that isn't a terminal, or another process speaks for all."""
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        return None
    try:
        console, progress = need("rich.console", "cli"), need("rich.progress", "cli")
    except ImportError:
        return None
    return progress.Progress(
        progress.TextColumn("[bold]{task.description}"),
        progress.BarColumn(None),
        progress.TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        progress.TextColumn("{task.fields[status]}", style="dim"),
        progress.TimeRemainingColumn(),
        console=console.Console(stderr=True),
        transient=True,
    )


def patiently(items: Sequence[T], about: str) -> Iterator[T]:
    """The items, and on a terminal how far they are once they take longer than PATIENCE."""
    since, shown, task = time.perf_counter(), None, None
    try:
        for i, item in enumerate(items):
            if shown is None and time.perf_counter() - since > PATIENCE:
                since = float("inf")  # asked once
                shown = _progress()
                if shown is not None:
                    task = shown.add_task(about, total=len(items), status="")
                    shown.start()
            if shown is not None:
                shown.update(task, completed=i)
            yield item
    finally:
        if shown is not None:
            shown.stop()
