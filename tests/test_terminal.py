"""The command on a terminal, and Ctrl-C there; with a tiny model in a Hugging Face folder that transformers wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
            piece = os.read(self.out, 65536)
            assert piece, f"expected more, got {self.screen!r} and the end"
            self.screen += piece

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


def test_a_folder_writes_what_transformers_writes(folder: Path) -> None:
    options = ("--prompt", "Hello", "--temperature", "0", "--max-new-tokens", "12", "--json")
    command = [sys.executable, "-m", "gptfast", "generate", "--model", str(folder), *options]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    prompt = transformers.AutoTokenizer.from_pretrained(folder)("Hello", return_tensors="pt").input_ids
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    wanted = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=256)[0, prompt.shape[1] :]
    assert found["token_ids"] == wanted.tolist() and found["prompt_tokens"] == prompt.shape[1]


def test_ctrl_c_ends_a_text(folder: Path) -> None:
    session = Session("generate", "--model", str(folder), *LONG)
    session.more(200)
    session.type(b"\x03")
    printed, status = session.end()
    assert status == 0 and b"ends by interrupted" in printed


def test_ctrl_c_ends_json_with_what_there_is(folder: Path) -> None:
    session = Session("generate", "--model", str(folder), *LONG, "--json")
    session.until(b"reading the prompt")  # shown once it takes 2 s
    session.type(b"\x03")
    printed, status = session.end()
    found = json.loads(printed[printed.rindex(b'{"model"') :])
    assert status == 0 and found["finish_reason"] == "interrupted" and found["token_ids"]


def test_a_chat(folder: Path, tmp_path: Path) -> None:
    session = Session("chat", "--model", str(folder), "--temperature", "0", "--max-new-tokens", "99000")
    session.until(b"/help for help")
    session.until(b"> ")
    session.type(b"Hi\r")
    session.more(50)
    session.type(b"\x03")
    session.until(b"interrupted")
    session.until(b"> ")
    session.type(b"half a li\x03")
    session.until(b"> ")
    session.type(f"/save {tmp_path / 'talk.json'}\r".encode())
    session.until(b"saved 2 messages")
    session.until(b"> ")
    session.type(b"\x04")
    assert session.end()[1] == 0
    assert [m["role"] for m in json.loads((tmp_path / "talk.json").read_text())] == ["user", "assistant"]


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with replacing(path) as to:
        to.write_bytes(b"text")
    assert os.read(reader, 99) == b"text" and path.is_fifo()
    os.close(reader)
