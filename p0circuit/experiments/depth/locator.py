"""The locator: curves and stages of one model on one set of prompts, measured once for all claims about depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float

from p0circuit.experiments.depth.curves import CURVES, Curves, excess_above, measure_curves, passes_of_curves
from p0circuit.experiments.depth.stages import Stage, consistencies, find_stages
from p0circuit.experiments.sink_under_study import StudiedSink, studied_sink
from p0circuit.experiments.surgery import require_attention
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.pairs import PromptPair, shifted_pair
from p0circuit.models import describe
from p0circuit.prompts import PromptSet
from p0circuit.recording.quantities import NORM_RATIO, residual_at
from p0circuit.recording.record import cached, record
from p0circuit.stats import Interval, ratio_interval

SHIFT = 8
"""Tokens before P0's token in the shifted run."""
ENOUGH = 0.8
"""Share of the sink that recognition in the first K blocks alone must leave for K to be the circuit's depth."""


@dataclass(frozen=True)
class DepthConfig:
    """What is measured for the claims about depth.

    Attributes:
        samples: maximum number of prompts to measure on.
        shift: number of random tokens before P0's token in the shifted run.
    """

    samples: int = 64
    shift: int = SHIFT


@dataclass(frozen=True, eq=False)
class StagedSink:
    """A sink and the stages of P0's stream that its heads read.

    Attributes:
        sink: the sink heads and the prompts that they were not chosen on.
        measured: those of these prompts to measure on.
        stages: runs of depths in which P0 has one direction.
        norm_ratios: the mean norm ratio at every depth.
        consistency: how alike the samples' directions are at every depth.
    """

    sink: StudiedSink
    measured: PromptSet
    stages: list[Stage]
    norm_ratios: Float[np.ndarray, " depth"]
    consistency: Float[np.ndarray, " depth"]


@dataclass(frozen=True, eq=False)
class Located:
    """Where the circuit of a model is.

    Attributes:
        staged: the sink and the stages.
        pair: clean and shifted runs that the curves are measured on.
        curves: what is left of the sink, block by block.
    """

    staged: StagedSink
    pair: PromptPair
    curves: Curves

    @property
    def sink(self) -> StudiedSink:
        """The sink heads and the prompts that they were not chosen on."""
        return self.staged.sink

    @property
    def stages(self) -> list[Stage]:
        """Runs of depths in which P0 has one direction."""
        return self.staged.stages

    def left(self, curve: str, block: int, heads: Sequence[tuple[int, int]] | None = None) -> Interval | None:
        """The share of the sink that a run of a curve leaves, in the heads that are above a changed stream.

        Args:
            curve: a name of `CURVES`.
            block: which of its runs.
            heads: sink heads; all if not given. With the curve "stream" those above the block count.

        Returns:
            The ratio of mean excess scores with its 95 % interval over samples; None where no head is left.
        """
        studied = self.sink.heads if heads is None else heads
        lowest = block if curve == "stream" else -1
        edited = excess_above(getattr(self.curves, curve)[block], studied, lowest)
        clean = excess_above(self.curves.clean, studied, lowest)
        return None if edited is None or clean is None else ratio_interval(edited, clean)

    def depth_of(self, samples: Sequence[int] | None = None) -> int:
        """The circuit depth K: the fewest first blocks in which recognition alone leaves 0.8 of the sink.

        Args:
            samples: those to take the means over; all if not given.
        """
        rows = slice(None) if samples is None else list(samples)
        clean = excess_above(self.curves.clean[rows], self.sink.heads)
        assert clean is not None
        for block, edited in enumerate(self.curves.mixed_from):
            left = excess_above(edited[rows], self.sink.heads)
            assert left is not None
            if left.mean() / clean.mean() >= ENOUGH:
                return block
        return len(self.curves.mixed_from)


def passes_of_locator(model: HookedModel, prompts: PromptSet, config: DepthConfig) -> float:
    """What `locate` takes beyond the clean recording, in passes over the prompts."""
    measured = min(prompts.n - round(prompts.n / 2), config.samples)
    return passes_of_curves(describe(model).n_layers) * measured / prompts.n


def staged_sink(model: HookedModel, prompts: PromptSet, config: DepthConfig = DepthConfig()) -> StagedSink:
    """Find the sink heads and the stages that they read; all of it is in the clean recording.

    Args:
        model: a hooked model with a sink.
        prompts: half of them serve to choose the sink heads, the others to measure.
        config: how many of these at most.

    Raises:
        NotApplicable: there is no sink.
    """
    sink = studied_sink(model, prompts)
    recording = record(model, sink.prompts, [residual_at(), NORM_RATIO])
    streams = recording[residual_at()].double().numpy()
    norm_ratios = recording[NORM_RATIO].double().mean(0).numpy()
    stages = find_stages(streams, norm_ratios, sink.heads)
    measured = sink.prompts.subset(slice(0, config.samples))
    return StagedSink(sink, measured, stages, norm_ratios, consistencies(streams))


def locate(model: HookedModel, prompts: PromptSet, config: DepthConfig = DepthConfig()) -> Located:
    """Measure curves and stages; a second call reads the curves from the cache.

    Args:
        model: a hooked model with a sink.
        prompts: half of them serve to choose the sink heads, the others to measure.
        config: how many of these, and how far P0's token is shifted.

    Raises:
        NotApplicable: there is no sink, or attention can be read only.
    """
    require_attention(model)
    staged = staged_sink(model, prompts, config)
    pair = shifted_pair(model, staged.measured, config.shift, prompts.seed)
    n_layers = describe(model).n_layers

    def stacked() -> torch.Tensor:
        curves = measure_curves(model, pair)
        return torch.cat([curves.clean[None], *(getattr(curves, name) for name in CURVES)])

    what = f"depth curves, shift {config.shift}, seed {prompts.seed}"
    clean, *runs = cached(model, staged.measured, what, stacked).cpu().split([1, *[n_layers] * len(CURVES)])
    return Located(staged, pair, Curves(clean[0], **dict(zip(CURVES, runs, strict=True))))


def rows_by_seed(prompts: PromptSet, rows: Sequence[int]) -> dict[str, list[int]]:
    """Which of some rows of pooled prompts each seed drew; thirds of them, named so, if one seed drew all.

    Args:
        prompts: the full set; `pool` writes its seeds into the description.
        rows: indices into the set, in order.

    Returns:
        For every seed, indices in `rows`.
    """
    seeds = prompts.description.get("seeds", [])
    third = prompts.n // 3
    if len(seeds) != 3 or third == 0:
        return {f"third {part + 1}": list(range(part, len(rows), 3)) for part in range(3) if part < len(rows)}
    ends = [prompts.n - 2 * third, prompts.n - third, prompts.n]
    by_seed: dict[str, list[int]] = {f"seed {seed}": [] for seed in seeds}
    for index, row in enumerate(rows):
        by_seed[f"seed {seeds[next(i for i, end in enumerate(ends) if row < end)]}"].append(index)
    return {name: indices for name, indices in by_seed.items() if indices}


def quick_config(config: DepthConfig, samples: int) -> DepthConfig:
    """The configuration of a quick run of a large model."""
    return replace(config, samples=min(config.samples, samples))
