"""The sink that an experiment studies: its heads, chosen on one half of the prompts, measured on the other half.

*Sink heads*: heads with a mean sink score above 0.3. Where there are none, the three with the highest scores stand in,
and the notes say so. *Excess score*: the attention of these heads to P0 minus their attention to position 8. A head
that attends to all positions alike has next to none.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float
from torch import Tensor

from p0circuit.experiments.base import NotApplicable
from p0circuit.experiments.conditions import with_and_without_bos
from p0circuit.hooked_model import HookedModel
from p0circuit.prompts import WITH_BOS, WITHOUT_BOS, PromptSet, condition_of
from p0circuit.recording.quantities import score_at
from p0circuit.recording.record import BatchIntervention, record
from p0circuit.sink import CONTROL, SINK_THRESHOLD, TIMES_UNIFORM, any_sink_head, least_excess, sink_heads
from p0circuit.stats import Interval, bootstrap, ratio_interval

Heads = Sequence[tuple[int, int]]
"""Heads as (layer, head)."""
ByHead = Float[Tensor, "sample layer head"]


@dataclass(frozen=True)
class StudiedSink:
    """The sink heads of a model, and the prompts on which their sink is measured.

    Attributes:
        model: the model that has the sink.
        heads: the sink heads, as (layer, head).
        prompts: prompts to measure on.
        chosen_on: the other prompts, on which the heads were chosen; also for estimates such as the P0 direction.
        notes: what a reader has to know, for the notes of a result.

    Example:
        sink = studied_sink(model, prompts)
        sink.excess                                                      # Interval over sink.prompts
        sink.share_left(ablate(model, sink.prompts, ["mlp.0"], to="zero"))
    """

    model: HookedModel = field(repr=False, compare=False)
    heads: tuple[tuple[int, int], ...]
    prompts: PromptSet
    chosen_on: PromptSet
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The heads by name, as in `attn.2.1`."""
        return [f"attn.{layer}.{head}" for layer, head in self.heads]

    @property
    def note(self) -> str:
        """All notes in one line."""
        return "; ".join(self.notes)

    @property
    def condition(self) -> str:
        """What the prompts begin with: `WITHOUT_BOS` or `WITH_BOS`, for example."""
        return condition_of(self.model, self.prompts)

    @functools.cached_property
    def excess(self) -> Interval:
        """The excess score of the clean run."""
        return bootstrap(self.excess_scores())

    def excess_scores(self, *interventions: BatchIntervention, offset: int = 0) -> Float[np.ndarray, " sample"]:
        """Measure the mean excess score of the heads under interventions.

        Args:
            interventions: made for `prompts`; none for the clean run.
            offset: position to measure, counted from P0.
        """
        return excess_scores(self.model, self.prompts, self.heads, offset, interventions)

    def share_left(self, *interventions: BatchIntervention) -> Interval:
        """Measure the share of the excess score that interventions leave, the samples being paired.

        Args:
            interventions: made for `prompts`.
        """
        return ratio_interval(self.excess_scores(*interventions), self.excess_scores())

    def subset(self, rows: slice | Sequence[int]) -> StudiedSink:
        """Return the same sink, to be measured on some of the prompts.

        Args:
            rows: indices into `prompts`.
        """
        return replace(self, prompts=self.prompts.subset(rows))

    def above(self, block: int) -> StudiedSink:
        """Return the sink of those heads that read what a block leaves in the stream.

        Args:
            block: the heads of later blocks stay; there may be none.
        """
        return replace(self, heads=heads_above(self.heads, block))

    def blocks_to_scan(self, most: int) -> list[int]:
        """Return blocks below the last sink head: the first half consecutive, the others evenly spaced.

        Args:
            most: number of blocks at most.
        """
        blocks = max(layer for layer, _ in self.heads)
        if blocks <= most:
            return list(range(blocks))
        near = most // 2
        far = np.linspace(near, blocks - 1, most - near)
        return [*range(near), *(round(block) for block in far.tolist())]


def studied_sink(
    model: HookedModel, prompts: PromptSet, above_block: int | None = None, in_either_condition: bool = False
) -> StudiedSink:
    """Choose the sink heads on one half of the prompts, and make sure that they have a sink on the other half.

    Args:
        model: the model.
        prompts: at least two prompts; `PromptSet.split` gives the halves.
        above_block: keep only the heads of later blocks. For interventions in blocks up to this one: heads in these
            blocks read the stream too early to show what the interventions do.
        in_either_condition: where there is no sink on the text as it is, look for one after BOS. Prompts that begin
            with BOS are used as they are: whoever made them chose the condition.

    Raises:
        NotApplicable: there is no sink, none above that block, or none in either condition.
    """
    sink = _in_either_condition(model, prompts) if in_either_condition else _choose(model, prompts)
    return sink if above_block is None else _restricted(sink, above_block)


def _choose(model: HookedModel, prompts: PromptSet) -> StudiedSink:
    if prompts.n < 2 or prompts.length <= CONTROL:
        raise NotApplicable(
            f"{prompts.n} prompts of {prompts.length} tokens are too few: sink heads are chosen on one half, measured "
            f"on the other, and compared with position {CONTROL}"
        )
    chosen_on, measured_on = prompts.split()
    scores = record(model, chosen_on, score_at(0))
    heads = sink_heads(scores)
    sink = StudiedSink(model, tuple(heads), measured_on, chosen_on)
    needed = least_excess(prompts.length)
    if not sink.excess.low > needed:
        raise NotApplicable(
            f"there is no sink to explain: the excess score of the {len(heads)} highest heads is {sink.excess}, and "
            f"its lower end not above {TIMES_UNIFORM} times that of uniform attention ({needed:.3f})"
        )
    how = "" if any_sink_head(scores) else f" (the {len(heads)} highest: no head is above {SINK_THRESHOLD})"
    note = f"sink heads: {head_list(heads)}{how}, chosen on other samples; excess score {sink.excess}"
    return replace(sink, notes=(note,))


