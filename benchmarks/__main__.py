"""`python -m benchmarks`: every op case, then whole-model generation, recorded in results/<machine>/*.csv.

Give a name to run one: ops, curve, gaps, generate, losses, patched, preferences, quality, rlhf, rollouts, scaling,
speculation, start, hogged, tiles, train; what follows it are its own options.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from benchmarks import (
    curve,
    gaps,
    generate,
    hogged,
    losses,
    ops,
    patched,
    preferences,
    quality,
    rlhf,
    rollouts,
    scaling,
    speculation,
    start,
    tiles,
    train,
)

ALL = {
    "ops": ops.main,
    "curve": curve.main,
    "gaps": gaps.main,
    "generate": generate.main,
    "losses": losses.main,
    "patched": patched.main,
    "preferences": preferences.main,
    "quality": quality.main,
    "rlhf": rlhf.main,
    "rollouts": rollouts.main,
    "scaling": scaling.main,
    "speculation": speculation.main,
    "start": start.main,
    "tiles": tiles.main,
    "hogged": hogged.main,
    "train": train.main,
}


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print(f"{__doc__}\n--quick: a first look, at the ops and at generation.")
        return 0
    if argv and argv[0] in ALL:
        return ALL[argv[0]](argv[1:])
    if argv and not set(argv) <= {"--quick"}:
        print(f"benchmarks: expected one of {', '.join(ALL)} and its options, or --quick, got {' '.join(argv)}")
        return 2
    return max(ops.main(argv), generate.main(argv))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output left: neither that nor what is still to be flushed is an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
