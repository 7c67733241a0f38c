"""Rows recorded in the course of a run, so that one clean pass serves every experiment.

Experiments look at different parts of the same prompts: one half to choose heads on, the other to measure on, the first
few rows of either. What a quantity is in one row does not depend on the rows beside it, so a row that was recorded as
part of one set of prompts is the same row in another. Inside `remember_rows()`, `record` keeps every row it has
recorded or read, and assembles from these whatever subset is asked for next.

Memory is bounded: once `LIMIT` bytes are held, further rows are recorded anew each time they are asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from jaxtyping import Shaped
from torch import Tensor

LIMIT = 192 * 2**20
"""Bytes of recorded rows that are held at most."""


@dataclass
class RowMemory:
    """Recorded values by what they are values of (`key`) and by the fingerprint of their row."""

    limit: int = LIMIT
    held: int = 0
    rows: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def read(self, key: str, rows: Sequence[str]) -> Shaped[Tensor, "row *value"] | None:
        """The values of these rows, None unless all of them are held."""
        held = self.rows.get(key, {})
        return torch.stack([held[row] for row in rows]) if all(row in held for row in rows) else None

    def write(self, key: str, rows: Sequence[str], values: Shaped[Tensor, "row *value"]) -> None:
        """Hold the values of these rows, if there is room."""
        if self.held + values.nbytes > self.limit:
            return
        self.held += values.nbytes
        self.rows.setdefault(key, {}).update(zip(rows, values.unbind(), strict=True))


_MEMORY: ContextVar[RowMemory | None] = ContextVar("row_memory", default=None)


def row_memory() -> RowMemory | None:
    """The memory of the run under way, None outside `remember_rows()`."""
    return _MEMORY.get()


@contextlib.contextmanager
def remember_rows() -> Iterator[RowMemory]:
    """Hold recorded rows inside a `with`; inside another one, its memory is used."""
    if (memory := _MEMORY.get()) is not None:
        yield memory
        return
    memory = RowMemory()
    token = _MEMORY.set(memory)
    try:
        yield memory
    finally:
        _MEMORY.reset(token)
