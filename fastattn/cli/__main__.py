"""`python -m fastattn.cli` is the `fastattn` command."""

from fastattn.cli import main

main()
