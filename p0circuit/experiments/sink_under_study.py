"""Sink heads, chosen on one half of the samples and measured on the other, and their excess score.

*Sink heads*: heads with a mean sink score above 0.3. Where there are none, the three with the highest scores stand in,
and the result says so. *Excess score*: what these heads give to P0 beyond what they give to position 8; a head that
attends everywhere alike has next to none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from p0circuit.experiments.base import NotApplicable
from p0circuit.hooked_model import HookedModel
from p0circuit.prompts import PromptSet
from p0circuit.recording.quantities import score_at
from p0circuit.recording.record import BatchIntervention, record
from p0circuit.sink import CONTROL, SINK_THRESHOLD, TIMES_UNIFORM, any_sink_head, least_excess, sink_heads
from p0circuit.stats import Interval, bootstrap

Heads = Sequence[tuple[int, int]]
ByHead = Float[Tensor, "sample layer head"]


@dataclass(frozen=True)
class SinkHeads:
    """The heads whose sink is studied, and the samples that they were not chosen on.

    `above` is False where no head passes the threshold and the highest stand in. `excess` is the excess score on
    `prompts`.
    """

    heads: tuple[tuple[int, int], ...]
    above: bool
    prompts: PromptSet
    excess: Interval

    @property
    def names(self) -> list[str]:
        return [f"attn.{layer}.{head}" for layer, head in self.heads]

    @property
    def note(self) -> str:
        """For the result's notes."""
        how = "" if self.above else f" (the {len(self.heads)} highest: no head is above {SINK_THRESHOLD})"
        return f"sink heads: {listed(self.heads)}{how}, chosen on other samples; excess score {self.excess}"


def listed(heads: Heads, most: int = 12) -> str:
    """Heads by name; where there are many, how many there are in which layers."""
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


def find_sink_heads(model: HookedModel, prompts: PromptSet) -> SinkHeads:
    """Choose the sink heads on one half of the prompts and measure their excess score on the other.

    Raises:
        NotApplicable: not even these heads have a sink, so there is nothing to explain.
    """
    if prompts.n < 2 or prompts.length <= CONTROL:
        raise NotApplicable(
            f"{prompts.n} prompts of {prompts.length} tokens are too few: sink heads are chosen on one half, measured "
            f"on the other, and compared with position {CONTROL}"
        )
    first, second = prompts.split()
    scores = record(model, first, score_at(0))
    heads = sink_heads(scores)
    excess = bootstrap(excess_scores(model, second, heads))
    needed = least_excess(prompts.length)
    if not excess.low > needed:
        raise NotApplicable(
            f"there is no sink to explain: the excess score of the {len(heads)} highest heads is {excess}, and its "
            f"lower end not above {TIMES_UNIFORM} times that of uniform attention ({needed:.3f})"
        )
    return SinkHeads(tuple(heads), any_sink_head(scores), second, excess)


def scores_of(
    model: HookedModel,
    prompts: PromptSet,
    heads: Heads,
    offset: int = 0,
    interventions: Sequence[BatchIntervention] = (),
) -> Float[np.ndarray, " sample"]:
    """The mean score that these heads give to the position `offset` places after P0."""
    quantity = score_at(offset)
    return over_heads(record(model, prompts, quantity, interventions=interventions).double(), heads)


def excess_scores(
    model: HookedModel,
    prompts: PromptSet,
    heads: Heads,
    offset: int = 0,
    interventions: Sequence[BatchIntervention] = (),
) -> Float[np.ndarray, " sample"]:
    """These heads' mean excess score of P0, or of the position `offset` places after it."""
    return over_heads(excess_by_head(model, prompts, interventions, (offset,))[offset], heads)


def excess_by_head(
    model: HookedModel,
    prompts: PromptSet,
    interventions: Sequence[BatchIntervention] = (),
    offsets: Sequence[int] = (0,),
) -> dict[int, ByHead]:
    """The excess score of every head at some positions, all from the same run: their score minus that of position 8."""
    wanted = {offset: score_at(offset) for offset in {*offsets, CONTROL}}
    recording = record(model, prompts, list(wanted.values()), interventions=interventions)
    scores = {offset: recording[quantity].double() for offset, quantity in wanted.items()}
    return {offset: scores[offset] - scores[CONTROL] for offset in offsets}


def over_heads(values: ByHead, heads: Heads) -> Float[np.ndarray, " sample"]:
    """The mean over some heads."""
    layers, numbers = map(list, zip(*heads, strict=True))
    return values[:, layers, numbers].mean(1).cpu().numpy()
