"""Is being alone what makes P0 a sink? Surgery on attention in blocks 0 and 1 (paper, section on recognition).

1. *Sufficient?* Let a position t attend to itself alone, as P0 must, in all heads of some blocks. Its excess score over
   that of P0 in the same run says how much of a sink it has become: they compete for the same attention, so 1 is a
   draw. Both scores are means over the queries that can see the position, as sink scores are.
2. *Necessary?* Give P0 the mix of values that position t attends to, in all heads of some blocks. What is taken is
   1 minus P0's excess score over that of the clean run.
3. *Where is it decided?* Both by block: in one block alone, and in all blocks up to it.
4. Beside both, statistics matching: give the attention output of t the mean and variance over channels (or the norm
   alone) that P0's has, and the other way round. Nothing but these statistics changes, neither weights nor direction.
5. Controls: t attends as a random position does; the mix of t is given to a random position instead of P0; no surgery.

The verdict is about sums over several t, fixed beforehand: t's excess scores over P0's, and what mixing leaves of P0's.
Scores are those of sink heads above the last block with surgery. Source: Peng et al., arXiv 2603.06591.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from p0circuit.errors import P0Error
from p0circuit.experiments.base import Experiment, NotApplicable, is_large, second_half
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.sink_under_study import (
    ByHead,
    Heads,
    StudiedSink,
    excess_by_head,
    heads_above,
    mean_over_heads,
    studied_sink,
)
from p0circuit.experiments.surgery import random_offsets, require_attention
from p0circuit.figures.lines import series_by
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.ablation import match_statistics
from p0circuit.interventions.attention_edits import attend_to_self_only, copy_attention_row
from p0circuit.interventions.intervention import Intervention
from p0circuit.models import ModelInfo, describe
from p0circuit.prompts import PromptSet
from p0circuit.results import Result
from p0circuit.sink import CIRCUIT_BLOCKS, CONTROL
from p0circuit.stats import Interval, bootstrap, ratio_interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Surgery = Callable[[Any, PromptSet, list[str], int], Intervention]
"""Gets a model, prompts, the attention of blocks (`attn.LAYER`) and t."""


@dataclass(frozen=True)
class StructureConfig:
    """`positions`: the t, counted from P0; the scan takes the middle one, and `scan_blocks` blocks.

    All that the verdict is not about takes `samples_beside` rows. Rows that are too short for a position do without it:
    at least one query has to come after it.
    """

    positions: tuple[int, ...] = (4, 16, 32)
    samples_beside: int = 128
    scan_blocks: int = 8


def _attending_as_another(model: HookedModel, prompts: PromptSet, nodes: list[str], t: int) -> Intervention:
    donor = random_offsets(prompts.n, prompts.seed + t, 1, prompts.length, but=[t])
    return copy_attention_row(model, prompts, nodes, donor=donor, offset=t)


def _mixing_elsewhere(model: HookedModel, prompts: PromptSet, nodes: list[str], t: int) -> Intervention:
    place = random_offsets(prompts.n, prompts.seed + t, 1, prompts.length, but=[t, CONTROL])
    return copy_attention_row(model, prompts, nodes, donor=t, offset=place)


_NONE, _ALONE, _MIXED = "no surgery", "attends to itself", "attends as t"
_AT_T: dict[str, Surgery] = {
    _ALONE: attend_to_self_only,
    "statistics of P0": lambda model, prompts, nodes, t: match_statistics(model, prompts, nodes, 0, t),
    "norm of P0": lambda model, prompts, nodes, t: match_statistics(model, prompts, nodes, 0, t, only_norm=True),
    "control: attends as another": _attending_as_another,
}
_AT_P0: dict[str, Surgery] = {
    _MIXED: lambda model, prompts, nodes, t: copy_attention_row(model, prompts, nodes, donor=t),
    "statistics of t": lambda model, prompts, nodes, t: match_statistics(model, prompts, nodes, t, 0),
    "norm of t": lambda model, prompts, nodes, t: match_statistics(model, prompts, nodes, t, 0, only_norm=True),
    "control: at a random position": _mixing_elsewhere,
}


class Structure(Experiment[StructureConfig]):
    """Mask surgery and statistics matching in blocks 0 and 1: does t become a sink, does P0 stop being one?"""

    id = "structure"
    title = "Structure suffices and is needed"
    config_type = StructureConfig
    claim = Claim(
        id="C5",
        title="Structure suffices and is needed",
        source="Peng et al., arXiv 2603.06591, section on recognition",
        statement="P0 is a sink because the causal mask lets it attend to itself alone: any position that does so in "
        "blocks 0 and 1 becomes one, and P0 is none if its attention output there is mixed.",
        measure="With position t attending to itself alone in blocks 0-1, t's excess score over P0's in the same run; "
        "with P0 given t's mix of values there, the share of its excess score that is lost. Sums over several t.",
        criteria=(
            Criterion("t_over_p0_when_alone", ">=", 0.5),
            Criterion("taken_from_p0_by_mixing", ">=", 0.5),
        ),
        control="t attends as a random position does; a random position is mixed instead of P0; t without surgery.",
    )

    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        rows, config = second_half(prompts), self.config
        few = min(rows, config.samples_beside)
        positions = sum(t < prompts.length - 1 for t in config.positions)
        blocks = min(config.scan_blocks, describe(model).n_layers - 1)
        verdict, beside = 2 * positions * rows, (len(_AT_T) + len(_AT_P0) - 2) * positions * few
        return (verdict + beside + (4 * blocks - 2) * few) / prompts.n

    def quick(self, info: ModelInfo) -> Structure:
        return Structure(replace(self.config, samples_beside=5, scan_blocks=3)) if is_large(info) else self

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        return self.measure_on(studied_sink(model, prompts, above_block=CIRCUIT_BLOCKS[-1]))

    def measure_on(self, sink: StudiedSink) -> Result:
        """Measure a given sink.

        Raises:
            NotApplicable: rows are too short for every t, or the attention cannot be edited.
        """
        import pandas as pd

        model = sink.model
        require_attention(model)
        if CONTROL in self.config.positions:
            raise P0Error(f"t cannot be {CONTROL}, the position whose score is subtracted")
        positions = [t for t in self.config.positions if t < sink.prompts.length - 1]
        if not positions:
            raise NotApplicable(f"rows of {sink.prompts.length} tokens are too short for t = {self.config.positions}")
        some = slice(0, self.config.samples_beside)
        few, nodes = sink.prompts.subset(some), [f"attn.{layer}" for layer in range(CIRCUIT_BLOCKS[-1] + 1)]
        clean = excess_by_head(model, sink.prompts, offsets=(0, *positions))
        became, lost, rows = _Ratios(), _Ratios(), []
        for t in positions:
            became.add(_NONE, t, *(mean_over_heads(clean[offset], sink.heads) for offset in (t, 0)))
            for name, surgery in _AT_T.items():
                prompts = sink.prompts if name == _ALONE else few
                became.add(name, t, *_at_t(model, prompts, sink.heads, surgery, nodes, t))
            for name, surgery in _AT_P0.items():
                prompts, before = (sink.prompts, clean[0]) if name == _MIXED else (few, clean[0][some])
                lost.add(name, t, *_at_p0(model, prompts, sink.heads, surgery, nodes, t, before))
        metrics = {
            "p0_excess": bootstrap(mean_over_heads(clean[0], sink.heads)),
            "t_over_p0_when_alone": became.pooled(_ALONE),
            "t_over_p0_with_statistics_of_p0": became.pooled("statistics of P0"),
            "t_over_p0_with_norm_of_p0": became.pooled("norm of P0"),
            "t_over_p0_control_attending_as_another": became.pooled("control: attends as another"),
            "t_over_p0_without_surgery": became.pooled(_NONE),
            "p0_excess_beside_t_alone": became.denominator(_ALONE),
            "taken_from_p0_by_mixing": _one_minus(lost.pooled(_MIXED)),
            "taken_from_p0_by_statistics_of_t": _one_minus(lost.pooled("statistics of t")),
            "taken_from_p0_by_norm_of_t": _one_minus(lost.pooled("norm of t")),
            "taken_from_p0_control_mixing_elsewhere": _one_minus(lost.pooled("control: at a random position")),
        }
        for measured, ratios, turn in (("t over P0", became, _same), ("taken from P0", lost, _one_minus)):
            for name in ratios.names:
                for t in positions:
                    rows.append({"measured": measured, "surgery": name, "t": t, **turn(ratios.at(name, t)).to_json()})
        table = pd.DataFrame(rows)
        t = positions[len(positions) // 2]
        scan = self._scan(model, sink, t)
        notes = [*sink.notes, f"positions t: {', '.join(map(str, positions))}; the scan over blocks is for t = {t}"]
        if dropped := [t for t in self.config.positions if t not in positions]:
            notes.append(f"rows of {sink.prompts.length} tokens have no place for t = {', '.join(map(str, dropped))}")
        name = describe(model).title
        figures = {"surgery": _draw_surgery(became, lost, name), "scan": _draw_scan(scan, t, name)}
        return Result(self.id, self.title, metrics, {"surgery": table, "scan": scan}, figures, notes=notes)

    def _scan(self, model: HookedModel, sink: StudiedSink, t: int) -> pd.DataFrame:
        """Both surgeries in each block alone and in all up to it, measured on the sink heads above."""
        import pandas as pd

        prompts = sink.prompts.subset(slice(0, self.config.samples_beside))
        clean = excess_by_head(model, prompts)[0]
        rows = []
        for last in sink.blocks_to_scan(self.config.scan_blocks):
            heads = heads_above(sink.heads, last)
            for kind, chosen in (("this block alone", [last]), ("blocks up to it", range(last + 1))):
                nodes = [f"attn.{layer}" for layer in chosen]
                if kind == "blocks up to it" and last == 0:
                    # Block 0 alone is all blocks up to it.
                    rows += [row | {"blocks": kind} for row in rows[-2:]]
                    continue
                alone = ratio_interval(*_at_t(model, prompts, heads, attend_to_self_only, nodes, t))
                mixed = ratio_interval(*_at_p0(model, prompts, heads, _AT_P0[_MIXED], nodes, t, clean))
                for measured, interval in (("t over P0", alone), ("taken from P0", _one_minus(mixed))):
                    row = {"measured": measured, "blocks": kind, "block": last, "heads": len(heads)}
                    rows.append(row | interval.to_json())
        return pd.DataFrame(rows)


class _Ratios:
    """Numerators and denominators by surgery and t, one number per sample."""

    def __init__(self) -> None:
        self.pairs: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}

    def add(self, name: str, t: int, numerator: np.ndarray, denominator: np.ndarray) -> None:
        self.pairs[name, t] = numerator, denominator

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self.pairs))

    def at(self, name: str, t: int) -> Interval:
        return ratio_interval(*self.pairs[name, t])

    def pooled(self, name: str) -> Interval:
        """The ratio of the sums over all t."""
        return ratio_interval(self._mean(name, 0), self._mean(name, 1))

    def denominator(self, name: str) -> Interval:
        return bootstrap(self._mean(name, 1))

    def _mean(self, name: str, part: int) -> np.ndarray:
        return np.mean([pair[part] for (other, _), pair in self.pairs.items() if other == name], axis=0)


def _at_t(
    model: HookedModel, prompts: PromptSet, heads: Heads, surgery: Surgery, nodes: list[str], t: int
) -> tuple[np.ndarray, np.ndarray]:
    """Excess scores of t and of P0 in the same run, with surgery at t."""
    excess = excess_by_head(model, prompts, [surgery(model, prompts, nodes, t)], (t, 0))
    return mean_over_heads(excess[t], heads), mean_over_heads(excess[0], heads)


def _at_p0(
    model: HookedModel, prompts: PromptSet, heads: Heads, surgery: Surgery, nodes: list[str], t: int, clean: ByHead
) -> tuple[np.ndarray, np.ndarray]:
    """Excess scores of P0 with surgery at it, and without."""
    excess = excess_by_head(model, prompts, [surgery(model, prompts, nodes, t)])[0]
    return mean_over_heads(excess, heads), mean_over_heads(clean, heads)


def _same(interval: Interval) -> Interval:
    return interval


def _one_minus(interval: Interval) -> Interval:
    return Interval(1 - interval.value, 1 - interval.high, 1 - interval.low, interval.n)


_PANELS = {"t over P0": "Does t become a sink?", "taken from P0": "Does P0 stop being one?"}
_LABELS = ["excess of t / excess of P0", "share of P0's excess taken"]


def _draw_surgery(became: _Ratios, lost: _Ratios, model: str) -> Figure:
    from p0circuit.figures.intervals import intervals

    title = f"{model}: attention of blocks 0 and {CIRCUIT_BLOCKS[-1]} changed at t, or at P0"
    panels = {
        name: {surgery: turn(ratios.pooled(surgery)) for surgery in ratios.names}
        for name, ratios, turn in zip(_PANELS.values(), (became, lost), (_same, _one_minus), strict=True)
    }
    controls = {name for panel in panels.values() for name in panel if name == _NONE or name.startswith("control")}
    return intervals(panels, title, _LABELS, controls, reference=0.5)


def _draw_scan(scan: pd.DataFrame, t: int, model: str) -> Figure:
    from p0circuit.figures.lines import trajectories

    panels = {title: series_by(scan.loc[scan["measured"] == name], "blocks") for name, title in _PANELS.items()}
    blocks = [str(block) for block in scan["block"].unique()]
    about = f"{model}: in which blocks is it decided? (t = {t})"
    return trajectories(panels, blocks, about, "block with surgery", _LABELS, reference=0.5)
