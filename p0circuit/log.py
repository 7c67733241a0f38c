"""Messages and progress bars, by the standard library's logging.

All messages go to the logger "p0circuit" (or a logger below it). As a library the package is silent below the level of
a warning, as Python's logging is unless a program configures it. The command line calls `show_messages`. Messages are
written to standard error, so that standard output stays free for JSON. A notebook shows none: its outputs are results.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

# No NullHandler: it would also hide warnings, such as those of a monitor that could not read a training run.
logger = logging.getLogger("p0circuit")


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


if in_notebook():
    # tqdm, which other libraries import, warns of missing widgets that no notebook here needs.
    warnings.filterwarnings("ignore", message="IProgress not found")


class _TerminalHandler(logging.Handler):
    """Writes each message as one line to standard error, without its level or time."""

    def emit(self, record: logging.LogRecord) -> None:
        from rich.console import Console

        Console(stderr=True, highlight=False, soft_wrap=True).print(self.format(record), markup=False)


def show_messages(level: int = logging.INFO) -> None:
    """Write messages of the package to standard error from now on, and show progress bars on a terminal.

    Does nothing in a notebook. A second call changes the level.

    Args:
        level: lowest level that is shown, such as `logging.DEBUG` (which recordings come from the cache),
            `logging.INFO` (progress) or `logging.ERROR`. Progress bars are shown at `logging.INFO` and below.
    """
    if in_notebook():
        return
    if not _messages_shown():
        logger.addHandler(_TerminalHandler())
    logger.setLevel(level)


def report_progress(message: str) -> None:
    """Log what the program is doing, or where it wrote a result, at the level `logging.INFO`.

    Args:
        message: one sentence or line.
    """
    logger.info("%s", message)


def progress_bar(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Pass items on, with a progress bar on the terminal while messages are shown.

    Args:
        items: what to iterate over.
        description: text before the bar.
        total: number of items, if `items` has no length.

    Returns:
        An iterator over the same items.
    """
    if not (_messages_shown() and logger.isEnabledFor(logging.INFO)):
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(items, description, total=total, console=console, transient=True, disable=not console.is_terminal)


def _messages_shown() -> bool:
    return any(isinstance(handler, _TerminalHandler) for handler in logger.handlers)
