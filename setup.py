"""Builds gptfast: the Python package, kernels/<backend> installed as gptfast.kernels.<backend>, and the CPU extension.

A machine without a C++ compiler or CMake still gets a working package: the build says what is missing and goes on,
and `gptfast info` says it again with the command that mends it. GPTFAST_REQUIRE_CPU=1 makes that an error instead.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeExtension(Extension):
    """An extension whose sources are known to CMake, not to setuptools."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            self._cmake(ext)
        except (OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("GPTFAST_REQUIRE_CPU") == "1":
                raise
            print(
                f"gptfast: the CPU kernels were not built ({error}). The package works on the reference ops; for the "
                "fused CPU kernels install CMake and a C++20 compiler (Debian: apt install g++ cmake) and reinstall.",
                file=sys.stderr,
            )

    def _cmake(self, ext: Extension) -> None:
        import pybind11

        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"  # kept: ninja rebuilds only what changed
        cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
        if cmake is None or ninja is None:
            raise FileNotFoundError(f"{'cmake' if cmake is None else 'ninja'} was not found")
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        if subprocess.run(configure).returncode:  # a cache left by another interpreter or build environment
            (build / "CMakeCache.txt").unlink(missing_ok=True)
            subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build)], check=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(next(build.glob(out.name))), str(out))


MAPPED = [name for name in ("cpu", "triton", "cuda") if (ROOT / "kernels" / name / "__init__.py").exists()]

setup(
    packages=find_packages(include=["gptfast", "gptfast.*"]) + [f"gptfast.kernels.{name}" for name in MAPPED],
    package_dir={f"gptfast.kernels.{name}": f"kernels/{name}" for name in MAPPED},
    package_data={"gptfast": ["*.pyi", "py.typed"], "gptfast.kernels.cpu": ["*.h", "*.cpp"]},
    ext_modules=[CMakeExtension("gptfast._cpu")],
    cmdclass={"build_ext": CMakeBuild},
)
