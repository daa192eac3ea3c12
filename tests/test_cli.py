"""The command as a shell sees it: what it prints, where, and its exit status."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gptfast.cli import main
from gptfast.formats.registry import find_preset_file


def gptfast(*arguments: str, stdin: str | bytes = "", code: int = 0) -> subprocess.CompletedProcess[bytes]:
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run([sys.executable, "-m", "gptfast", *arguments], input=data, capture_output=True, timeout=300)
    assert done.returncode == code, done.stderr.decode()
    return done


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command in this process; gives the one sentence on stderr."""

    def run(*arguments: str, stdin: bytes = b"") -> str:
        monkeypatch.setattr(sys, "argv", ["gptfast", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capsys.readouterr()
        assert caught.value.code == 1 and printed.out == ""
        assert printed.err.startswith("gptfast: ") and printed.err.count("\n") == 1
        return printed.err

    return run


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command in this process, whose imports and compiled kernels the next one finds; gives its stdout."""

    def run(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["gptfast", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capsys.readouterr()
        assert caught.value.code == code, printed.err
        return printed.out if code == 0 else printed.err

    return run


@pytest.fixture
def model() -> str:
    try:
        find_preset_file("smollm2")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return "smollm2"


GREEDY = ("--temperature", "0", "--max-new-tokens", "6", "--activations", "exact")
RAW = "The history of the printing press began when"


@pytest.mark.model
def test_generate_prints_one_json_object(model: str) -> None:
    done = gptfast("generate", "--model", model, "--prompt", RAW, "--json", *GREEDY)
    assert done.stdout.count(b"\n") == 1 and done.stderr == b""
    found = json.loads(done.stdout)
    assert {"text", "token_ids", "prompt_tokens", "prefill_tokens_per_s", "decode_tokens_per_s", "backend"} <= set(
        found
    )
    assert found["prompt_tokens"] == 8 and len(found["token_ids"]) == 6 and found["finish_reason"] == "length"
    assert found["prefill_tokens_per_s"] > 0 and found["decode_tokens_per_s"] > 0
    assert found["backend"] in ("cpu", "reference")


@pytest.mark.model
def test_generate_from_files_and_pipes(model: str, says: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(RAW, encoding="utf-8")
    options = ("--model", model, "--n", "2", "--json", "--logprobs", *GREEDY)
    piped = json.loads(gptfast("generate", *options, "--prompt-file", "-", stdin=RAW).stdout)
    filed = json.loads(says("generate", *options, "--prompt-file", str(tmp_path / "prompt.txt")))
    assert piped["token_ids"] == filed["token_ids"]
    assert [s["token_ids"] for s in piped["samples"]] == [piped["token_ids"]] * 2, "greedy samples are equal"
    assert len(piped["logprobs"]) == 6 and piped["samples"][1]["seed"] == piped["seed"] + 1


@pytest.mark.model
def test_generate_streams_and_chats(model: str) -> None:
    prompt = "What is the capital of France? Then name three things to see there."
    options = ("--model", model, "--prompt", prompt, "--chat", "--stop", "City", *GREEDY, "--max-new-tokens", "12")
    text, stats = gptfast("generate", *options).stdout.decode().rsplit("\n", 2)[:2]
    assert text == "1. Paris: The "
    assert "45 + " in stats and "decode" in stats and "stop" in stats


@pytest.mark.model
def test_chat_through_a_pipe_is_quiet(model: str, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    lines = f"Hi\n/save {file}\n/settings temperature 0.5\n/nonsense\n/reset\n/exit\nnever\n"
    done = gptfast("chat", "--model", model, *GREEDY, stdin=lines)
    talk = json.loads(file.read_text())
    assert [m["role"] for m in talk] == ["user", "assistant"] and talk[0]["content"] == "Hi"
    printed = done.stdout.decode()
    assert printed.startswith(talk[1]["content"] + "\n")
    assert "saved 2 messages" in printed and "temperature 0.5" in printed and "there is no /nonsense" in printed
    assert ">" not in printed and "never" not in printed


def test_a_stop_text_of_a_chat_can_be_taken_back() -> None:
    from gptfast.cli.chat import Chat
    from gptfast.generate import LanguageModel
    from gptfast.model import GPT, GPTConfig

    lm = LanguageModel(GPT(GPTConfig("gpt2", vocab_size=7, n_layer=1, n_head=1, n_embd=8, context=8)))
    talk = Chat(lm, None, {"stop": ()})
    for line, stop in (("/settings stop the", "the"), ("/settings stop", ())):
        talk.command(line)
        assert talk.options["stop"] == stop
        lm.generate([1], max_new_tokens=1, **talk.options)


def test_info(says: Callable[..., str]) -> None:
    found = json.loads(gptfast("info", "--json").stdout)
    assert found["backends"]["reference"] is None and found["machine"]["cores"] >= 1
    printed = says("info")
    assert "reference" in printed and "PyTorch" in printed


def test_bench_has_options_of_its_own(says: Callable[..., str]) -> None:
    assert "usage" in says("bench", "--help").lower()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--prompt", "a", "--model", "nope"), "no model at 'nope': expected a .gguf file"),
        (("generate", "--model", "nope"), "either --prompt or --prompt-file, got neither"),
        (("generate", "--prompt", "a", "--prompt-file", "b"), "got both"),
        (("generate", "--prompt-file", "/nowhere/x"), "No such file"),
        (("generate", "--prompt", "a", "--system", "b"), "--system needs --chat"),
        (("generate", "--prompt-file", "-"), "a prompt in UTF-8"),
    ],
)
def test_errors_are_one_sentence(fails: Callable[..., str], arguments: tuple[str, ...], message: str) -> None:
    assert message in fails(*arguments, stdin=b"\xff\xfe")


@pytest.mark.model
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--weights", "q9"), "expected weights among"),
        (("--activations", "int4"), "expected None, 'exact' or 'int8', got 'int4'"),
        (("--backend", "tpu"), "expected one of reference, cpu, triton, cuda"),
        (("--temperature", "-1"), "temperature"),
        (("--prompt", ""), "at least one prompt token"),
        (("--speculation", "magic"), "expected speculation None, 'prompt-lookup'"),
        (("--speculation", "prompt-lookup", "--draft", "smollm2"), "either --speculation or --draft"),
        (("--draft", "nope"), "no model at 'nope'"),
    ],
)
def test_errors_of_a_model_are_one_sentence(
    model: str, fails: Callable[..., str], arguments: tuple[str, ...], message: str
) -> None:
    assert message in fails("generate", "--model", model, "--prompt", "a", "--max-new-tokens", "2", *arguments)


def test_an_error_is_a_status_and_no_traceback() -> None:
    done = gptfast("generate", "--prompt", "a", "--model", "nope", code=1)
    assert done.stdout == b"" and done.stderr.startswith(b"gptfast: no model at 'nope'")
    assert b"Traceback" not in done.stderr


def test_a_traceback_on_request() -> None:
    done = gptfast("--traceback", "generate", "--prompt", "a", "--model", "nope", code=1)
    assert b"Traceback" in done.stderr


def test_a_missing_extra_is_named() -> None:
    hide = "import sys; sys.modules['rich'] = None; from gptfast.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'gptfast-kernels[cli]'" in done.stderr and "Traceback" not in done.stderr


def test_ctrl_c_while_modules_load_prints_nothing() -> None:
    slow = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torch': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from gptfast.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", slow, "info"], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


def test_ctrl_c_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exception may come without a word."""
    from gptfast.train.recipe import Recipe

    def interrupted(self: Recipe) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Recipe, "run", interrupted)
    monkeypatch.setattr(sys, "argv", ["gptfast", "recipe", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130 and capsys.readouterr().err == "stopped; the same command goes on\n"


def test_train_has_a_help(says: Callable[..., str]) -> None:
    assert "gptfast train STAGE --help" in says("train", "--help")


def test_wrong_usage(says: Callable[..., str]) -> None:
    assert "No such option" in says("generate", "--nonsense", code=2)


def test_kernels_says_what_is_wrong(fails: Callable[..., str]) -> None:
    pytest.importorskip("triton")
    assert "expected --arch of sm_80, sm_90" in (said := fails("kernels", "-a", "sm_61")) and "got sm_61" in said
    assert 'got "no such"' in fails("kernels", "no such")


def test_kernels_without_triton_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install 'gptfast-kernels[triton]'" in fails("kernels")


def test_kernels_lists_what_a_call_launches() -> None:
    pytest.importorskip("triton")
    [line] = gptfast("kernels", "swiglu 1536 bf16", "-a", "sm_80", "--json").stdout.decode().splitlines()[:1]
    found = json.loads(line)
    assert (found["arch"], found["kernel"], found["error"]) == ("sm_80", "_gated_kernel", None)
    assert found["resources"]["spills"] == 0 < found["resources"]["registers"]
    turn = found["turn"]
    assert turn["bytes"] >= 3 * 2048 * 2  # a program's gate, up and y, in bf16, and nothing is read twice
    assert turn["bound"] in turn["cycles"] and sum(turn["mix"].values()) == found["resources"]["instructions"]


def test_kernels_are_compared_and_drawn(tmp_path: Path, says: Callable[..., str], fails: Callable[..., str]) -> None:
    pytest.importorskip("triton")
    said = says("kernels", "swiglu 1536 bf16", "-a", "sm_80", "--compare", "geglu 1536 bf16")
    assert "swiglu 1536 bf16, sm_80" in said and "geglu 1536 bf16, sm_80" in said
    assert "issue slots" in said and "bound on the chip" in said and "ratio" in said
    says("kernels", "swiglu 1536 bf16", "-a", "sm_80", "--plot", str(tmp_path / "k.png"))
    assert (tmp_path / "k.png").read_bytes()[:4] == b"\x89PNG"
    assert "expected one call on either side" in fails("kernels", "swiglu", "--compare", "geglu")
    assert "no --json" in fails("kernels", "swiglu 1536 bf16", "--json", "--compare", "geglu 1536 bf16")
    assert "got sm_80 on both sides" in fails("kernels", "swiglu 1536 bf16", "-a", "sm_80", "--compare", "sm_80")
    said = fails("kernels", "swiglu 1536 bf16", "-a", "sm_80", "--compare", "rope 9/3 64 bf16")
    assert "launch no kernel of one name" in said
