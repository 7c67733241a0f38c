"""The command line: a thin layer over the classes that notebooks and scripts use."""

from p0circuit.cli.app import app, main

__all__ = ["app", "main"]
