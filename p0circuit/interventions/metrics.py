"""Metrics: one number per prompt that measures an intervention, from any activations and not only from logits.

1. A `Metric` lists its readings. Each names a hook and a function that reduces the activation there to something small,
   inside the hook, so that no large activation is stored.
2. A pass takes the readings and ends with the last of them: blocks that no reading needs do not run.
3. The metric combines its readings to one number per prompt.

The ready-made metrics look at one position of each prompt: P0 in clean prompts, and in shifted prompts the position of
the token that is at P0 in the clean ones. The same metric thus measures both. Offsets are counted from that position.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
"""In place of a hook name: read the logits."""
# Log-probabilities are a second copy of the logits, so they are computed for this many positions at a time.
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
        """Split into smaller batches.

        Args:
            size: largest number of prompts of a batch.
        """
        return [Rows(*parts) for parts in zip(*(part.split(size) for part in self), strict=True)]


@dataclass(frozen=True)
class Reading:
    """One input of a metric.

    Attributes:
        hook: name of the hook it is read at, or `LOGITS`.
        reduce: function of the activation and the `Rows`, giving a tensor whose first axis is the batch.
        offsets: for logits: positions that are needed, in tokens after the position of the rows; all if None.
    """

    hook: str
    reduce: Callable[[Tensor, Rows], Tensor]
    offsets: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Metric:
    """One number per prompt, computed from activations or logits.

    The value of a prompt must not depend on the other prompts of its batch.

    Attributes:
        name: name of the metric, for labels and errors.
        readings: its inputs.
        combine: function of the reduced readings, in their order, giving one number per prompt.
        heads: (layer, head) whose mean sink score, at the position of the rows, the metric is; None stands for all
            heads of a layer. Empty for other metrics.

    Example:
        def first_neuron(activation, rows):
            return activation[rows.at(0)][:, 0]

        Metric("neuron 1.0", (Reading("blocks.1.mlp.hook_post", first_neuron),), lambda reading: reading)
    """

    name: str
    readings: tuple[Reading, ...]
    combine: Callable[..., Tensor]
    heads: tuple[tuple[int, int | None], ...] = ()

    @property
    def last_layer(self) -> int | None:
        """Last block that has to run; None if the metric reads logits."""
        hooks = [reading.hook for reading in self.readings]
        return None if LOGITS in hooks else max(int(hook.split(".")[1]) for hook in hooks)

    def end(self, model: HookedModel) -> int:
        """Return the layer before which a pass may stop, because at most logits remain to be read.

        Args:
            model: a hooked model.
        """
        return describe(model).n_layers if self.last_layer is None else self.last_layer + 1

    def check(self, model: HookedModel) -> Metric:
        """Check that a model has everything that the metric reads.

        Args:
            model: a hooked model.

        Returns:
            The metric itself.

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

    def value(self, reduced: dict[int, Tensor]) -> Float[Tensor, " batch"]:
        """Compute the metric from its reduced readings.

        Args:
            reduced: reduced readings by their number.

        Raises:
            InterventionError: the result is not one finite number per row.
        """
        readings = [reduced[number] for number in range(len(self.readings))]
        value = self.combine(*readings)
        if value.shape != (len(readings[0]),):
            raise InterventionError(
                f"{self.name} gives {list(value.shape)} for {len(readings[0])} rows; expected one number for each"
            )
        if not bool(torch.isfinite(value).all()):
            raise InterventionError(f"{self.name} is not finite: check the model's weights, its dtype and the prompts")
        return value


class Complete(Exception):
    """Ends a pass when all readings of a metric have been taken."""


def reading_hooks(metric: Metric, rows: Rows, reduced: dict[int, Tensor]) -> list[Hook]:
    """Return hooks that take the missing readings of a metric, and raise `Complete` after the last one.

    Args:
        metric: the metric.
        rows: the batch.
        reduced: reduced readings by their number; the hooks add to it.
    """

    def read(activation: Tensor, hook: object, number: int) -> None:
        reduced[number] = metric.readings[number].reduce(activation, rows)
        if len(reduced) == len(metric.readings):
            raise Complete

    return [
        (reading.hook, functools.partial(read, number=number))
        for number, reading in enumerate(metric.readings)
        if reading.hook != LOGITS and number not in reduced
    ]


