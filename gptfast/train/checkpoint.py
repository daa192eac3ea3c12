"""Checkpoints: folders of safetensors and JSON that are either whole or not there. Nothing is ever unpickled.

    <run>/checkpoints/step-00000100/
        <module>.safetensors     the parameters and buffers of each module that is trained
        optimizer.safetensors    AdamW's moments, by module and parameter
        state.json               the step, the stage's own state, its configuration
        DONE                     sha256 of each of these files; written last

With FSDP2 each process writes its own rows of every tensor, <module>.0003.safetensors, in a folder that all of them
reach; any number of processes reads them back, one too.

A checkpoint is written under a temporary name, flushed to disk, and renamed when it is whole: who is killed meanwhile,
or runs out of disk, still has the one before. What a training step does is a function of this state and of the step
alone (no generator's state, no place in a data loader), so that a run that goes on is the run that never stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gptfast.formats.extras import need
from gptfast.formats.files import REPLACING, FormatError, read_json
from gptfast.train.optim import MOMENTS, AdamW, local
from gptfast.train.parallel import World

FORMAT = 1
NAME = re.compile(r"step-(\d{8,})")
PART = re.compile(r"\.step-\d{8,}\.part")
CHUNK = 4 << 20


class Checkpoint(NamedTuple):
    """A whole checkpoint on disk: steps that are done, and where it is."""

    step: int
    path: Path


def checkpoints(run: Path) -> list[Checkpoint]:
    """The checkpoints of a run that were written to their end, the newest last; their content isn't looked at."""
    found = []
    folder = run / "checkpoints"
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = NAME.fullmatch(path.name)
        if match and (path / "DONE").is_file():
            found.append(Checkpoint(int(match[1]), path))
    return sorted(found)


def save(
    run: Path,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizer: AdamW | None,
    state: Mapping[str, Any],
    keep: int = 2,
    world: World | None = None,
) -> Checkpoint:
    """Writes a checkpoint of `step` steps done and removes all but the newest `keep`. All processes call it.

    Raises OSError where the disk is full or can't be written to; older checkpoints are as they were.
    """
    world = world or World()
    world.settle(modules)
    folder = run / "checkpoints"
    path = folder / f"step-{step:08d}"
    temporary = folder / f".{path.name}.part"

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        temporary.mkdir()

    def write() -> None:
        sharded = world.size > 1 and world.kind == "fsdp"
        if not sharded and not world.first:
            return
        end = f".{world.rank:04d}.safetensors" if sharded else ".safetensors"
        files = {name + end: _tensors(module) for name, module in modules.items()}
        if optimizer is not None:
            files["optimizer" + end] = _moments(modules, optimizer)
        for name, tensors in files.items():
            # What isn't cut (buffers) is the same in every process: the first one's is enough.
            mine = tensors if world.first else {n: t for n, t in tensors.items() if local(t) is not t}
            _save_tensors(mine, temporary / name)
        if world.first:
            text = json.dumps({"format": FORMAT, "step": step, **state}, indent=1) + "\n"
            (temporary / "state.json").write_text(text, encoding="utf-8")
        written = [*files, "state.json"] if world.first else list(files)
        sums = {name: _sha256(temporary / name) for name in written}
        for name in written:
            _flush(temporary / name)
        (temporary / f"sums-{world.rank}").write_text(json.dumps(sums), encoding="utf-8")

    def finish() -> None:
        sums: dict[str, str] = {}
        for part in sorted(temporary.glob("sums-*")):
            sums |= json.loads(part.read_text(encoding="utf-8"))
            part.unlink()
        (temporary / "DONE").write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
        _flush(temporary / "DONE")
        _flush(temporary)
        _remove(path)  # of an earlier run of the same steps
        os.replace(temporary, path)
        _flush(folder)
        tidy(run, keep)

    why = ""
    try:
        for part, everywhere in ((begin, False), (write, True), (finish, False)):
            if everywhere or world.first:
                try:
                    part()
                except Exception as error:
                    if not isinstance(error, OSError) and "SafetensorError" not in type(error).__name__:
                        raise
                    why = _cause(error)
            if world.agree(bool(why)):
                why = why or "another process could not write"
                raise OSError(f"the checkpoint of step {step} was not saved: {why}; older ones are kept")
    except BaseException:
        if world.first:
            with contextlib.suppress(OSError):
                _remove(temporary)
        raise
    return Checkpoint(step, path)


