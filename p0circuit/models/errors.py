"""The error of a model, checkpoint or input that cannot be used."""

from __future__ import annotations

from collections.abc import Sequence

from p0circuit.errors import P0Error


class ModelError(P0Error):
    """A model, checkpoint or input that p0circuit refuses; the message says why and how to mend it."""


def listing(items: Sequence[object], most: int = 200) -> str:
    """Join items with commas for an error message.

    Args:
        items: what to list.
        most: the number of items that are listed; of the others only the number is given.
    """
    text = ", ".join(str(item) for item in items[:most])
    return text if len(items) <= most else f"{text} and {len(items) - most} more"
