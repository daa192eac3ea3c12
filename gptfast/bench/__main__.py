from __future__ import annotations

import os
import sys

from gptfast.bench.cli import main

if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output left: neither that nor what is still to be flushed is an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