def tidy(run: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and what a killed process left half written or half removed."""
    folder = run / "checkpoints"
    for old in checkpoints(run)[:-keep]:
        _remove(old.path)
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if PART.fullmatch(path.name) or (NAME.fullmatch(path.name) and not (path / "DONE").is_file()):
            _remove(path)
    for found in (run.glob(".*.part"), (run / "model").rglob(".*.part")):  # an ensemble has a folder for each member
        for path in found:
            if REPLACING.fullmatch(path.name):
                path.unlink(missing_ok=True)


def latest(run: Path) -> Checkpoint | None:
    """The newest checkpoint whose files are those that were written; None without one.

    A damaged one is passed over for the one before. Raises FormatError where all are damaged.
    """
    found = checkpoints(run)
    wrong = ""
    for checkpoint in reversed(found):
        wrong = damage(checkpoint)
        if not wrong:
            return checkpoint
    if found:
        raise FormatError(f"{run.name}: none of its {len(found)} checkpoints is whole ({wrong})")
    return None


def damage(checkpoint: Checkpoint) -> str:
    """What is wrong with a checkpoint's files, as a clause; empty where they are as they were written."""
    try:
        sums = read_json(checkpoint.path / "DONE")
    except (FormatError, OSError) as error:
        return str(error)
    if "state.json" not in sums:
        return f"{checkpoint.path.name}/DONE names no state.json"
    for name, wanted in sums.items():
        file = checkpoint.path / name
        if name != Path(name).name or not file.is_file():
            return f"{checkpoint.path.name}/{name} is missing"
        if _sha256(file) != wanted:
            return f"{checkpoint.path.name}/{name} is not what was written"
    return ""


def load(checkpoint: Checkpoint, modules: Mapping[str, nn.Module], optimizer: AdamW | None) -> dict[str, Any]:
    """Puts a checkpoint's tensors into the modules and the optimiser, whose parameters may be cut by FSDP2; its
    state.json.

    Raises FormatError where a file or a tensor is missing or has another shape.
    """
    state = read_json(checkpoint.path / "state.json")
    if state.get("format") != FORMAT:
        raise FormatError(f"{checkpoint.path.name}: expected format {FORMAT}, got {state.get('format')!r}")
    for name, module in modules.items():
        held = _Stored(checkpoint.path, name)
        with torch.no_grad():
            for key, tensor in _named(module).items():
                local(tensor).copy_(held.rows(key, tensor))
    if optimizer is not None:
        held = _Stored(checkpoint.path, "optimizer")
        for key, p in _parameters(modules).items():
            if f"{key}/step" not in held.where:
                continue  # it never had a gradient
            kept = optimizer.state[p]
            kept["step"] = held.rows(f"{key}/step", torch.empty(())).clone()
            for moment in (*MOMENTS, "master"):
                if f"{key}/{moment}" in held.where:
                    value = torch.empty_like(p, dtype=torch.float32)  # cut as the parameter is
                    local(value).copy_(held.rows(f"{key}/{moment}", p))
                    kept[moment] = value
    return state


class _Stored:
    """The tensors of one module in a checkpoint, whole or in several processes' parts."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.where: dict[str, list[tuple[Path, int]]] = {}  # for each tensor, the files and the first row in each
        files = [folder / f"{name}.safetensors"]
        if not files[0].is_file():
            files = sorted(folder.glob(f"{name}.[0-9][0-9][0-9][0-9].safetensors"))
        if not files:
            raise FormatError(f"{folder.name}: expected {name}.safetensors, but it is missing")
        for file in files:
            with _opened(file) as reader:
                firsts = json.loads((reader.metadata() or {}).get("first_rows", "{}"))
                for key in reader.keys():  # noqa: SIM118 (not a mapping)
                    self.where.setdefault(key, []).append((file, int(firsts.get(key, 0))))

    def rows(self, key: str, like: Tensor) -> Tensor:
        """The rows of a tensor that this process holds of `like`."""
        if key not in self.where:
            raise FormatError(f"{self.name}.safetensors: expected a tensor {key!r}, but it is not there")
        shape = tuple(like.shape)
        first, count = first_row(like), local(like).shape[0] if shape else 0
        found: list[Tensor] = []
        rows = 0
        for file, start in sorted(self.where[key], key=lambda place: place[1]):
            with _opened(file) as reader:
                if not shape:
                    return reader.get_tensor(key)
                part = reader.get_slice(key)
                size = part.get_shape()
                rows += size[0] if size else 0
                low, high = max(first - start, 0), min(first + count - start, size[0] if size else 0)
                if tuple(size[1:]) == shape[1:] and low < high:
                    found.append(part[low:high])
        if rows != shape[0] or sum(t.shape[0] for t in found) != count:
            raise FormatError(f"{self.name}.safetensors: expected {key} {shape}, got {rows} rows or another width")
        return torch.cat(found) if found else local(like).new_empty((0, *shape[1:]))


def first_row(t: Tensor) -> int:
    """Which row of the whole tensor this process's part begins with; parts are cut as torch.chunk cuts."""
    if local(t) is t:
        return 0
    sharded: Any = t
    mesh, placements = sharded.device_mesh, sharded.placements
    if len(placements) != 1 or not placements[0].is_shard(0):
        raise ValueError(f"a checkpoint holds tensors cut by their rows, got one with {placements}")
    chunk = -(-t.shape[0] // mesh.size())
    return min(t.shape[0], chunk * mesh.get_local_rank())


def _named(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that are saved, those that are shared once."""
    named = dict(module.named_parameters())
    persistent = module.state_dict(keep_vars=True)
    return named | {n: b for n, b in module.named_buffers() if n in persistent}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach() for name, t in _named(module).items()}


def _parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    return {f"{name}/{key}": p for name, module in modules.items() for key, p in module.named_parameters()}


def _moments(modules: Mapping[str, nn.Module], optimizer: AdamW) -> dict[str, Tensor]:
    held = {}
    for key, p in _parameters(modules).items():
        for name, value in optimizer.state.get(p, {}).items():
            held[f"{key}/{name}"] = value.detach()
    return held


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    whole = {name: local(t).cpu().contiguous() for name, t in tensors.items()}
    metadata = {"first_rows": json.dumps({name: first for name, t in tensors.items() if (first := first_row(t))})}
    need("safetensors.torch", "train").save_file(whole, str(path), metadata=metadata)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    safetensors = need("safetensors", "train")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise FormatError(f"{path.name}: expected a safetensors file, got {error}") from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.exists():
        # Without its DONE it is no checkpoint any more, should this be cut short.
        (path / "DONE").unlink(missing_ok=True)
        shutil.rmtree(path)


def _cause(error: BaseException) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return text.splitlines()[0] if text else type(error).__name__
