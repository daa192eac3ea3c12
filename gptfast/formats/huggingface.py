"""Hugging Face model folders at file level: JSON configs, safetensors (one file or shards), tokenizer files.

Names and configs are not interpreted here. Nothing is ever unpickled: a folder of pickles is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gptfast.formats.extras import need
from gptfast.formats.files import FormatError, read_json, replacing

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth")
SHARD_BYTES = 5_000_000_000


class LazyTensors(Mapping[str, Tensor]):
    """A folder's tensors by name; each access reads one tensor from its file. Safe to use from several threads."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = dict(files)

    def __getitem__(self, name: str) -> Tensor:
        path = self._files[name]
        with _open(path) as file:
            try:
                return file.get_tensor(name)
            except _safetensors_error() as error:
                raise FormatError(f"{path.name}: tensor {name!r} cannot be read: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@dataclass(frozen=True)
class Folder:
    """What a folder holds. Files that are not there are None (or {} for generation_config)."""

    path: Path
    config: dict[str, Any]
    tensors: LazyTensors
    generation_config: dict[str, Any]
    tokenizer_file: Path | None
    tokenizer_config: dict[str, Any] | None
    chat_template: str | None

    @property
    def eos_ids(self) -> list[int]:
        """The ids that end a text: generation_config.json's, else config.json's."""
        for source in (self.generation_config, self.config):
            value = source.get("eos_token_id")
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if any(type(i) is not int or i < 0 for i in ids):
                raise FormatError(f"{self.path.name}: expected eos_token_id as token ids, got {value!r:.80}")
            if ids:
                return ids
        return []


def _safetensors_error() -> type[Exception]:
    return need("safetensors", "models").SafetensorError


def _open(path: Path) -> Any:
    """A safetensors file, its header checked by the library (sizes, offsets, types)."""
    try:
        return need("safetensors", "models").safe_open(str(path), framework="pt")
    except _safetensors_error() as error:
        raise FormatError(f"{path.name}: expected a safetensors file, got {error}") from None


def _inside(folder: Path, name: Any) -> Path:
    """The path of a shard. The name must be a plain file name, so that an index cannot reach other folders."""
    if not isinstance(name, str) or name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
        raise FormatError(f"{INDEX}: expected shards as names of .safetensors files in the folder, got {name!r:.80}")
    if not (folder / name).is_file():
        raise FormatError(f"{folder.name}: expected the shard {name} named by {INDEX}, but it is missing")
    return folder / name


def _locate_tensors(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
    if (folder / WEIGHTS).is_file():
        with _open(folder / WEIGHTS) as file:
            return {name: folder / WEIGHTS for name in file.keys()}  # noqa: SIM118 (not a mapping)
    if (folder / INDEX).is_file():
        names = read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise FormatError(f"{INDEX}: expected an object `weight_map` from tensor to shard")
        shards = {name: _inside(folder, name) for name in {json.dumps(n): n for n in names.values()}.values()}
        held: dict[Path, set[str]] = {}
        for path in shards.values():
            with _open(path) as file:
                held[path] = set(file.keys())
        for tensor, shard in names.items():
            if tensor not in held[shards[shard]]:
                raise FormatError(f"{INDEX}: expected tensor {tensor!r} in {shard}, but it is not there")
        return {tensor: shards[shard] for tensor, shard in names.items()}
    found = next((name for name in PICKLES if (folder / name).exists()), None)
    if found:
        raise FormatError(
            f"{folder.name}: {found} is a pickle, which may run code and is never read: convert the model to "
            "safetensors (transformers: `model.save_pretrained(folder)`)"
        )
    raise FormatError(f"{folder.name}: expected {WEIGHTS} or {INDEX}, found neither")


def _chat_template(folder: Path, tokenizer_config: dict[str, Any] | None) -> str | None:
    """chat_template.jinja if it is there, else tokenizer_config.json's (the one named "default" of several)."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > 1 << 20:
            raise FormatError(f"{path.name}: expected at most 1 MiB, got {path.stat().st_size} bytes")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{path.name}: expected UTF-8, got {error.reason} at byte {error.start}") from None
    value = (tokenizer_config or {}).get("chat_template")
    if isinstance(value, list):
        named = {
            v.get("name"): v.get("template") for v in value if isinstance(v, dict) and isinstance(v.get("name"), str)
        }
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise FormatError(f"tokenizer_config.json: expected chat_template as a string, got {type(value).__name__}")
    return value


def read_folder(path: str | os.PathLike[str]) -> Folder:
    """Reads a model folder; tensors are read when they are asked for.

    Raises:
        FormatError: a file is missing, malformed, or a pickle.
        FileNotFoundError: there is no such folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder with config.json and {WEIGHTS}, found none at {folder}")
    if not (folder / "config.json").is_file():
        raise FormatError(f"{folder.name}: expected config.json, but it is missing")

    def optional(name: str) -> dict[str, Any] | None:
        return read_json(folder / name) if (folder / name).is_file() else None

    tokenizer_config = optional("tokenizer_config.json")
    tokenizer_file = folder / "tokenizer.json"
    return Folder(
        path=folder,
        config=read_json(folder / "config.json"),
        tensors=LazyTensors(_locate_tensors(folder)),
        generation_config=optional("generation_config.json") or {},
        tokenizer_file=tokenizer_file if tokenizer_file.is_file() else None,
        tokenizer_config=tokenizer_config,
        chat_template=_chat_template(folder, tokenizer_config),
    )


def _shards(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """The tensors in their order, cut into groups of at most `limit` bytes (a larger tensor stands alone)."""
    groups: list[dict[str, Tensor]] = [{}]
    room = limit
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if groups[-1] and size > room:
            groups.append({})
            room = limit
        groups[-1][name] = tensor
        room -= size
    return groups


def write_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """One safetensors file. Tensors that share memory are written apart: the format knows no sharing.

    Raises OSError where the disk is full or not writable.
    """
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous()
        start = flat.untyped_storage().data_ptr()
        apart[name] = flat.clone() if start in seen or flat.untyped_storage().nbytes() != flat.nbytes else flat
        seen.add(start)
    try:
        need("safetensors.torch", "models").save_file(apart, str(path), metadata={"format": "pt"})
    except _safetensors_error() as error:
        raise OSError(f"the tensors for {path.parent} were not written: {error}") from None


def write_folder(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    extra: Mapping[str, Mapping[str, Any] | str | Path] | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model folder that `transformers` and `read_folder` load.

    Every file is written under a temporary name, flushed and then renamed, weights first and config.json last, so that
    a crash or a full disk leaves no half-written file under a real name.

    Args:
        path: the folder; made if it is missing.
        config: written as config.json.
        tensors: fp32, fp16, bf16 or integer tensors of any device.
        extra: more files by name: an object (written as JSON), text, or the path of a file to copy.
        shard_bytes: the most bytes of tensors in one file.

    Raises:
        ValueError: an extra's name is not a plain file name.
        OSError: the disk is full or not writable.
    """
    folder = Path(path)
    for name in extra or {}:
        if name != Path(name).name or name in ("config.json", WEIGHTS, INDEX):
            raise ValueError(f"expected extra files under plain names other than the model's own, got {name!r}")
    folder.mkdir(parents=True, exist_ok=True)
    groups = _shards(tensors, shard_bytes)
    names = [WEIGHTS] if len(groups) == 1 else _shard_names(len(groups))
    for name, group in zip(names, groups):
        with replacing(folder / name) as temporary:
            write_safetensors(group, temporary)
    if len(groups) > 1:
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        where = {tensor: name for name, group in zip(names, groups) for tensor in group}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    for name, content in (extra or {}).items():
        if isinstance(content, Path):
            with replacing(folder / name) as temporary:
                shutil.copyfile(content, temporary)
        elif isinstance(content, str):
            with replacing(folder / name) as temporary:
                temporary.write_text(content, encoding="utf-8")
        else:
            _write_json(folder / name, content)
    _write_json(folder / "config.json", config)
    for stale in (WEIGHTS, INDEX):  # of an earlier, differently sharded save: it would be read instead of this one
        if stale not in names and not (stale == INDEX and len(groups) > 1):
            (folder / stale).unlink(missing_ok=True)


def _shard_names(count: int) -> list[str]:
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
