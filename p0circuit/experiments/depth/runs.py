"""Runs of a batch of rows that start at any block, and the excess scores of all heads in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from p0circuit.hooked_model import HookedModel
from p0circuit.models import Hook, describe, device_of, forward, resume
from p0circuit.prompts import PromptSet
from p0circuit.recording.batch_size import batch_size_for
from p0circuit.sink import CONTROL, attention_to, mean_over_queries

Excess = Float[Tensor, "sample layer head"]
"""Excess scores: the attention that every head gives to P0 minus what it gives to position 8."""


def put_at_p0(
    name: str, value: Float[Tensor, "batch d_model"], p0: Int[Tensor, " batch"]
) -> tuple[str, Callable[..., Tensor]]:
    """A hook that gives P0 a value of its own at a hook point."""
    return name, lambda activation, hook: with_value_at(activation, p0, value)


def with_value_at(
    activation: Float[Tensor, "batch pos d_model"],
    position: Int[Tensor, " batch"],
    value: Float[Tensor, "batch d_model"],
) -> Float[Tensor, "batch pos d_model"]:
    """Return a copy of an activation with another vector at one position of each row."""
    new = activation.clone()
    new[torch.arange(len(new), device=new.device), position.to(new.device)] = value.to(new)
    return new


@dataclass(frozen=True)
class RowRuns:
    """A batch of rows, and runs of it that start at any block."""

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    p0: Int[Tensor, " batch"]

    @classmethod
    def of(cls, model: HookedModel, prompts: PromptSet, rows: slice) -> RowRuns:
        """Take some rows of prompts, on the device of the model."""
        return cls(*(part[rows].to(device_of(model)) for part in (prompts.ids, prompts.attention_mask, prompts.p0)))

    def clean(self, model: HookedModel) -> tuple[list[Float[Tensor, "batch pos d_model"]], Excess]:
        """The streams before every block and after the last, and the excess scores."""
        n_layers = describe(model).n_layers
        streams: dict[str, Tensor] = {}
        names = [f"blocks.{layer}.hook_resid_pre" for layer in range(n_layers)]
        names.append(f"blocks.{n_layers - 1}.hook_resid_post")

        def keep(activation: Tensor, hook: object, name: str) -> None:
            streams[name] = activation.clone()

        scores: dict[int, Tensor] = {}
        hooks = [(name, partial(keep, name=name)) for name in names]
        forward(
            model, self.ids, self.mask, hooks=[*hooks, *self.score_hooks(0, n_layers, scores)], stop_at_layer=n_layers
        )
        return [streams[name] for name in names], torch.stack([scores[layer] for layer in range(n_layers)], 1)

    def run(
        self,
        model: HookedModel,
        earlier: Excess,
        stream: Float[Tensor, "batch pos d_model"],
        start: int,
        hooks: Sequence[Hook] = (),
    ) -> Excess:
        """Excess scores of a run that goes on from a stream before block `start`; those before it are given."""
        n_layers = earlier.shape[1]
        scores = {layer: earlier[:, layer] for layer in range(n_layers)}
        if start < n_layers:
            readers = self.score_hooks(start, n_layers, scores)
            resume(model, stream, start, self.mask, hooks=[*hooks, *readers], stop_at_layer=n_layers)
        return torch.stack([scores[layer] for layer in range(n_layers)], 1).cpu()

    def step(
        self, model: HookedModel, stream: Float[Tensor, "batch pos d_model"], block: int, hooks: Sequence[Hook]
    ) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch head"]]:
        """The stream after one block, and the excess scores of its heads."""
        scores: dict[int, Tensor] = {}
        readers = self.score_hooks(block, block + 1, scores)
        after = resume(model, stream, block, self.mask, hooks=[*hooks, *readers], stop_at_layer=block + 1)
        return after, scores[block]

    def with_p0(
        self, stream: Float[Tensor, "batch pos d_model"], value: Float[Tensor, "batch d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """The stream with another vector at P0."""
        return with_value_at(stream, self.p0, value)

    def score_hooks(self, start: int, stop: int, scores: dict[int, Tensor]) -> list[Hook]:
        """Hooks that put the excess scores of the heads of some layers into `scores`."""

        def read(pattern: Tensor, hook: object, layer: int) -> None:
            positions = (self.p0, self.p0 + CONTROL)
            at_p0, at_control = (
                mean_over_queries(attention_to(pattern, position).float(), position, self.mask)
                for position in positions
            )
            scores[layer] = at_p0 - at_control

        return [(f"blocks.{layer}.attn.hook_pattern", partial(read, layer=layer)) for layer in range(start, stop)]


def row_batches(model: HookedModel, prompts: PromptSet) -> Iterator[slice]:
    """Divide the rows into batches that fit into memory."""
    size = batch_size_for(model, prompts.length, with_logits=False)
    return (slice(start, start + size) for start in range(0, prompts.n, size))
