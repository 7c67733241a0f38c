"""Which recordings of a run were read from the cache: part of a result's provenance."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class CacheReads:
    """Recordings of a run, each named "CONDITION/QUANTITY".

    The condition is what `record` was given as `condition`, else the first 12 digits of the prompts' fingerprint.

    Attributes:
        cached: recordings read from the cache, on disk or in the memory of the run.
        computed: recordings computed and then written to the cache.
    """

    cached: set[str] = field(default_factory=set)
    computed: set[str] = field(default_factory=set)


_OPEN: ContextVar[tuple[CacheReads, ...]] = ContextVar("cache_reads", default=())


@contextlib.contextmanager
def note_cache_reads() -> Iterator[CacheReads]:
    """Collect the names of everything that `record` and `cached` read or compute inside the `with` block.

    Recordings that never touch the cache (with interventions, on a model with hooks, or with `cache=None`) are left
    out. Blocks may be nested; the outer block collects the names of the inner one too.

    Example:
        with note_cache_reads() as reads:
            record(model, prompts, SINK_SCORE, condition="with BOS")
        reads.cached | reads.computed  # {"with BOS/sink_score"}

    Returns:
        The names, filled in while the block runs.
    """
    reads = CacheReads()
    token = _OPEN.set((*_OPEN.get(), reads))
    try:
        yield reads
    finally:
        _OPEN.reset(token)


def note(name: str, from_cache: bool) -> None:
    """Add one recording to every block that is open.

    Args:
        name: "CONDITION/QUANTITY".
        from_cache: whether it was read rather than computed.
    """
    for reads in _OPEN.get():
        (reads.cached if from_cache else reads.computed).add(name)
