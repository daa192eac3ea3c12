"""The conversation on a terminal, or line by line through a pipe."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from gptfast.cli.console import out, waiting, write
from gptfast.formats.files import replacing
from gptfast.generate import Generation, LanguageModel

HELP = """[bold]/reset[/]              forget the conversation
[bold]/system[/] TEXT        give the system message TEXT (none: the template's own) and forget the conversation
[bold]/save[/] FILE          write the conversation as JSON
[bold]/settings[/]           show the settings; /settings NAME VALUE changes one
[bold]/stats[/]              tokens and speed so far
[bold]/help[/]               this list
[bold]/exit[/]               leave; so does Ctrl-D. Ctrl-C ends an answer"""

COMMANDS = ("/reset", "/system", "/save", "/settings", "/stats", "/help", "/exit")
KEPT_LINES = 1000  # of history, typed at the prompt


class Chat:
    """One conversation. The keys and values of earlier turns are kept, so that a turn costs its own tokens only."""

    def __init__(self, lm: LanguageModel, system: str | None, options: dict[str, Any], speculation: Any = None) -> None:
        self.lm, self.system, self.options, self.speculation = lm, system, options, speculation
        self.quiet = not sys.stdin.isatty()
        self.cache = lm.new_cache()
        self.messages: list[dict[str, str]] = []
        self.turns: list[Generation] = []
        self.reset()

    def run(self) -> None:
        """Reads and answers until the end of the input."""
        if self.quiet:
            self._talk()
            return
        with line_editing():
            about = f"on {self.lm.backend}, context {self.lm.context:,} tokens; /help for help"
            out.print(f"[bold]{self.lm.name}[/] [dim]{about}[/]")
            self._talk()
            out.print()

    def _talk(self) -> None:
        while True:
            try:
                line = input("" if self.quiet else "> ").strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                out.print()
                continue
            if line.startswith("/"):
                if self.command(line) == "exit":
                    break
            elif line:
                self.answer(line)

    def reset(self) -> None:
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.cache.reset()

    def answer(self, text: str) -> None:
        """One turn. A turn that can't be had (the context is full) leaves the conversation as it was."""
        turn = [*self.messages, {"role": "user", "content": text}]
        try:
            with waiting("reading") as wait:
                more: dict[str, Any] = dict(cache=self.cache, progress=wait.progress, speculation=self.speculation)
                stream = self.lm.stream_chat(turn, **more, **self.options)
                try:
                    for piece in stream:
                        wait.stop()
                        write(piece)
                except KeyboardInterrupt:
                    stream.close()
        except (ValueError, RuntimeError) as error:
            out.print(f"[red]{str(error).replace('[', chr(92) + '[')}[/] [dim](/reset begins anew)[/]")
            return
        out.print()
        generation = stream.generation
        self.messages = [*turn, {"role": "assistant", "content": generation.text}]
        self.turns.append(generation)
        if not self.quiet:
            out.print(self._speed(generation), style="dim")

    def command(self, line: str) -> str | None:
        """Obeys a line that begins with a slash; "exit" where it ends the conversation."""
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if name in ("exit", "quit"):
            return "exit"
        if name == "help":
            out.print(HELP)
        elif name == "reset":
            self.reset()
        elif name == "system":
            self.system = rest or None
            self.reset()
        elif name == "save":
            self._save(rest)
        elif name == "settings":
            self._settings(rest)
        elif name == "stats":
            self._stats()
        else:
            out.print(f"there is no /{name}; /help lists the commands", markup=False)
        return None

    def _save(self, file: str) -> None:
        if not file:
            out.print("/save needs the name of a file")
            return
        try:
            with replacing(Path(file).expanduser()) as part:
                part.write_text(json.dumps(self.messages, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            out.print(f"not saved: {error}", markup=False)
        else:
            out.print(f"saved {len(self.messages)} messages", style="dim")

    def _settings(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if name and name not in self.options:
            out.print(f"there is no setting {name}: expected one of {', '.join(self.options)}", markup=False)
            return
        if name:
            try:
                self.options[name] = (value or ()) if name == "stop" else json.loads(value or "null")
            except ValueError:
                out.print(f"{name}: expected a number, got {value!r}", markup=False)
                return
        out.print(" · ".join(f"{k} {v}" for k, v in self.options.items()), style="dim", markup=False)

    def _stats(self) -> None:
        new = sum(len(g.token_ids) for g in self.turns)
        decoded, seconds = sum(g.stats.decode_tokens for g in self.turns), sum(g.stats.decode_s for g in self.turns)
        rate = f", {decoded / seconds:.1f} tokens/s" if seconds else ""
        out.print(
            f"{len(self.turns)} answers, {new:,} tokens{rate}; "
            f"{len(self.cache):,} of {self.lm.context:,} tokens of context; {torch.get_num_threads()} threads",
            style="dim",
        )

    def _speed(self, generation: Generation) -> str:
        ends = {"length": "cut at max_new_tokens", "context": "the context is full", "interrupted": "interrupted"}
        parts = [f"{len(generation.token_ids)} tokens"]
        if generation.stats.decode_tokens:
            parts.append(f"{generation.stats.decode_tokens_per_s:.1f} tokens/s")
        parts.append(ends.get(generation.finish_reason, ""))
        return " · ".join(filter(None, parts))


def history_file() -> Path:
    """Where the lines typed at the prompt are kept: the user's folder for state, as XDG's base directories say."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "gptfast" / "chat_history"


@contextmanager
def line_editing() -> Iterator[None]:
    """Arrow keys, Tab for commands, and the lines of earlier runs, where Python has readline. The file is the user's
    alone to read; where it can't be written the lines are forgotten."""
    try:
        import readline
    except ImportError:
        yield
        return
    file = history_file()
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
        file.chmod(0o600)
        readline.read_history_file(file)
    before = readline.get_current_history_length()
    readline.set_completer_delims(" ")
    readline.set_completer(lambda text, n: ([c for c in COMMANDS if text and c.startswith(text)] + [None])[n])
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
    try:
        yield
    finally:
        new = readline.get_current_history_length() - before
        with suppress(OSError):
            if hasattr(readline, "append_history_file"):  # another run's lines stay
                readline.append_history_file(new, file)
                _shorten(file)
            else:
                readline.set_history_length(KEPT_LINES)
                readline.write_history_file(file)
            file.chmod(0o600)


def _shorten(file: Path) -> None:
    """Lets the oldest lines go once there are twice as many as are kept."""
    lines = file.read_bytes().splitlines(keepends=True)
    if len(lines) > 2 * KEPT_LINES:
        with replacing(file) as part:
            part.write_bytes(b"".join(lines[-KEPT_LINES:]))