def _in_either_condition(model: HookedModel, prompts: PromptSet) -> StudiedSink:
    if condition_of(model, prompts) == WITH_BOS:
        return _choose(model, prompts)
    sets = with_and_without_bos(model, prompts)
    try:
        return _choose(model, sets[WITHOUT_BOS])
    except NotApplicable as without:
        if WITH_BOS not in sets:
            raise
        try:
            return _choose(model, sets[WITH_BOS])
        except NotApplicable as after_bos:
            raise NotApplicable(f"{without}; after BOS: {after_bos}") from None


def _restricted(sink: StudiedSink, block: int) -> StudiedSink:
    later = sink.above(block)
    if not later.heads:
        raise NotApplicable(
            f"all sink heads ({head_list(sink.heads)}) are in blocks 0 to {block}: none reads what an intervention "
            "there leaves in the stream"
        )
    if len(later.heads) == len(sink.heads):
        return sink
    needed = least_excess(sink.prompts.length)
    if not later.excess.low > needed:
        raise NotApplicable(
            f"there is no sink above block {block} to explain: the excess score of the heads there is {later.excess}, "
            f"and its lower end not above {needed:.3f}"
        )
    left_out = head_list([head for head in sink.heads if head not in later.heads])
    note = f"{left_out}: not above block {block} and left out; the other heads have an excess score of {later.excess}"
    return replace(later, notes=(*sink.notes, note))


def heads_above(heads: Heads, block: int) -> tuple[tuple[int, int], ...]:
    """Return the heads that read what a block leaves in the stream: those of later blocks.

    Args:
        heads: heads as (layer, head).
        block: number of the block.
    """
    return tuple(head for head in heads if head[0] > block)


def head_list(heads: Heads, most: int = 12) -> str:
    """Name heads for a note; if there are many, give their number and their layers.

    Args:
        heads: heads as (layer, head).
        most: number of heads that are named one by one at most.
    """
    if len(heads) <= most:
        return ", ".join(f"attn.{layer}.{head}" for layer, head in heads)
    layers = sorted({layer for layer, _ in heads})
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    spans = [f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"{len(heads)} heads in layers {', '.join(spans)}"


def sink_scores(
    model: HookedModel,
    prompts: PromptSet,
    heads: Heads,
    offset: int = 0,
    interventions: Sequence[BatchIntervention] = (),
) -> Float[np.ndarray, " sample"]:
    """Measure the mean sink score of heads.

    Args:
        model: the model.
        prompts: prompts to run.
        heads: heads as (layer, head).
        offset: position to measure, counted from P0.
        interventions: made for `prompts`.
    """
    quantity = score_at(offset)
    return mean_over_heads(record(model, prompts, quantity, interventions=interventions).double(), heads)


def excess_scores(
    model: HookedModel,
    prompts: PromptSet,
    heads: Heads,
    offset: int = 0,
    interventions: Sequence[BatchIntervention] = (),
) -> Float[np.ndarray, " sample"]:
    """Measure the mean excess score of heads.

    Args:
        model: the model.
        prompts: prompts to run.
        heads: heads as (layer, head).
        offset: position to measure, counted from P0.
        interventions: made for `prompts`.
    """
    return mean_over_heads(excess_by_head(model, prompts, interventions, (offset,))[offset], heads)


def excess_by_head(
    model: HookedModel,
    prompts: PromptSet,
    interventions: Sequence[BatchIntervention] = (),
    offsets: Sequence[int] = (0,),
) -> dict[int, ByHead]:
    """Measure the excess score of every head: its score minus its score of position 8, from the same run.

    Args:
        model: the model.
        prompts: prompts to run.
        interventions: made for `prompts`.
        offsets: positions to measure, counted from P0.

    Returns:
        Scores [sample, layer, head] by offset.
    """
    wanted = {offset: score_at(offset) for offset in {*offsets, CONTROL}}
    recording = record(model, prompts, list(wanted.values()), interventions=interventions)
    scores = {offset: recording[quantity].double() for offset, quantity in wanted.items()}
    return {offset: scores[offset] - scores[CONTROL] for offset in offsets}


def mean_over_heads(values: ByHead, heads: Heads) -> Float[np.ndarray, " sample"]:
    """Return the mean over heads.

    Args:
        values: one value for every head, [sample, layer, head].
        heads: heads as (layer, head).
    """
    layers, numbers = map(list, zip(*heads, strict=True))
    return values[:, layers, numbers].mean(1).cpu().numpy()


def share_left(ablated: ByHead, clean: ByHead, heads: Heads) -> Interval:
    """Return the share of the heads' excess score that an intervention leaves, the samples being paired.

    Args:
        ablated: excess scores [sample, layer, head] under the intervention.
        clean: those of the clean run.
        heads: heads as (layer, head).
    """
    return ratio_interval(mean_over_heads(ablated, heads), mean_over_heads(clean, heads))
