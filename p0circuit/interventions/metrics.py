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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from p0circuit import sink
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.nodes import InterventionError
from p0circuit.models import describe, device_of, forward, resume
from p0circuit.models.hooks import Hook, hook_point
from p0circuit.prompts import PromptSet
from p0circuit.recording.batch_size import batch_size_for

LOGITS = "logits"
"""What to read logits by: it stands where a hook's name would."""
# Log-probabilities are a second copy of the logits, so they are made for this many positions at a time.
_PIECE = 16


class Rows(NamedTuple):
    """A batch of prompts, with the position that a metric looks at in each of them.

    Attributes:
        ids: token ids.
        mask: whether each token is real.
        position: index of the token that the metric is about; P0 in clean prompts.
    """

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    position: Int[Tensor, " batch"]

    def at(self, offset: int | Sequence[int]) -> tuple[Int[Tensor, "batch *#offset"], Int[Tensor, "batch *offset"]]:
        """Index activations at some offset after the position of each prompt.

        Args:
            offset: tokens after `position`: one number or several.

        Returns:
            Row numbers and positions, to index an activation [batch, pos, ...] with.

        Raises:
            InterventionError: an offset leads to padding or out of the prompt.
        """
        steps = torch.as_tensor(offset, device=self.position.device)
        start = self.position.view(-1, *[1] * steps.ndim)
        numbers = torch.arange(len(start), device=start.device).view_as(start)
        position, last = start + steps, self.ids.shape[1] - 1
        outside = (position < 0) | (position > last) | ~self.mask[numbers, position.clamp(0, last)]
        for row in outside.view(len(outside), -1).any(1).nonzero()[:1, 0].tolist():
            first, here = int(self.mask[row].int().argmax()), int(self.position[row])
            raise InterventionError(
                f"offset {offset} from position {here} is outside row {row}, whose tokens stand at {first} to {last}; "
                f"expected an offset from {first - here} to {last - here}"
            )
        return numbers, position

    def split(self, size: int) -> list[Rows]:
        """The same rows, at most `size` at a time."""
        return [Rows(*parts) for parts in zip(*(part.split(size) for part in self), strict=True)]


@dataclass(frozen=True)
class Reading:
    """One thing a metric reads: the hook it is read at (or `LOGITS`) and what is made of it, its first axis the batch.

    `offsets` says where logits are wanted, counted from the place; everywhere if not given.
    """

    hook: str
    reduce: Callable[[Tensor, Rows], Tensor]
    offsets: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Metric:
    """One number per row of what a model computes; `combine` gets the reduced readings in their order.

    Rows are measured each by itself: who else is in the batch must make no difference.
    """

    name: str
    readings: tuple[Reading, ...]
    combine: Callable[..., Tensor]

    @property
    def last_layer(self) -> int | None:
        """The last block that has to run, at most up to the last reading in it; None for all of them and the logits."""
        hooks = [reading.hook for reading in self.readings]
        return None if LOGITS in hooks else max(int(hook.split(".")[1]) for hook in hooks)

    def end(self, model: HookedModel) -> int:
        """The layer before which a pass may stop: nothing but logits is left to read."""
        return describe(model).n_layers if self.last_layer is None else self.last_layer + 1

    def check(self, model: HookedModel) -> Metric:
        """The metric itself, if this model has all that it reads.

        Raises:
            ModelError: there is no such hook.
            InterventionError: nothing is read, or something outside the blocks.
        """
        for reading in self.readings:
            if reading.hook != LOGITS:
                hook_point(model, reading.hook)
        if not self.readings or not all(r.hook == LOGITS or r.hook.startswith("blocks.") for r in self.readings):
            raise InterventionError(
                f"{self.name} reads {[reading.hook for reading in self.readings]}; expected hooks in blocks, or logits"
            )
        return self

    def value(self, found: dict[int, Tensor]) -> Float[Tensor, " batch"]:
        """The metric, from its readings by their number.

        Raises:
            InterventionError: the result is not one finite number per row.
        """
        readings = [found[number] for number in range(len(self.readings))]
        value = self.combine(*readings)
        if value.shape != (len(readings[0]),):
            raise InterventionError(
                f"{self.name} gives {list(value.shape)} for {len(readings[0])} rows; expected one number for each"
            )
        if not bool(torch.isfinite(value).all()):
            raise InterventionError(f"{self.name} is not finite: check the model's weights, its dtype and the prompts")
        return value


