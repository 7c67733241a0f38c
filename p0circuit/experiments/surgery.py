"""What interventions put in the place of P0's stream or token: streams, tokens and positions of other samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    pass


def require_attention(model: HookedModel) -> None:
    """Make sure that attention can be edited.

    Raises:
        NotApplicable: it can only be read, as in some architectures of TransformerBridge.
    """
    if "blocks.0.attn.hook_pattern" in hook_points(model).read_only:
        info = describe(model)
        raise NotApplicable(f"the attention of {info.title} ({info.architecture}) can be read, but not edited")


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
