"""Triton's kernels compiled ahead of time, for machines that aren't here.

A launch is recorded from a real call and specialised by the JIT's own code: what Triton knows of a stride (that it is a
multiple of 16, that it is 1) decides how wide the accesses are, so that statistics of anything else would be of another
kernel. LLVM can abort, so the compiling is done in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gptfast import kernels
from gptfast.ops import BackendError

WORKER = "from gptfast.profile import aot; aot.work()"
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


@dataclass(frozen=True)
class Compiled:
    """One kernel of one call on one architecture: its resources (gptfast.profile.sass.Resources), or the error."""

    call: str
    arch: str
    kernel: str
    options: dict[str, Any]  # block sizes, warps, stages
    resources: dict[str, Any] | None
    error: str | None = None


def compile_launch(launch: Any, arch: str) -> Any:
    """Triton's CompiledKernel of a recorded launch (gptfast.kernels.triton.Launch)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    target: Any = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    backend = make_backend(target)
    kernel = launch.kernel
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, more = bind(*launch.arguments, **launch.named)
    given = {**launch.named, "debug": False}  # all of it, as the JIT checks it: some names are its own
    options, signature, constants, attributes = kernel._pack_args(backend, given, bound, specialization, more)
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def compile_call(
    name: str, arch: str, kernel: str = "", options: Mapping[str, Any] | None = None
) -> Iterator[Compiled]:
    """Every kernel that a shipped call (gptfast.profile.shipped) launches, each once; or those named `kernel` alone,
    with `options` that aren't their tiles'."""
    from gptfast.profile import shipped

    seen = set()
    launches = shipped.record(name, arch)
    while True:
        try:
            launch = next(launches, None)
        except BackendError as refused:  # no kernel for the backward
            yield Compiled(name, arch, "", {}, None, str(refused))
            return
        if launch is None:
            return
        if kernel and launch.kernel.__name__ != kernel:
            continue
        launch = replace(launch, named=launch.named | dict(options or {}))
        compiled = error = None
        try:
            compiled = compile_launch(launch, arch)
        except Exception as caught:  # the compiler's errors have many types
            error = f"{type(caught).__name__}: {caught}"[-2000:]
        if compiled is not None and compiled.hash in seen:
            continue
        seen.add(None if compiled is None else compiled.hash)
        given = {k: v for k, v in launch.named.items() if k.isupper() or k in ("num_warps", "num_stages")}
        found = None if compiled is None else _resources(compiled, arch, launch)
        yield Compiled(name, arch, launch.kernel.__name__, {k: str(v) for k, v in given.items()}, found, error)


def _resources(compiled: Any, arch: str, launch: Any) -> dict[str, Any]:
    """sass.resources(), kept beside the kernel in Triton's cache: the disassembler alone takes half a second, longer
    than most kernels' compilation, and many calls share kernels."""
    from triton.runtime.cache import get_cache_manager

    from gptfast.profile import sass

    reader = hashlib.sha256(Path(sass.__file__).read_bytes()).hexdigest()[:16]
    kept, name = get_cache_manager(compiled.hash), f"resources-{reader}.json"
    if path := kept.get_file(name):
        return json.loads(Path(path).read_text())
    blocks = [t for t in (*launch.arguments, *launch.named.values()) if hasattr(t, "block_shape")]
    described = sum(math.prod(t.block_shape) * t.base.element_size() for t in blocks)
    found = asdict(sass.resources(compiled, arch, described))
    kept.put(json.dumps(found), name, binary=False)
    return found


def survey(names: Iterable[str], archs: Iterable[str] = TARGETS) -> Iterator[Compiled]:
    """compile_call() for all of them, in processes of their own; one that dies costs the call that it died of."""
    names = list(names)
    yield from compiled_apart([(name, arch) for arch in archs for name in names])


def compiled_apart(jobs: Iterable[tuple[Any, ...]]) -> Iterator[Compiled]:
    """compile_call(*job) for all of them, as survey() does it."""
    left = list(jobs)
    while left:
        with tempfile.TemporaryFile("w+") as complaints:
            worker = subprocess.Popen(
                [sys.executable, "-c", WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                text=True,
            )
            assert worker.stdin is not None and worker.stdout is not None
            try:
                with worker.stdin:
                    worker.stdin.write(json.dumps(left))
                for line in worker.stdout:
                    if line.startswith("done "):
                        left.pop(0)
                    elif line.startswith("{"):
                        yield Compiled(**json.loads(line))
            finally:
                worker.stdout.close()
                if sys.exc_info()[0] is not None:  # who reads this has enough
                    worker.kill()
                worker.wait()
            complaints.seek(0)
            complaint = complaints.read()
        if worker.returncode and left:
            name, arch, *_ = left.pop(0)
            yield Compiled(name, arch, "", {}, None, f"the compiler died ({worker.returncode}): {complaint[-2000:]}")


def work() -> None:
    """What a process of survey() does: calls as JSON in, a line for each kernel out, and one after each call."""
    kernels.compile_only()
    for job in json.load(sys.stdin):
        for compiled in compile_call(*job):
            print(json.dumps(asdict(compiled)), flush=True)
        print("done", job[0], flush=True)
