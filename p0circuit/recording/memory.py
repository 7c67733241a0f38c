"""Memory of one run: recorded rows are reused, so that one clean pass serves every experiment.

Experiments use different parts of the same prompts: one half to choose heads on, the other half to measure on, or the
first prompts of either. The value of a quantity in one row (one prompt) does not depend on the other rows of its batch,
so a row recorded as part of one set of prompts is valid in another set. Inside `remember_rows()`, `record` stores every
row that it computes or reads, and assembles later sets of prompts from them.

The memory is limited: after `LIMIT` bytes no further rows are stored.
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
"""Size limit in bytes."""


@dataclass
class RowMemory:
    """Recorded values by the key of their quantity and the fingerprint of their row.

    Attributes:
        limit: size limit in bytes.
        held: bytes stored.
        rows: value of each row, by key and fingerprint.
    """

    limit: int = LIMIT
    held: int = 0
    rows: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def read(self, key: str, rows: Sequence[str]) -> Shaped[Tensor, "row *value"] | None:
        """Return the values of some rows; None unless all of them are stored.

        Args:
            key: key of model and quantity.
            rows: fingerprints of the rows.
        """
        held = self.rows.get(key, {})
        return torch.stack([held[row] for row in rows]) if all(row in held for row in rows) else None

    def write(self, key: str, rows: Sequence[str], values: Shaped[Tensor, "row *value"]) -> None:
        """Store the values of some rows, unless the memory is full.

        Args:
            key: key of model and quantity.
            rows: fingerprints of the rows.
            values: their values, in the same order.
        """
        if self.held + values.nbytes > self.limit:
            return
        self.held += values.nbytes
        self.rows.setdefault(key, {}).update(zip(rows, values.unbind(), strict=True))


_MEMORY: ContextVar[RowMemory | None] = ContextVar("row_memory", default=None)


def row_memory() -> RowMemory | None:
    """Return the memory of the present run; None outside `remember_rows()`."""
    return _MEMORY.get()


@contextlib.contextmanager
def remember_rows() -> Iterator[RowMemory]:
    """Store recorded rows inside a `with` block. A nested block uses the memory of the outer one.

    Returns:
        The memory.
    """
    if (memory := _MEMORY.get()) is not None:
        yield memory
        return
    memory = RowMemory()
    token = _MEMORY.set(memory)
    try:
        yield memory
    finally:
        _MEMORY.reset(token)
