"""Every bench case of every op page against eager PyTorch and torch.compile, recorded and drawn."""

from __future__ import annotations

from collections.abc import Sequence

from gptfast import bench
from gptfast.bench.record import results_file


def main(argv: Sequence[str] = ()) -> int:
    """`argv`: further options of `gptfast bench`."""
    path = results_file("ops")
    path.parent.mkdir(parents=True, exist_ok=True)
    compiled = [] if "--quick" in argv else ["--compile"]
    return bench.main([*compiled, "--csv", str(path), "--plot", str(path.with_suffix(".png")), *argv])
