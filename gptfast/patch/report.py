"""What gptfast.patch did with a model and what it left, with the reason."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One module and one of the kinds "attention", "norm", "mlp", "linear", "rope" and "loss"; `text` says what it got,
    or why it was left, as a sentence."""

    module: str
    kind: str
    text: str


@dataclass
class PatchReport:
    """Which module got what, and for each candidate that didn't, why not. str() is a table; `print(report)`."""

    patched: list[Entry] = field(default_factory=list)
    skipped: list[Entry] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"gptfast: {len(self.patched)} patched, {len(self.skipped)} left"]
        for mark, entries in (("+", self.patched), ("-", self.skipped)):
            groups: dict[tuple[str, str, str], int] = {}
            for entry in entries:  # the layers of a stack are one line
                key = entry.kind, re.sub(r"(?<=\.)\d+(?=\.|$)", "*", entry.module) or "(the model)", entry.text
                groups[key] = groups.get(key, 0) + 1
            for (kind, name, text), count in groups.items():
                times = f" x{count}" if count > 1 else ""
                lines.append(f"  {mark} {kind:<9} {name + times:<42} {text}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, list[dict[str, Any]]]:
        """{"patched": [{"module", "kind", "text"}, ...], "skipped": [...]}, for JSON."""
        return {name: [vars(e).copy() for e in getattr(self, name)] for name in ("patched", "skipped")}
