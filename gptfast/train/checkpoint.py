"""Checkpoints: folders of safetensors and JSON that are either whole or not there. Nothing is ever unpickled.

    <run>/checkpoints/step-00000100/
        <module>.safetensors     the parameters and buffers of each module that is trained
        optimizer.safetensors    AdamW's moments, by module and parameter
        state.json               the step, the stage's own state, its configuration
        DONE                     sha256 of each of these files; written last

A checkpoint is written under a temporary name, flushed to disk, and renamed when it is whole: who is killed meanwhile,
or runs out of disk, still has the one before. What a training step does is a function of this state and of the step
alone (no generator's state, no place in a data loader), so that a run that goes on is the run that never stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gptfast.formats.extras import need
from gptfast.formats.files import FormatError, read_json
from gptfast.train.optim import MOMENTS, AdamW

FORMAT = 1
NAME = re.compile(r"step-(\d{8,})")
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
) -> Checkpoint:
    """Writes a checkpoint of `step` steps done and removes all but the newest `keep`.

    Raises OSError where the disk is full or can't be written to; older checkpoints are as they were.
    """
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}"
    temporary = folder / f".{path.name}.part"
    _remove(temporary)
    temporary.mkdir()
    try:
        files = {f"{name}.safetensors": _tensors(module) for name, module in modules.items()}
        if optimizer is not None:
            files["optimizer.safetensors"] = _moments(modules, optimizer)
        for name, tensors in files.items():
            _save_tensors(tensors, temporary / name)
        content = {"format": FORMAT, "step": step, **state}
        (temporary / "state.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        sums = {p.name: _sha256(p) for p in sorted(temporary.iterdir())}
        (temporary / "DONE").write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
        for file in temporary.iterdir():
            _flush(file)
        _flush(temporary)
        _remove(path)  # of an earlier run of the same steps
        os.replace(temporary, path)
        _flush(folder)
    except BaseException as error:
        _remove(temporary)
        if isinstance(error, OSError) or "SafetensorError" in type(error).__name__:
            raise OSError(
                f"the checkpoint of step {step} was not saved: {_cause(error)}; older ones are kept"
            ) from None
        raise
    for old in checkpoints(run)[:-keep]:
        _remove(old.path)
    for left in folder.glob(".step-*.part"):  # of a process that was killed
        _remove(left)
    return Checkpoint(step, path)


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
    """Puts a checkpoint's tensors into the modules and the optimiser; its state.json.

    Raises FormatError where a file or a tensor is missing or has another shape.
    """
    state = read_json(checkpoint.path / "state.json")
    if state.get("format") != FORMAT:
        raise FormatError(f"{checkpoint.path.name}: expected format {FORMAT}, got {state.get('format')!r}")
    for name, module in modules.items():
        held = _load_tensors(checkpoint.path / f"{name}.safetensors")
        with torch.no_grad():
            for key, tensor in _named(module).items():
                tensor.copy_(_found(held, key, tensor, f"{name}.safetensors"))
    if optimizer is not None:
        held = _load_tensors(checkpoint.path / "optimizer.safetensors")
        for key, p in _parameters(modules).items():
            if f"{key}/step" not in held:
                continue  # it never had a gradient
            kept = optimizer.state[p]
            kept["step"] = held[f"{key}/step"].clone()
            for moment in (*MOMENTS, "master"):
                if f"{key}/{moment}" in held:
                    kept[moment] = _found(held, f"{key}/{moment}", p, "optimizer.safetensors").to(p.device)
    return state


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


def _found(held: Mapping[str, Tensor], key: str, like: Tensor, file: str) -> Tensor:
    if key not in held:
        raise FormatError(f"{file}: expected a tensor {key!r}, but it is not there")
    if held[key].shape != like.shape:
        raise FormatError(f"{file}: expected {key} {tuple(like.shape)}, got {tuple(held[key].shape)}")
    return held[key]


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    whole = {name: t.cpu().contiguous() for name, t in tensors.items()}
    need("safetensors.torch", "train").save_file(whole, str(path))


def _load_tensors(path: Path) -> dict[str, Tensor]:
    safetensors = need("safetensors", "train")
    try:
        return need("safetensors.torch", "train").load_file(str(path))
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
