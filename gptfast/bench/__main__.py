from __future__ import annotations

import sys

from gptfast.bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
