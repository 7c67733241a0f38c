"""The currency of cost: how often a model was run.

One *pass* is all prompts of an experiment through all blocks. Half of the rows, or half of the blocks, is half a pass;
a row of one token is one token's share of a row. What is counted is tokens times blocks, wherever this package runs
blocks (`forward`, `resume`, and the single-token forward of `interventions.single_token`). A forward pass with its
gradient counts three times, since the backward pass costs about two more. The unembedding is not counted.

Passes are exact and repeatable where seconds depend on the machine: they are what experiments declare and what tests
compare.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch

WITH_GRADIENT = 3
"""What a forward pass counts whose gradient is taken."""


@dataclass
class PassCount:
    """Blocks run since the count began, in tokens times blocks."""

    token_blocks: int = 0

    def passes(self, n: int, length: int, layers: int) -> float:
        """The count in passes of `n` prompts of `length` tokens through `layers` blocks."""
        return self.token_blocks / (n * length * layers)


_COUNTS: ContextVar[tuple[PassCount, ...]] = ContextVar("counts", default=())


@contextlib.contextmanager
def count_passes() -> Iterator[PassCount]:
    """Count the blocks that are run inside a `with`; counts may be nested.

    Example:
        with count_passes() as count:
            forward(model, prompts.ids)
        count.passes(prompts.n, prompts.length, describe(model).n_layers)  # 1.0
    """
    count = PassCount()
    token = _COUNTS.set((*_COUNTS.get(), count))
    try:
        yield count
    finally:
        _COUNTS.reset(token)


def count_blocks(tokens: int, blocks: int) -> None:
    """Add `tokens` that went through `blocks` blocks to every count under way."""
    for count in _COUNTS.get():
        count.token_blocks += tokens * blocks * (WITH_GRADIENT if torch.is_grad_enabled() else 1)
