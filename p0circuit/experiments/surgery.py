"""What the experiments that operate on P0 share: the sink they look at, what is left of it, and what to put there.

The paper has the sink decided in blocks 0 and 1. Where something is changed there, the sink is read off the sink heads
of later blocks: those of blocks 0 and 1 stand beside the surgery or before it, and cannot show what it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from p0circuit.experiments.base import NotApplicable
from p0circuit.experiments.sink_under_study import ByHead, Heads, excess_by_head, find_sink_heads, listed, over_heads
from p0circuit.hooked_model import HookedModel
from p0circuit.models import describe
from p0circuit.models.hooks import hook_points
from p0circuit.prompts import PromptSet
from p0circuit.recording.quantities import residual_at
from p0circuit.recording.record import record
from p0circuit.sink import least_excess
from p0circuit.stats import Interval, bootstrap, ratio_interval

if TYPE_CHECKING:
    from p0circuit.figures.style import Series

LAST_BLOCK = 1
"""The last of the blocks in which the paper has the sink decided."""


@dataclass(frozen=True)
class Sink:
    """The sink under study.

    Attributes:
        heads: sink heads above block 1.
        prompts: the samples to measure on.
        others: samples to estimate on, such as the P0 direction; the heads were chosen on them.
        notes: for the result.
    """

    heads: tuple[tuple[int, int], ...]
    prompts: PromptSet
    others: PromptSet
    notes: tuple[str, ...] = ()

    def scanned(self, most: int) -> list[int]:
        """The blocks below the last sink head, `most` of them: the first half in a row, the others spread evenly."""
        blocks = max(layer for layer, _ in self.heads)
        if blocks <= most:
            return list(range(blocks))
        near = most // 2
        far = np.linspace(near, blocks - 1, most - near)
        return [*range(near), *(round(block) for block in far.tolist())]


def find_sink(model: HookedModel, prompts: PromptSet, last: int = LAST_BLOCK) -> Sink:
    """The sink heads above block `last`, chosen on one half of the prompts, to be measured on the other.

    Raises:
        NotApplicable: there is no sink, or none above that block.
    """
    found = find_sink_heads(model, prompts)
    heads = heads_above(found.heads, last)
    if not heads:
        raise NotApplicable(
            f"all sink heads ({listed(found.heads)}) are in blocks 0 to {last}: none reads what surgery there "
            "leaves behind"
        )
    notes = [found.note]
    if len(heads) < len(found.heads):
        excess = bootstrap(over_heads(excess_by_head(model, found.prompts)[0], heads))
        needed = least_excess(prompts.length)
        if not excess.low > needed:
            raise NotApplicable(
                f"there is no sink above block {last} to explain: the excess score of the heads there is "
                f"{excess}, and its lower end not above {needed:.3f}"
            )
        left_out = listed([head for head in found.heads if head not in heads])
        notes.append(f"{left_out}: not above the surgery and left out; the others have an excess score of {excess}")
    # `find_sink_heads` draws the halves by the seed of the prompts: these are those that it chose on.
    return Sink(heads, found.prompts, prompts.split()[0], tuple(notes))


def require_attention(model: HookedModel) -> None:
    """Make sure that attention can be edited.

    Raises:
        NotApplicable: it can only be read, as in some architectures of TransformerBridge.
    """
    if "blocks.0.attn.hook_pattern" in hook_points(model).read_only:
        info = describe(model)
        raise NotApplicable(f"the attention of {info.title} ({info.architecture}) can be read, but not edited")


def heads_above(heads: Heads, layer: int) -> tuple[tuple[int, int], ...]:
    """Those of the heads that read what block `layer` leaves in the stream."""
    return tuple(head for head in heads if head[0] > layer)


def left_of(changed: ByHead, clean: ByHead, heads: Heads) -> Interval:
    """The share of the heads' excess score that a change leaves, the samples being paired."""
    return ratio_interval(over_heads(changed, heads), over_heads(clean, heads))


def lines(table: Any, by: str) -> Sequence[Series]:
    """The lines of a figure, one for each entry of a column, from a table with columns value, low and high."""
    from p0circuit.figures.style import Series

    return [
        Series(str(name), *(part[column].tolist() for column in ("value", "low", "high")))
        for name, part in table.groupby(by, sort=False)
    ]


def ordinary_streams(
    model: HookedModel, prompts: PromptSet, offsets: Sequence[int]
) -> Float[Tensor, "sample layers_and_one d_model"]:
    """For every row the stream at an ordinary position of the next row, before each block and at the end.

    The offsets take turns.
    """
    quantities = [residual_at(offset) for offset in offsets]
    recording = record(model, prompts, quantities)
    streams = torch.stack([recording[quantity] for quantity in quantities])
    rows = torch.arange(prompts.n)
    return streams[rows % len(offsets), (rows + 1) % prompts.n]


def row_of_another_token(tokens: Int[Tensor, " sample"]) -> Int[Tensor, " sample"]:
    """For every row the next one, counted in a ring, that has another token.

    Raises:
        NotApplicable: all rows have the same token.
    """
    n = len(tokens)
    found = torch.full((n,), -1)
    for step in range(1, n):
        row = (torch.arange(n) + step) % n
        found = torch.where((found < 0) & (tokens[row] != tokens), row, found)
        if bool((found >= 0).all()):
            return found
    raise NotApplicable(f"all {n} rows have the token {int(tokens[0])} there: there is none to put in its place")


def random_offsets(n: int, seed: int, start: int, stop: int, but: Sequence[int] = ()) -> Int[Tensor, " sample"]:
    """A position of each of `n` rows, counted from P0: drawn from `start` to `stop` - 1, some excepted."""
    drawable = torch.tensor([offset for offset in range(start, stop) if offset not in but])
    return drawable[torch.randint(len(drawable), (n,), generator=torch.Generator().manual_seed(seed))]
