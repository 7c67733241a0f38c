"""`python -m p0circuit` is the `p0circuit` command."""

from p0circuit.cli import main

main()
