"""How many passes something takes: rows times tokens times blocks that ran, over those of one run of all prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from p0circuit.prompts import PromptSet


class Passes:
    """`count` while and after the block is run."""

    def __init__(self, whole: int) -> None:
        self.tokens, self._whole = 0, whole

    @property
    def count(self) -> float:
        return self.tokens / self._whole


@contextmanager
def counted_passes(model: Any, prompts: PromptSet) -> Iterator[Passes]:
    """Count what runs through the blocks of a HookedTransformer."""
    passes = Passes(prompts.n * prompts.length * len(model.blocks))

    def add(block: Any, arguments: Any) -> None:
        passes.tokens += arguments[0].shape[0] * arguments[0].shape[1]

    handles = [block.register_forward_pre_hook(add) for block in model.blocks]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()
