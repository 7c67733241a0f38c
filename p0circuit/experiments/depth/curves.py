"""What is left of the sink when P0's stream or its attention output is replaced, block by block.

All curves compare the clean run with the shifted one, in which the same token is not first.

1. *Stream.* After block b, P0's stream is that of the shifted run at the same depth; later blocks run as they are.
2. *Mixed attention.* In a set of blocks, P0's attention output is that of the shifted run, mixed from the values of
   several positions. In all other blocks P0 attends to itself alone, as the causal mask makes it. A block with P0's own
   output is one in which P0 is *recognised*.
   - mixed from block b on: recognition in the blocks before b only (a prefix);
   - mixed up to block b: recognition after it only (a suffix);
   - mixed in block b only, and in all blocks but b.

Cost. One clean pass gives the streams before all blocks, and every run starts at the first block that it changes. Runs
that are mixed up to block b start from the one that is mixed up to b - 1. Each of the curves over L blocks takes
(L + 1) / 2 passes over its rows in place of L.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from p0circuit.experiments.depth.runs import Excess, RowRuns, put_at_p0, row_batches
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.nodes import Node
from p0circuit.interventions.pairs import PromptPair, values_at
from p0circuit.log import progress_bar
from p0circuit.models import Hook, describe, device_of
from p0circuit.prompts import PromptSet


@dataclass(frozen=True)
class ShiftedValues:
    """What P0's token has when it is not first, in every block.

    Attributes:
        attention: its attention output in every block.
        stream: its stream after every block.
    """

    attention: Float[Tensor, "sample layer d_model"]
    stream: Float[Tensor, "sample layer d_model"]


def shifted_values(model: HookedModel, pair: PromptPair) -> ShiftedValues:
    """Read the shifted run at the position of P0's token: one pass."""
    layers = range(describe(model).n_layers)
    nodes = [Node(kind, layer) for kind in ("attn", "resid_post") for layer in layers]
    values = values_at(model, pair.shifted, nodes, pair.position)
    attention, stream = (
        torch.stack([values[Node(kind, layer)] for layer in layers], 1) for kind in ("attn", "resid_post")
    )
    return ShiftedValues(attention, stream)


@dataclass(frozen=True)
class Curves:
    """Excess scores of every head in the clean run and in every changed one; see the module's text.

    Attributes:
        clean: of the clean run.
        stream: with P0's stream replaced after block b.
        mixed_from: mixed from block b on, so that recognition is left in blocks 0 to b - 1.
        mixed_up_to: mixed in blocks 0 to b, so that recognition is left after it.
        mixed_in: mixed in block b only.
        mixed_but_in: mixed in all blocks but b.
    """

    clean: Excess
    stream: Float[Tensor, "_ sample layer head"]
    mixed_from: Float[Tensor, "_ sample layer head"]
    mixed_up_to: Float[Tensor, "_ sample layer head"]
    mixed_in: Float[Tensor, "_ sample layer head"]
    mixed_but_in: Float[Tensor, "_ sample layer head"]


CURVES = ("stream", "mixed_from", "mixed_up_to", "mixed_in", "mixed_but_in")


def passes_of_curves(n_layers: int, curves: Sequence[str] = CURVES) -> float:
    """Passes over the rows that `measure_curves` takes, the clean and the shifted run included."""
    triangle = (n_layers + 1) / 2
    # The stream after the last block is read by no head, and a chain runs every block once more for its next start.
    cost = {"stream": (n_layers - 1) / 2, "mixed_up_to": triangle + 1 - 1 / n_layers, "mixed_but_in": triangle}
    return 2 + sum(cost.get(name, triangle) for name in curves)


@torch.no_grad()
def measure_curves(model: HookedModel, pair: PromptPair, curves: Sequence[str] = CURVES) -> Curves:
    """Measure the excess scores of all heads in every run of the curves.

    Args:
        model: a hooked model whose attention output can be replaced.
        pair: the clean and the shifted run.
        curves: those to measure; the others are empty.

    Returns:
        The curves, on the processor.
    """
    values = shifted_values(model, pair)
    runs: dict[str, list[list[Tensor]]] = {name: [] for name in ("clean", *CURVES)}
    for rows in progress_bar(list(row_batches(model, pair.clean)), "depth"):
        for name, excess in _curves_of_rows(model, pair.clean, values, rows, curves).items():
            runs[name].append(excess)
    joined = {name: _joined(parts) for name, parts in runs.items()}
    clean = joined["clean"][0]
    empty = clean.new_empty(0, *clean.shape)
    return Curves(clean, **{name: joined[name] if len(joined[name]) else empty for name in CURVES})


def _curves_of_rows(
    model: HookedModel, prompts: PromptSet, values: ShiftedValues, rows: slice, curves: Sequence[str]
) -> dict[str, list[Tensor]]:
    """All runs of some rows: for every curve a list over blocks."""
    n_layers, batch = describe(model).n_layers, RowRuns.of(model, prompts, rows)
    streams, clean = batch.clean(model)
    attention, shifted = (part[rows].to(device_of(model)) for part in (values.attention, values.stream))

    def mixing(blocks: Sequence[int]) -> list[Hook]:
        return [put_at_p0(f"blocks.{block}.hook_attn_out", attention[:, block], batch.p0) for block in blocks]

    run = partial(batch.run, model, clean)
    # The heads of the blocks that a chain has passed score what they score in the chain.
    chained = clean.clone()
    runs: dict[str, list[Tensor]] = {"clean": [clean.cpu()], **{name: [] for name in CURVES}}
    mixed = streams[0]
    for block in range(n_layers):
        later = range(block + 1, n_layers)
        if "stream" in curves:
            replaced = batch.with_p0(streams[block + 1], shifted[:, block])
            runs["stream"].append(run(replaced, block + 1))
        if "mixed_from" in curves:
            runs["mixed_from"].append(run(streams[block], block, mixing(range(block, n_layers))))
        if "mixed_in" in curves:
            runs["mixed_in"].append(run(streams[block], block, mixing([block])))
        if "mixed_but_in" in curves:
            runs["mixed_but_in"].append(batch.run(model, chained, mixed, block, mixing(later)))
        if "mixed_up_to" in curves or "mixed_but_in" in curves:
            mixed, chained[:, block] = batch.step(model, mixed, block, mixing([block]))
        if "mixed_up_to" in curves:
            runs["mixed_up_to"].append(batch.run(model, chained, mixed, block + 1))
    return runs


def _joined(parts: Sequence[Sequence[Tensor]]) -> Tensor:
    """Runs of batches as one tensor [run, sample, layer, head]."""
    return torch.stack([torch.cat(runs) for runs in zip(*parts, strict=True)]) if parts and parts[0] else torch.empty(0)


def excess_above(
    excess: Float[Tensor, "sample layer head"], heads: Sequence[tuple[int, int]], block: int = -1
) -> Float[np.ndarray, " sample"] | None:
    """The mean excess score of the heads above a block, which read what was changed there; None if none is above it."""
    selected = [head for head in heads if head[0] > block]
    if not selected:
        return None
    layers, numbers = map(list, zip(*selected, strict=True))
    return excess[:, layers, numbers].double().mean(1).numpy()
