"""What a person sees while the work goes on: on standard error, so that standard output stays free for JSON."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def in_notebook() -> bool:
    """Whether this runs in the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


if in_notebook():
    # tqdm, which others bring in, misses widgets that no notebook here has a use for.
    warnings.filterwarnings("ignore", message="IProgress not found")


def say(message: str) -> None:
    """One line to the person at the terminal; nothing in a notebook, whose outputs are its results."""
    from rich.console import Console

    if in_notebook():
        return

    Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Pass `items` on and show a progress bar meanwhile, where someone is there to see it."""
    from rich.console import Console
    from rich.progress import track as rich_track

    console = Console(stderr=True)
    yield from rich_track(
        items, description, total=total, console=console, transient=True, disable=not console.is_terminal
    )
