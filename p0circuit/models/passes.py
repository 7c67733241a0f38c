"""The cost of an experiment: how often a model was run.

One *pass* is all prompts of an experiment through all blocks. Half of the prompts, or half of the blocks, is half a
pass. The count is in tokens times blocks, wherever this package runs blocks (`forward`, `resume`, and the single-token
forward of `interventions.single_token`). A forward pass with its gradient counts three times, since the backward pass
costs about two more. The unembedding is not counted.

Passes are exact and repeatable, while seconds depend on the machine. Experiments declare their passes, and tests
compare them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch

WITH_GRADIENT = 3
"""How often a forward pass is counted if its gradient is computed."""


@dataclass
class PassCount:
    """A count of what was run.

    Attributes:
        token_blocks: tokens times blocks since the count began.
    """

    token_blocks: int = 0

    def passes(self, n: int, length: int, n_layers: int) -> float:
        """Return the count in passes.

        Args:
            n: number of prompts of one pass.
            length: tokens per prompt.
            n_layers: blocks of the model.
        """
        return self.token_blocks / (n * length * n_layers)


_COUNTS: ContextVar[tuple[PassCount, ...]] = ContextVar("counts", default=())


@contextlib.contextmanager
def count_passes() -> Iterator[PassCount]:
    """Count the blocks that are run inside a `with`; counts can be nested.

    Yields:
        The count, which grows while the block inside the `with` runs.

    Example:
        ```python
        with torch.no_grad(), count_passes() as count:
            forward(model, prompts.ids)
        assert count.passes(prompts.n, prompts.length, describe(model).n_layers) == 1.0
        ```
    """
    count = PassCount()
    token = _COUNTS.set((*_COUNTS.get(), count))
    try:
        yield count
    finally:
        _COUNTS.reset(token)


def count_blocks(tokens: int, blocks: int) -> None:
    """Add a run to every count in progress; three times if gradients are enabled.

    Args:
        tokens: number of tokens of the batch.
        blocks: number of blocks that they were run through.
    """
    for count in _COUNTS.get():
        count.token_blocks += tokens * blocks * (WITH_GRADIENT if torch.is_grad_enabled() else 1)