class Complete(Exception):
    """Ends a pass in which all readings of a metric have been taken."""


def reading_hooks(metric: Metric, rows: Rows, found: dict[int, Tensor]) -> list[Hook]:
    """Hooks that put into `found` what is not in it yet, and raise `Complete` when everything is."""

    def note(activation: Tensor, hook: Any, number: int) -> None:
        found[number] = metric.readings[number].reduce(activation, rows)
        if len(found) == len(metric.readings):
            raise Complete

    return [
        (reading.hook, functools.partial(note, number=number))
        for number, reading in enumerate(metric.readings)
        if reading.hook != LOGITS and number not in found
    ]


def read_logits(
    model: HookedModel,
    metric: Metric,
    stream: Float[Tensor, "batch pos d_model"],
    rows: Rows,
    found: dict[int, Tensor],
    at_once: int | None = None,
) -> None:
    """Put the readings of logits into `found`, from the stream after the last block, `at_once` rows at a time."""
    size, layers = at_once or len(stream), describe(model).n_layers
    for number, reading in enumerate(metric.readings):
        if reading.hook == LOGITS:
            parts = []
            for part, residual in zip(rows.split(size), stream.split(size), strict=True):
                chosen = residual if reading.offsets is None else residual[part.at(reading.offsets)]
                parts.append(reading.reduce(resume(model, chosen, layers), part))
            found[number] = torch.cat(parts)


@torch.no_grad()
def measure(
    model: HookedModel, prompts: PromptSet, metric: Metric, place: Int[Tensor, " batch"] | None = None
) -> Float[Tensor, " batch"]:
    """The metric of each row at its place (P0 if not given), from one forward pass up to what it reads.

    Raises:
        InterventionError, ModelError: the model does not have what the metric reads, or the result is not finite.
    """
    metric.check(model)
    there = batches(model, prompts, prompts.p0 if place is None else place)
    return torch.cat([measure_rows(model, rows, metric).cpu() for rows in there])


def measure_rows(model: HookedModel, rows: Rows, metric: Metric) -> Float[Tensor, " batch"]:
    """The metric of each row of one batch."""
    stream, found = run_up_to(model, rows, metric, metric.end(model))
    if stream is not None:
        read_logits(model, metric, stream, rows, found)
    return metric.value(found)


def run_up_to(model: HookedModel, rows: Rows, metric: Metric, layer: int) -> tuple[Tensor | None, dict[int, Tensor]]:
    """The stream before a layer, and what the metric reads below it; no stream where that is all it reads."""
    found: dict[int, Tensor] = {}
    with contextlib.suppress(Complete):
        hooks = reading_hooks(metric, rows, found)
        return forward(model, rows.ids, rows.mask, hooks=hooks, stop_at_layer=layer), found
    return None, found


def batches(model: HookedModel, prompts: PromptSet, place: Int[Tensor, " batch"]) -> list[Rows]:
    """Prompts and their places as the batches they are run in."""
    device = device_of(model)
    rows = Rows(*(part.to(device) for part in (prompts.ids, prompts.attention_mask, place)))
    return rows.split(batch_size_for(model, prompts.length, with_logits=True))


def sink_score_of(heads: Sequence[int | tuple[int, int]], offset: int = 0) -> Metric:
    """The mean sink score of some heads, given as (layer, head) or as a layer for all of its heads.

    Raises:
        InterventionError: no head is given; when read, a head or position that does not exist.
    """
    return Metric(f"sink score of {_named(heads)}", _sink_scores(heads, offset), _mean)