def read_logits(
    model: HookedModel,
    metric: Metric,
    stream: Float[Tensor, "batch pos d_model"],
    rows: Rows,
    reduced: dict[int, Tensor],
    at_once: int | None = None,
) -> None:
    """Compute logits from the residual stream after the last block, and take the readings of them.

    Args:
        model: a hooked model.
        metric: the metric.
        stream: the residual stream after the last block.
        rows: the batch.
        reduced: reduced readings by their number; this function adds to it.
        at_once: number of prompts whose logits exist at a time; all if None.
    """
    size, layers = at_once or len(stream), describe(model).n_layers
    for number, reading in enumerate(metric.readings):
        if reading.hook == LOGITS:
            parts = []
            for part, residual in zip(rows.split(size), stream.split(size), strict=True):
                needed = residual if reading.offsets is None else residual[part.at(reading.offsets)]
                parts.append(reading.reduce(resume(model, needed, layers), part))
            reduced[number] = torch.cat(parts)


@torch.no_grad()
def measure(
    model: HookedModel, prompts: PromptSet, metric: Metric, position: Int[Tensor, " batch"] | None = None
) -> Float[Tensor, " batch"]:
    """Measure every prompt, in one pass that ends with the last reading of the metric.

    Args:
        model: a hooked model.
        prompts: the prompts.
        metric: the metric.
        position: index in each prompt of the token that the metric is about; P0 if None.

    Raises:
        ModelError: the model does not have a hook that the metric reads.
        InterventionError: the metric reads outside the prompts, or its value is not finite.

    Example:
        measure(model, prompts, sink_score_of([(2, 1)]))  # [sample]
    """
    metric.check(model)
    positions = prompts.p0 if position is None else position
    return torch.cat([measure_rows(model, rows, metric).cpu() for rows in batches(model, prompts, positions)])


def measure_rows(model: HookedModel, rows: Rows, metric: Metric) -> Float[Tensor, " batch"]:
    """Measure every prompt of one batch.

    Args:
        model: a hooked model.
        rows: the batch.
        metric: the metric.
    """
    stream, reduced = run_up_to(model, rows, metric, metric.end(model))
    if stream is not None:
        read_logits(model, metric, stream, rows, reduced)
    return metric.value(reduced)


def run_up_to(model: HookedModel, rows: Rows, metric: Metric, layer: int) -> tuple[Tensor | None, dict[int, Tensor]]:
    """Run the blocks before a layer and take the readings of a metric in them.

    Args:
        model: a hooked model.
        rows: the batch.
        metric: the metric.
        layer: first block that does not run.

    Returns:
        The residual stream before the layer, or None if the readings were complete before; and the reduced readings by
        their number.
    """
    reduced: dict[int, Tensor] = {}
    with contextlib.suppress(Complete):
        hooks = reading_hooks(metric, rows, reduced)
        return forward(model, rows.ids, rows.mask, hooks=hooks, stop_at_layer=layer), reduced
    return None, reduced


def batches(model: HookedModel, prompts: PromptSet, position: Int[Tensor, " batch"]) -> list[Rows]:
    """Split prompts into batches that fit into memory.

    Args:
        model: a hooked model.
        prompts: the prompts.
        position: index in each prompt of the token that a metric is about.
    """
    device = device_of(model)
    rows = Rows(*(part.to(device) for part in (prompts.ids, prompts.attention_mask, position)))
    return rows.split(batch_size_for(model, prompts.length, with_logits=True))


def sink_score_of(heads: Sequence[int | tuple[int, int]], offset: int = 0) -> Metric:
    """Measure the mean sink score of heads.

    Args:
        heads: heads as (layer, head), or layers for all of their heads.
        offset: position whose score is measured, in tokens after the position of the rows.

    Raises:
        InterventionError: no head is given; when the metric is read: a head or position does not exist.

    Example:
        metric = p0circuit.sink_score_of([(2, 1), (3, 0)])
    """
    readings = _sink_scores(heads, offset)
    scored = tuple(
        (layer, head)
        for layer, numbers in _by_layer(heads).items()
        for head in ((None,) if numbers is None else numbers)
    )
    return Metric(f"sink score of {_named(heads)}", readings, _mean, scored if offset == 0 else ())


