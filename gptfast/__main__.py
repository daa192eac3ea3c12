"""`python -m gptfast`."""

from gptfast.cli import main

main()