def sink_rate_of(heads: Sequence[int | tuple[int, int]], eps: float = sink.SINK_THRESHOLD, offset: int = 0) -> Metric:
    """The share of some heads whose sink score is above `eps`; heads as in `sink_score_of`, and the same errors."""

    def rate(*scores: Tensor) -> Tensor:
        return _mean(*((score > eps).to(score.dtype) for score in scores))

    return Metric(f"sink rate of {_named(heads)}", _sink_scores(heads, offset), rate)


def norm_ratio_after(layer: int, offset: int = 0) -> Metric:
    """The norm of the residual stream after a block, over its median norm at the other positions of the row."""

    def ratio(residual: Tensor, rows: Rows) -> Tensor:
        return sink.norm_ratio(residual, rows.at(offset)[1], rows.mask)

    return Metric(f"norm ratio after block {layer}", (Reading(f"blocks.{layer}.hook_resid_post", ratio),), _only)


def loss(offsets: Sequence[int] | None = None) -> Metric:
    """Next-token loss (nats), the mean over predictions made `offsets` after the place; if not given, from there on."""

    def mean_loss(logits: Tensor, rows: Rows) -> Tensor:
        if offsets is None:
            position = torch.arange(rows.ids.shape[1], device=logits.device).expand(len(logits), -1)
            counted = (position >= rows.position[:, None]) & (position < rows.ids.shape[1] - 1)
        else:
            position = rows.at([step + 1 for step in offsets])[1] - 1
            counted = torch.ones_like(position, dtype=torch.bool)
        following = rows.ids.gather(1, (position + 1).clamp(max=rows.ids.shape[1] - 1))
        pieces = zip(logits.flatten(0, 1).split(_PIECE), following.flatten().split(_PIECE), strict=True)
        exact = torch.promote_types(logits.dtype, torch.float32)
        losses = torch.cat([cross_entropy(piece.to(exact), ids, reduction="none") for piece, ids in pieces])
        losses = losses.view_as(position).where(counted, 0)
        return losses.sum(1) / counted.sum(1)

    where = None if offsets is None else tuple(offsets)
    return Metric("loss", (Reading(LOGITS, mean_loss, where),), _only)


def of_logits(name: str, function: Callable[[Tensor, Rows], Tensor], offsets: Sequence[int] | None = None) -> Metric:
    """A function of logits [batch, pos, vocab] and `Rows` to [batch]; with `offsets`, of the logits there alone."""
    return Metric(name, (Reading(LOGITS, function, None if offsets is None else tuple(offsets)),), _only)


def _only(reading: Tensor) -> Tensor:
    return reading


def _mean(*scores: Float[Tensor, "batch _"]) -> Float[Tensor, " batch"]:
    return torch.cat(scores, dim=1).mean(1)


def _named(heads: Sequence[int | tuple[int, int]]) -> str:
    names = [f"layer {head}" if isinstance(head, int) else f"head {head[0]}.{head[1]}" for head in heads]
    return ", ".join(names)


def _sink_scores(heads: Sequence[int | tuple[int, int]], offset: int) -> tuple[Reading, ...]:
    """One reading for each layer that any of the heads is in."""
    if not heads:
        raise InterventionError("no head to read the sink score of; expected (layer, head) pairs or layers")
    chosen: dict[int, list[int] | None] = {}
    for head in heads:
        if isinstance(head, int):
            chosen[head] = None
        elif (others := chosen.setdefault(head[0], [])) is not None:
            others.append(head[1])

    def scores(pattern: Tensor, rows: Rows, layer: int) -> Tensor:
        wanted, count = chosen[layer], pattern.shape[1]
        if wanted is not None and not all(0 <= head < count for head in wanted):
            raise InterventionError(f"layer {layer} has heads 0 to {count - 1}, and the metric asks for {wanted}")
        if bool((pattern[:, :, -1].sum(-1) == 0).any()):
            # HookedTransformer puts 0 where softmax gives NaN.
            raise InterventionError(f"layer {layer} attends to nothing: its scores are not finite, check the weights")
        pattern = pattern if wanted is None else pattern[:, wanted]
        return sink.sink_score(pattern, rows.at(offset)[1], rows.mask)

    return tuple(
        Reading(f"blocks.{layer}.attn.hook_pattern", functools.partial(scores, layer=layer)) for layer in chosen
    )
