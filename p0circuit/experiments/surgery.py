"""Donors for interventions on P0: streams and tokens of other samples, and random positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from p0circuit.experiments.base import NotApplicable
from p0circuit.hooked_model import HookedModel
from p0circuit.models import describe
from p0circuit.models.hooks import hook_points
from p0circuit.prompts import PromptSet
from p0circuit.recording.quantities import residual_at
from p0circuit.recording.record import record


def require_attention(model: HookedModel) -> None:
    """Check that attention can be edited.

    Args:
        model: the model.

    Raises:
        NotApplicable: it can only be read, as in some architectures of TransformerBridge.
    """
    if "blocks.0.attn.hook_pattern" in hook_points(model).read_only:
        info = describe(model)
        raise NotApplicable(f"the attention of {info.title} ({info.architecture}) can be read, but not edited")


def ordinary_streams(
    model: HookedModel, prompts: PromptSet, offsets: Sequence[int]
) -> Float[Tensor, "sample layers_and_one d_model"]:
    """Return for every row the stream at an ordinary position of the next row, before each block and at the end.

    Args:
        model: the model.
        prompts: the rows.
        offsets: ordinary positions, counted from P0; row i takes number i modulo their number.
    """
    quantities = [residual_at(offset) for offset in offsets]
    recording = record(model, prompts, quantities)
    streams = torch.stack([recording[quantity] for quantity in quantities])
    rows = torch.arange(prompts.n)
    return streams[rows % len(offsets), (rows + 1) % prompts.n]


def row_of_another_token(tokens: Int[Tensor, " sample"]) -> Int[Tensor, " sample"]:
    """Return for every row the number of the next one, counted in a ring, that has another token.

    Args:
        tokens: one token of every row.

    Raises:
        NotApplicable: all rows have the same token.
    """
    n = len(tokens)
    donors = torch.full((n,), -1)
    for step in range(1, n):
        row = (torch.arange(n) + step) % n
        donors = torch.where((donors < 0) & (tokens[row] != tokens), row, donors)
        if bool((donors >= 0).all()):
            return donors
    raise NotApplicable(f"all {n} rows have the token {int(tokens[0])} there: there is none to put in its place")


def random_offsets(n: int, seed: int, start: int, stop: int, but: Sequence[int] = ()) -> Int[Tensor, " sample"]:
    """Draw one position for each row.

    Args:
        n: number of rows.
        seed: seed of the draw.
        start: first position to draw from, counted from P0.
        stop: end of the range, exclusive.
        but: positions that are left out.
    """
    candidates = torch.tensor([offset for offset in range(start, stop) if offset not in but])
    return candidates[torch.randint(len(candidates), (n,), generator=torch.Generator().manual_seed(seed))]
