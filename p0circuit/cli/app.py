"""The `p0circuit` command and its exit codes.

0: done, also if an experiment does not apply to a model. 1: failed. 2: the input was refused, with "error: ...".
"""

from __future__ import annotations

import errno
import logging
import sys
from typing import Annotated

import typer

from p0circuit.cli import measure, notebooks, reproduce, scale, store, training
from p0circuit.errors import P0Error
from p0circuit.log import logger, show_messages

_FULL_DISK = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}

app = typer.Typer(
    help="The P0 sink circuit: how position zero comes to draw a language model's attention.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
for command in (
    reproduce.reproduce,
    measure.run,
    measure.sink,
    measure.advise,
    store.models,
    store.fetch,
    store.cache,
    training.train,
    training.trace,
    scale.sweep,
    scale.bench,
):
    app.command()(command)
app.add_typer(notebooks.app, name="notebooks")


def _print_version(wanted: bool) -> bool:
    if wanted:
        from p0circuit import __version__

        typer.echo(f"p0circuit {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def configure(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and end.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print details, and the traceback of an error.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")] = False,
) -> None:
    """Set which messages are printed on standard error; the help of the command is that of `app`."""
    if verbose and quiet:
        raise P0Error("--verbose and --quiet exclude each other")
    show_messages(logging.DEBUG if verbose else logging.ERROR if quiet else logging.INFO)


def main() -> None:
    """Run the `p0circuit` command.

    An input that p0circuit refuses, or a file that the system cannot read or write, is printed as one line. Any other
    exception is a bug and shows its traceback.
    """
    # A message may come before the options are read.
    show_messages()
    try:
        app()
    except P0Error as error:
        _end(error, 2)
    except OSError as error:
        # A full disk or a folder without write permission is no bug.
        if error.filename is None and error.errno not in _FULL_DISK:
            raise
        _end(error, 1)


def _end(error: Exception, code: int) -> None:
    logger.error("error: %s", error)
    logger.debug("Traceback:", exc_info=error)
    sys.exit(code)
