"""What a person sees while the work goes on: on standard error, so that standard output stays free for JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def say(message: str) -> None:
    """One line to the person at the terminal."""
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Pass `items` on and show a progress bar meanwhile, where someone is there to see it."""
    from rich.console import Console
    from rich.progress import track as rich_track

    console = Console(stderr=True)
    yield from rich_track(
        items, description, total=total, console=console, transient=True, disable=not console.is_terminal
    )
