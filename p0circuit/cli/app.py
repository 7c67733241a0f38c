"""The `p0circuit` command and its exit codes.

0 when the job was done, 2 for wrong use, 1 for anything else.
"""

from __future__ import annotations

import os
import sys

import typer

from p0circuit.cli import measure, notebooks, reproduce, scale, store, training
from p0circuit.errors import P0Error
from p0circuit.log import report_progress, show_messages

app = typer.Typer(
    help="The P0 sink circuit: how position zero comes to draw a language model's attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    reproduce.reproduce,
    measure.run,
    measure.sink,
    measure.advise,
    store.fetch,
    store.models,
    training.train,
    training.trace,
    scale.sweep,
    store.cache,
    scale.bench,
):
    app.command()(command)
app.add_typer(notebooks.app, name="notebooks")


def main() -> None:
    """The `p0circuit` command."""
    show_messages()
    try:
        app()
    except P0Error as error:
        if os.environ.get("P0CIRCUIT_DEBUG"):
            raise
        report_progress(f"error: {error}")
        sys.exit(2)
    except (OSError, FloatingPointError) as error:
        # A full disk, or weights that give no numbers: the input was right, the job is not done.
        if os.environ.get("P0CIRCUIT_DEBUG"):
            raise
        report_progress(f"error: {error}")
        sys.exit(1)
