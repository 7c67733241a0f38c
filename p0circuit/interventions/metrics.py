"""What an intervention is measured by: one number per row, from any activations and not only from logits.

1. A `Metric` lists its readings. Each names a hook and a function that makes something small of the activation there,
   at once and inside the hook, so that no large activation is kept.
2. A pass collects the readings and ends with the last of them: what is not measured is not computed.
3. The metric combines its readings to one number per row.

The ready-made metrics look at one position of each row, its *place*: P0 in clean prompts, and in shifted ones the
position m of the token that is at P0 in the clean ones. The same metric thus measures both. Offsets count from there.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import cross_entropy

from p0circuit import sink
from p0circuit.activations import batch_size_for
from p0circuit.interventions.nodes import InterventionError
from p0circuit.models import ModelInfo, describe, forward, resume
from p0circuit.models.forward import Hook
from p0circuit.prompts import PromptSet

LOGITS = "logits"
"""The name to read logits by, where a hook's name would stand."""
# Log-probabilities are a copy of the logits they are made from, so they are made for this many positions at a time.
_PIECE = 16


class Rows(NamedTuple):
    """A batch of rows, and in each the position it is about."""

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    place: Int[Tensor, " batch"]

    def at(self, offset: int | Sequence[int]) -> Int[Tensor, "batch *offset"]:
        """The positions that are `offset` after the place.

        Raises:
            InterventionError: one of them is padding or lies outside the rows.
        """
        steps = torch.as_tensor(offset, device=self.place.device)
        position = self.place.view(-1, *[1] * steps.ndim) + steps
        length = self.ids.shape[1]
        inside = (position >= 0) & (position < length)
        for row in (~inside | ~self.mask[row_numbers(position), position.clamp(0, length - 1)]).flatten(1).any(1).nonzero()[:1]:
            first = int(self.mask[row].int().argmax())
            raise InterventionError(
                f"offset {offset} from position {int(self.place[row])} lies outside row {int(row)}, whose tokens stand "
                f"at {first} to {length - 1}; take an offset from {first - int(self.place[row])} to {length - 1 - int(self.place[row])}"
            )
        return position
