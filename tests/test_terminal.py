"""The command on a terminal, and Ctrl-C there; with a tiny model in a Hugging Face folder that transformers wrote."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from gptfast.formats.files import replacing

pytest.importorskip("pty")  # not on Windows
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

# A terminal whose keyboard is this program's stdin and whose screen is its stdout. The shell tells the terminal's
# settings before and after, and the status.
TERMINAL = (  # Ctrl-C works even where whoever started the tests ignores it
    "import os, pty, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
)
SHELL = 'trap : INT; stty -g; "$@"; echo "status $?"; stty -g'
PATIENCE = 60  # seconds of silence on a screen
LONG = ("--prompt", "Hello", "--temperature", "0", "--max-new-tokens", "99000", "--ignore-eos")


class Session:
    """`gptfast ARGUMENTS` on a terminal."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-c", TERMINAL, "sh", "-c", SHELL, "sh", sys.executable, "-m", "gptfast", *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.out = self.process.stdout.fileno()
        self.screen, self.seen = b"", 0

    def until(self, text: bytes) -> None:
        """Reads on until the screen holds a text after the last one found."""
        while (at := self.screen.find(text, self.seen)) < 0:
            self.more(1)
        self.seen = at + len(text)

    def more(self, count: int) -> None:
        """Reads so many bytes more, at least."""
        wanted = len(self.screen) + count
        while len(self.screen) < wanted:
            assert self.speaks(PATIENCE), f"expected more within {PATIENCE} s, got {self.screen[-2000:]!r} and silence"
            piece = os.read(self.out, 65536)
            assert piece, f"expected more, got {self.screen!r} and the end"
            self.screen += piece

    def speaks(self, seconds: float) -> bool:
        """Whether there is something to read within this time."""
        return bool(select.select([self.out], [], [], seconds)[0])

    def interrupt(self) -> None:
        """Presses Ctrl-C until something happens: readline may sleep through one that comes just before it waits."""
        for _ in range(10):
            self.type(b"\x03")
            if self.speaks(3):
                return

    def type(self, keys: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(keys)
        self.process.stdin.flush()

    def end(self) -> tuple[bytes, int]:
        """What was printed and the status; the terminal must be left as it was."""
        self.until(b"status ")
        self.screen += self.process.communicate(timeout=60)[0]
        before, *printed, status, after = self.screen.strip().split(b"\r\n")
        assert before == after, "the terminal's settings"
        assert b"Traceback" not in self.screen
        return b"\n".join(printed), int(status.rpartition(b" ")[2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose tokens are bytes; token 256 ends a text."""
    path = tmp_path_factory.mktemp("llama")
    bytes_first = {c: i for i, c in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=bytes_first | {"<|end|>": 256}, merges=[]))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    fast.add_special_tokens(["<|end|>"])
    template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    kept = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|end|>", chat_template=template)
    kept.save_pretrained(path)
    config = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=100_000,
        eos_token_id=256,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def session(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Session]]:
    """Starts `gptfast COMMAND --model <the tiny Llama> ARGUMENTS` on a terminal, which goes away with the test; what it
    keeps for the next one is in the test's folder."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    begun: list[Session] = []

    def start(command: str, *arguments: str) -> Session:
        begun.append(Session(command, "--model", str(folder), *arguments))
        return begun[-1]

    yield start
    for one in begun:
        one.process.kill()  # closes the terminal, which hangs up on those inside
        one.process.communicate()


def test_a_folder_writes_what_transformers_writes(folder: Path) -> None:
    options = ("--prompt", "Hello", "--temperature", "0", "--max-new-tokens", "12", "--json")
    command = [sys.executable, "-m", "gptfast", "generate", "--model", str(folder), *options]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    prompt = transformers.AutoTokenizer.from_pretrained(folder)("Hello", return_tensors="pt").input_ids
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    wanted = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=256)[0, prompt.shape[1] :]
    assert found["token_ids"] == wanted.tolist() and found["prompt_tokens"] == prompt.shape[1]


def test_ctrl_c_ends_a_text(session: Callable[..., Session]) -> None:
    terminal = session("generate", *LONG)
    terminal.more(200)
    terminal.type(b"\x03")
    printed, status = terminal.end()
    assert status == 0 and b"ends by interrupted" in printed


def test_ctrl_c_ends_json_with_what_there_is(session: Callable[..., Session]) -> None:
    terminal = session("generate", *LONG, "--json")
    terminal.until(b"reading the prompt")  # shown once it takes 2 s
    terminal.type(b"\x03")
    printed, status = terminal.end()
    found = json.loads(printed[printed.rindex(b'{"model"') :])
    assert status == 0 and found["finish_reason"] == "interrupted" and found["token_ids"]


def test_a_chat(session: Callable[..., Session], tmp_path: Path) -> None:
    terminal = session("chat", "--temperature", "0", "--max-new-tokens", "99000")
    terminal.until(b"/help for help")
    terminal.until(b"> ")
    terminal.type(b"Hi\r")
    terminal.more(50)
    terminal.type(b"\x03")
    terminal.until(b"interrupted")
    terminal.until(b"> ")
    terminal.type(b"half a li")
    terminal.until(b"half a li")
    terminal.interrupt()
    terminal.until(b"> ")
    terminal.type(f"/save {tmp_path / 'talk.json'}\r".encode())
    terminal.until(b"saved 2 messages")
    terminal.until(b"> ")
    terminal.type(b"\x04")
    assert terminal.end()[1] == 0
    assert [m["role"] for m in json.loads((tmp_path / "talk.json").read_text())] == ["user", "assistant"]


def test_a_chat_remembers_what_was_typed(session: Callable[..., Session], tmp_path: Path) -> None:
    pytest.importorskip("readline")
    first = session("chat", "--temperature", "0", "--max-new-tokens", "1")
    first.until(b"> ")
    first.type(b"what I once asked\r")
    first.until(b"1 tokens")
    first.until(b"> ")
    first.type(b"/exit\r")
    assert first.end()[1] == 0
    file = tmp_path / "gptfast" / "chat_history"
    assert file.read_text().splitlines()[-2:] == ["what I once asked", "/exit"]
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700
    second = session("chat", "--temperature", "0", "--max-new-tokens", "1")
    second.until(b"> ")
    second.type(b"\x1b[A\x1b[A")  # arrow up, twice
    second.until(b"what I once asked")
    second.type(b"\r")
    second.until(b"1 tokens")
    second.until(b"> ")
    second.type(b"/sta\t\r")
    second.until(b"1 answers, 1 tokens")
    second.until(b"> ")  # before that the terminal would swallow what ends the input
    second.type(b"\x04")
    assert second.end()[1] == 0
    assert file.read_text().count("what I once asked") == 2


def test_a_long_history_loses_its_oldest_lines(tmp_path: Path) -> None:
    from gptfast.cli import chat

    file = tmp_path / "h"
    file.write_text("".join(f"{i}\n" for i in range(2 * chat.KEPT_LINES + 1)))
    chat._shorten(file)
    assert file.read_text().splitlines()[0] == str(chat.KEPT_LINES + 1)
    chat._shorten(file)
    assert len(file.read_text().splitlines()) == chat.KEPT_LINES


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with replacing(path) as to:
        to.write_bytes(b"text")
    assert os.read(reader, 99) == b"text" and path.is_fifo()
    os.close(reader)
