"""C5: does attending to itself alone make P0 a sink? Attention edits in blocks 0 and 1 (paper, section on recognition).

1. *Sufficient?* Let a position t attend to itself alone, as P0 must, in all heads of some blocks. Divide its excess
   score by that of P0 in the same run. The two compete for the same attention: at 1 they are equal sinks. Both scores
   are means over the queries that can see the position, like all sink scores.
2. *Necessary?* Give P0 the mix of values that position t attends to, in all heads of some blocks. The share taken is 1
   minus P0's excess score over that of the clean run.
3. *Where is it decided?* Both edits in one block alone, and in all blocks up to it.
4. For comparison, statistics matching: the attention output of t gets the mean and variance over channels (or the norm
   alone) of P0's, and the other way round. Only these statistics change, not the weights or the direction.
5. Controls: t attends as a random position does; a random position instead of P0 gets the mix of t; no edit.

The verdict is about sums over several t, fixed beforehand: t's excess scores over P0's, and what mixing leaves of P0's.
Scores are those of sink heads above the last edited block. Source: Peng et al., arXiv 2603.06591.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from p0circuit.errors import P0Error
from p0circuit.experiments.base import Experiment, NotApplicable, block_names, is_large, second_half
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.sink_under_study import StudiedSink, excess_by_head, mean_over_heads, studied_sink
from p0circuit.experiments.surgery import random_offsets, require_attention
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

Edit = Callable[[HookedModel, PromptSet, list[str], int], Intervention]
"""Makes an edit from a model, prompts, the attention of blocks (`attn.LAYER`) and t."""


@dataclass(frozen=True)
class StructureConfig:
    """Settings of `Structure`.

    Attributes:
        positions: the positions t, counted from P0; the scan over blocks takes the middle one. Positions that leave no
            query after them in the prompts are left out.
        samples_beside: maximum number of samples for everything that the verdict is not about.
        scan_blocks: number of blocks in the scan.
        blocks: where the circuit is: the first two blocks, as the paper says, or those that `depth` finds.
    """

    positions: tuple[int, ...] = (4, 16, 32)
    samples_beside: int = 128
    scan_blocks: int = 8
    blocks: tuple[int, ...] = CIRCUIT_BLOCKS


def _attend_as_another(model: HookedModel, prompts: PromptSet, nodes: list[str], t: int) -> Intervention:
    donor = random_offsets(prompts.n, prompts.seed + t, 1, prompts.length, but=[t])
    return copy_attention_row(model, prompts, nodes, donor=donor, offset=t)


def _mix_at_random_position(model: HookedModel, prompts: PromptSet, nodes: list[str], t: int) -> Intervention:
    offset = random_offsets(prompts.n, prompts.seed + t, 1, prompts.length, but=[t, CONTROL])
    return copy_attention_row(model, prompts, nodes, donor=t, offset=offset)


_NO_EDIT, _ALONE, _MIXED = "no surgery", "attends to itself", "attends as t"
_AT_T: dict[str, Edit] = {
    _ALONE: attend_to_self_only,
    "statistics of P0": lambda model, prompts, nodes, t: match_statistics(model, prompts, nodes, 0, t),
    "norm of P0": lambda model, prompts, nodes, t: match_statistics(model, prompts, nodes, 0, t, only_norm=True),
    "control: attends as another": _attend_as_another,
}
_AT_P0: dict[str, Edit] = {
    _MIXED: lambda model, prompts, nodes, t: copy_attention_row(model, prompts, nodes, donor=t),
    "statistics of t": lambda model, prompts, nodes, t: match_statistics(model, prompts, nodes, t, 0),
    "norm of t": lambda model, prompts, nodes, t: match_statistics(model, prompts, nodes, t, 0, only_norm=True),
    "control: at a random position": _mix_at_random_position,
}
_METRICS_AT_T = {
    _ALONE: "t_over_p0_when_alone",
    "statistics of P0": "t_over_p0_with_statistics_of_p0",
    "norm of P0": "t_over_p0_with_norm_of_p0",
    "control: attends as another": "t_over_p0_control_attending_as_another",
    _NO_EDIT: "t_over_p0_without_surgery",
}
_METRICS_AT_P0 = {
    _MIXED: "taken_from_p0_by_mixing",
    "statistics of t": "taken_from_p0_by_statistics_of_t",
    "norm of t": "taken_from_p0_by_norm_of_t",
    "control: at a random position": "taken_from_p0_control_mixing_elsewhere",
}
_T_OVER_P0, _TAKEN = "t over P0", "taken from P0"
_PANELS = {_T_OVER_P0: "Does t become a sink?", _TAKEN: "Does P0 stop being one?"}
_UNITS = ["excess of t / excess of P0", "share of P0's excess taken"]


class Structure(Experiment[StructureConfig]):
    """Attention edits and statistics matching in blocks 0 and 1: does t become a sink, does P0 stop being one?"""

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
        """Declare the edits at every t, and the scan over blocks."""
        rows, config = second_half(prompts), self.config
        fewer = min(rows, config.samples_beside)
        positions = sum(t < prompts.length - 1 for t in config.positions)
        blocks = min(config.scan_blocks, describe(model).n_layers - 1)
        verdict, others = 2 * positions * rows, (len(_AT_T) + len(_AT_P0) - 2) * positions * fewer
        return (verdict + others + (4 * blocks - 2) * fewer) / prompts.n

    def quick(self, info: ModelInfo) -> Structure:
        """Return a version for large models with fewer samples and blocks."""
        return Structure(replace(self.config, samples_beside=5, scan_blocks=3)) if is_large(info) else self

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Measure on the sink heads above block 1.

        Raises:
            NotApplicable: there is no sink above block 1, rows are too short, or attention cannot be edited.
        """
        return self.measure_on(studied_sink(model, prompts, above_block=max(self.config.blocks)))

    def measure_on(self, sink: StudiedSink) -> Result:
        """Measure a given sink.

        Args:
            sink: sink heads above block 1, and the prompts to measure on.

        Raises:
            NotApplicable: rows are too short for every t, or the attention cannot be edited.
        """
        require_attention(sink.model)
        if CONTROL in self.config.positions:
            raise P0Error(f"t cannot be {CONTROL}, the position whose score is subtracted")
        length = sink.prompts.length
        positions = [t for t in self.config.positions if t < length - 1]
        if not positions:
            raise NotApplicable(f"rows of {length} tokens are too short for t = {self.config.positions}")
        t_over_p0, p0_left = self._edits(sink, positions)
        pooled = {name: t_over_p0.pooled(name) for name in t_over_p0.names}
        taken = {name: _one_minus(p0_left.pooled(name)) for name in p0_left.names}
        metrics = {
            "p0_excess": sink.excess,
            **{metric: pooled[name] for name, metric in _METRICS_AT_T.items()},
            "p0_excess_beside_t_alone": t_over_p0.denominator(_ALONE),
            **{metric: taken[name] for name, metric in _METRICS_AT_P0.items()},
        }
        t = positions[len(positions) // 2]
        tables = {"surgery": _table(t_over_p0, p0_left), "scan": self._scan(sink, t)}
        notes = [*sink.notes, f"positions t: {', '.join(map(str, positions))}; the scan over blocks is for t = {t}"]
        if dropped := [t for t in self.config.positions if t not in positions]:
            notes.append(f"rows of {length} tokens are too short for t = {', '.join(map(str, dropped))}")
        return Result(self.id, self.title, metrics, tables, notes=notes)

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw the pooled effect of every edit, and the scan over blocks."""
        return {"surgery": _draw_edits(result), "scan": _draw_scan(result)}

    def _edits(self, sink: StudiedSink, positions: Sequence[int]) -> tuple[_Ratios, _Ratios]:
        """Excess scores of t over those of P0 with edits at t, and of P0 over clean ones with edits at P0."""
        fewer = sink.subset(slice(0, self.config.samples_beside))
        nodes = [f"attn.{layer}" for layer in self.config.blocks]
        t_over_p0, p0_left = _Ratios(), _Ratios()
        for t in positions:
            t_over_p0.add(_NO_EDIT, t, sink.excess_scores(offset=t), sink.excess_scores())
            for name, edit in _AT_T.items():
                t_over_p0.add(name, t, *_edited_at_t(sink if name == _ALONE else fewer, edit, nodes, t))
            for name, edit in _AT_P0.items():
                p0_left.add(name, t, *_edited_at_p0(sink if name == _MIXED else fewer, edit, nodes, t))
        return t_over_p0, p0_left

    def _scan(self, sink: StudiedSink, t: int) -> pd.DataFrame:
        """Both edits in each block alone and in all blocks up to it, measured on the sink heads above."""
        import pandas as pd

        sink = sink.subset(slice(0, self.config.samples_beside))
        rows = []
        for last in sink.blocks_to_scan(self.config.scan_blocks):
            later = sink.above(last)
            for kind, blocks in (("this block alone", [last]), ("blocks up to it", range(last + 1))):
                nodes = [f"attn.{layer}" for layer in blocks]
                if kind == "blocks up to it" and last == 0:
                    # Block 0 alone is all blocks up to it.
                    rows += [row | {"blocks": kind} for row in rows[-2:]]
                    continue
                alone = ratio_interval(*_edited_at_t(later, attend_to_self_only, nodes, t))
                mixed = ratio_interval(*_edited_at_p0(later, _AT_P0[_MIXED], nodes, t))
                for measured, interval in ((_T_OVER_P0, alone), (_TAKEN, _one_minus(mixed))):
                    row = {"measured": measured, "blocks": kind, "block": last, "heads": len(later.heads)}
                    rows.append(row | interval.to_json())
        return pd.DataFrame(rows)


class _Ratios:
    """Numerators and denominators by edit and t, one number per sample."""

    def __init__(self) -> None:
        self.pairs: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}

    def add(self, name: str, t: int, numerator: np.ndarray, denominator: np.ndarray) -> None:
        self.pairs[name, t] = numerator, denominator

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self.pairs))

    @property
    def positions(self) -> list[int]:
        return list(dict.fromkeys(t for _, t in self.pairs))

    def at(self, name: str, t: int) -> Interval:
        return ratio_interval(*self.pairs[name, t])

    def pooled(self, name: str) -> Interval:
        """The ratio of the sums over all t."""
        return ratio_interval(self._mean(name, 0), self._mean(name, 1))

    def denominator(self, name: str) -> Interval:
        return bootstrap(self._mean(name, 1))

    def _mean(self, name: str, part: int) -> np.ndarray:
        return np.mean([pair[part] for (other, _), pair in self.pairs.items() if other == name], axis=0)


def _edited_at_t(sink: StudiedSink, edit: Edit, nodes: list[str], t: int) -> tuple[np.ndarray, np.ndarray]:
    """Excess scores of t and of P0 in the same run, with an edit at t."""
    excess = excess_by_head(sink.model, sink.prompts, [edit(sink.model, sink.prompts, nodes, t)], (t, 0))
    return mean_over_heads(excess[t], sink.heads), mean_over_heads(excess[0], sink.heads)


def _edited_at_p0(sink: StudiedSink, edit: Edit, nodes: list[str], t: int) -> tuple[np.ndarray, np.ndarray]:
    """Excess scores of P0 with an edit at P0, and without."""
    return sink.excess_scores(edit(sink.model, sink.prompts, nodes, t)), sink.excess_scores()


def _table(t_over_p0: _Ratios, p0_left: _Ratios) -> pd.DataFrame:
    """Every ratio by edit and t."""
    import pandas as pd

    at_t = [(_T_OVER_P0, name, t, t_over_p0.at(name, t)) for name in t_over_p0.names for t in t_over_p0.positions]
    at_p0 = [(_TAKEN, name, t, _one_minus(p0_left.at(name, t))) for name in p0_left.names for t in p0_left.positions]
    return pd.DataFrame(
        [
            {"measured": measured, "surgery": name, "t": t, **interval.to_json()}
            for measured, name, t, interval in (*at_t, *at_p0)
        ]
    )


def _one_minus(interval: Interval) -> Interval:
    return Interval(1 - interval.value, 1 - interval.high, 1 - interval.low, interval.n)


def _draw_edits(result: Result) -> Figure:
    from p0circuit.figures.intervals import intervals

    table, metrics = result.tables["surgery"], _METRICS_AT_T | _METRICS_AT_P0
    # In the order of the table.
    panels = {
        title: {
            name: result.metrics[metrics[name]] for name in table.loc[table["measured"] == measured, "surgery"].unique()
        }
        for measured, title in _PANELS.items()
    }
    controls = {name for panel in panels.values() for name in panel if name == _NO_EDIT or name.startswith("control")}
    where = block_names(result.provenance["config"]["blocks"])
    title = f"{result.model_title}: attention of {where} changed at t, or at P0"
    return intervals(panels, title, _UNITS, controls, reference=0.5)


def _draw_scan(result: Result) -> Figure:
    from p0circuit.figures.lines import series_by, trajectories

    scan, table = result.tables["scan"], result.tables["surgery"]
    panels = {title: series_by(scan.loc[scan["measured"] == name], "blocks") for name, title in _PANELS.items()}
    positions = table["t"].unique().tolist()
    title = f"{result.model_title}: in which blocks is it decided? (t = {positions[len(positions) // 2]})"
    blocks = [str(block) for block in scan["block"].unique()]
    return trajectories(panels, blocks, title, "edited block", _UNITS, reference=0.5)