def sink_rate_of(heads: Sequence[int | tuple[int, int]], eps: float = sink.SINK_THRESHOLD, offset: int = 0) -> Metric:
    """Measure the share of heads whose sink score is above a threshold.

    Args:
        heads: heads as (layer, head), or layers for all of their heads.
        eps: threshold.
        offset: position whose score is measured, in tokens after the position of the rows.

    Raises:
        InterventionError: as `sink_score_of`.
    """

    def rate(*scores: Tensor) -> Tensor:
        return _mean(*((score > eps).to(score.dtype) for score in scores))

    return Metric(f"sink rate of {_named(heads)}", _sink_scores(heads, offset), rate)


def norm_ratio_after(layer: int, offset: int = 0) -> Metric:
    """Measure the norm of the residual stream after a block, over its median norm at the other positions.

    Args:
        layer: the block.
        offset: position that is measured, in tokens after the position of the rows.
    """

    def ratio(residual: Tensor, rows: Rows) -> Tensor:
        return sink.norm_ratio(residual, rows.at(offset)[1], rows.mask)

    return Metric(f"norm ratio after block {layer}", (Reading(f"blocks.{layer}.hook_resid_post", ratio),), _only)


def loss(offsets: Sequence[int] | None = None) -> Metric:
    """Measure the next-token loss in nats, averaged over predictions.

    Args:
        offsets: where the predictions are made, in tokens after the position of the rows; all from that position on if
            None.
    """

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
    """Make a metric of a function of logits.

    Args:
        name: name of the metric.
        function: function of logits [batch, pos, vocab] and `Rows`, giving one number per prompt.
        offsets: positions whose logits are needed, in tokens after the position of the rows; all if None.
    """
    return Metric(name, (Reading(LOGITS, function, None if offsets is None else tuple(offsets)),), _only)


def _only(reading: Tensor) -> Tensor:
    return reading


def _mean(*scores: Float[Tensor, "batch _"]) -> Float[Tensor, " batch"]:
    return torch.cat(scores, dim=1).mean(1)


def _named(heads: Sequence[int | tuple[int, int]]) -> str:
    names = [f"layer {head}" if isinstance(head, int) else f"head {head[0]}.{head[1]}" for head in heads]
    return ", ".join(names)


def _by_layer(heads: Sequence[int | tuple[int, int]]) -> dict[int, list[int] | None]:
    """Numbers of the heads of each layer; None for all of them."""
    by_layer: dict[int, list[int] | None] = {}
    for head in heads:
        if isinstance(head, int):
            by_layer[head] = None
        elif (numbers := by_layer.setdefault(head[0], [])) is not None:
            numbers.append(head[1])
    return by_layer


def _sink_scores(heads: Sequence[int | tuple[int, int]], offset: int) -> tuple[Reading, ...]:
    """One reading for each layer of the heads."""
    if not heads:
        raise InterventionError("no head to read the sink score of; expected (layer, head) pairs or layers")
    by_layer = _by_layer(heads)

    def scores(pattern: Tensor, rows: Rows, layer: int) -> Tensor:
        wanted, count = by_layer[layer], pattern.shape[1]
        if wanted is not None and not all(0 <= head < count for head in wanted):
            raise InterventionError(f"layer {layer} has heads 0 to {count - 1}, and the metric asks for {wanted}")
        if bool((pattern[:, :, -1].sum(-1) == 0).any()):
            # HookedTransformer replaces the NaN of a softmax by 0.
            raise InterventionError(f"layer {layer} attends to nothing: its scores are not finite, check the weights")
        pattern = pattern if wanted is None else pattern[:, wanted]
        return sink.sink_score(pattern, rows.at(offset)[1], rows.mask)

    return tuple(
        Reading(f"blocks.{layer}.attn.hook_pattern", functools.partial(scores, layer=layer)) for layer in by_layer
    )
