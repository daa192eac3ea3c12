"""Downloads by pip and npm, the registries' own clients, so that mirrors, proxies and logins work as the user set them.

pip builds the metadata of every source package that it downloads, which runs that package's code and may install
others for it. We need the file alone, so pip is given a build backend of ours that answers with the package's name:
no stranger's code runs, and nothing else is downloaded.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptfast.train.data.packages import Package

TIMEOUT = 900.0  # seconds for one package: 85 MB over a slow line
BACKEND = '''\
"""A build backend that builds nothing: pip asks it for metadata and gets the name that the package itself states."""
import os, sys

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(directory, config_settings=None):
    folder = os.path.join(directory, "data.dist-info")
    os.makedirs(folder)
    with open("PKG-INFO", encoding="utf-8") as file:
        stated = [line.strip() for line in file if line.startswith(("Name: ", "Version: "))][:2]
    with open(os.path.join(folder, "METADATA"), "w", encoding="utf-8") as file:
        file.write("\\n".join(["Metadata-Version: 2.1", *stated, ""]))
    return "data.dist-info"

def build_wheel(directory, config_settings=None, metadata_directory=None):
    raise RuntimeError("nothing is built")

__legacy__ = sys.modules[__name__]
'''


class RegistryError(OSError):
    """pip or npm could not give a package: one sentence that says why."""


def npm() -> str | None:
    """npm's path, or None where there is none."""
    return shutil.which("npm")


def download(package: Package, folder: Path) -> Path:
    """Downloads a package's archive into a folder. Its path. Raises RegistryError."""
    (_by_pip if package.registry == "pip" else _by_npm)(package, folder)
    path = folder / package.archive
    if not path.is_file():
        got = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise RegistryError(f"expected {package.archive} from {package.registry}, got {got}")
    return path


def _by_pip(package: Package, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), "--no-input"]
    environment = dict(os.environ)
    if package.archive.endswith(".whl"):
        command += ["--only-binary", package.name]
    else:
        command += ["--no-binary", package.name, "--no-build-isolation", "--use-pep517"]
        for name in ("setuptools/build_meta.py", "hatchling/build.py"):
            path = folder / "backend" / name
            path.parent.mkdir(parents=True)
            (path.parent / "__init__.py").touch()
            path.write_text(BACKEND, encoding="utf-8")
        environment["PYTHONPATH"] = str(folder / "backend")
    # What the user pins for installing has no say in which data a model is trained on.
    environment.pop("PIP_CONSTRAINT", None)
    environment.pop("PIP_REQUIRE_VIRTUALENV", None)
    _run([*command, f"{package.name}=={package.version}"], package, folder, environment)


def _by_npm(package: Package, folder: Path) -> None:
    program = npm()
    if program is None:
        raise RegistryError(
            f"expected npm, which {package.name} comes by, got none in PATH: install it or use --pip-only"
        )
    command = [program, "pack", f"{package.name}@{package.version}", "--ignore-scripts", "--loglevel=error"]
    _run(command, package, folder, dict(os.environ))


def _run(command: Sequence[str], package: Package, folder: Path, environment: dict[str, str]) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        raise RegistryError(
            f"expected {package.name} within {TIMEOUT:.0f} s, got no end of {package.registry}"
        ) from None
    except OSError as error:
        raise RegistryError(f"expected to start {command[0]}, got {error}") from None
    if done.returncode:
        text = (done.stderr + b"\n" + done.stdout).decode("utf-8", "replace")
        raise RegistryError(f"expected {package.name} {package.version} by {package.registry}, got {_reason(text)}")


def _reason(text: str) -> str:
    """Why pip or npm failed, in a few words, from what it wrote."""
    if re.search(r"No module named '?pip", text):
        return "a Python without pip: run `python -m ensurepip`"
    if re.search(r"No space left|ENOSPC", text):
        return "a full disk"
    if re.search(
        r"NewConnectionError|Connection(Error| refused| broken)|name resolution|timed out|ETIMEDOUT|ENOTFOUND|EAI_AGAIN"
        r"|ECONNREFUSED|ECONNRESET|SSLError|ProxyError|network",
        text, re.IGNORECASE,
    ):  # fmt: skip
        return "no connection to the registry: check the network, or the proxy in your settings"
    if re.search(r"No matching distribution|E404|ETARGET", text):
        return "no such version there: check which index or registry is set"
    lines = [line.strip() for line in text.splitlines() if re.search(r"error|ERR", line, re.IGNORECASE)]
    return (lines or [line.strip() for line in text.splitlines() if line.strip()] or ["no reason"])[0][:300]
