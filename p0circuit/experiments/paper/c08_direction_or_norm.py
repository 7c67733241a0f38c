"""Does P0 draw attention by its norm or by its direction? (C8; paper, section on amplification)

Two interventions on P0's residual stream after block 1:

1. *Norm cut*: the stream keeps its direction and gets the median norm of the row's other positions.
2. *Direction replaced*: the stream keeps its norm and gets the direction of the stream after the same block at an
   ordinary position of the next sample; positions 4, 16 and 32 take turns.

The measure is the share of the excess score that the sink heads above block 1 keep. Later blocks run unchanged, so what
they rebuild counts as left. Both interventions are repeated after other blocks, on the sink heads above each; and the
norm after block 1 is scaled by factors from 1/8 to 4. Control: both interventions at a random position instead of P0.

Source: Peng et al., arXiv 2603.06591; Sun et al. 2024 (arXiv 2402.17762) on massive activations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from p0circuit.experiments.base import ORDINARY, Experiment, NotApplicable, is_large, second_half
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.sink_under_study import StudiedSink, excess_by_head, heads_above, share_left, studied_sink
from p0circuit.experiments.surgery import ordinary_streams, random_offsets
from p0circuit.figures.lines import series_by
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.ablation import replace_direction, replace_norm
from p0circuit.interventions.intervention import Offset
from p0circuit.models import ModelInfo, describe
from p0circuit.prompts import PromptSet
from p0circuit.recording.quantities import NORM_RATIO, residual_at
from p0circuit.recording.record import record
from p0circuit.results import Result
from p0circuit.sink import CIRCUIT_BLOCKS, CONTROL
from p0circuit.stats import bootstrap

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_CUT, _REPLACED = "norm cut to the others' median", "direction of an ordinary position"
_AT_P0, _ELSEWHERE = "P0", "a random position"


@dataclass(frozen=True)
class DirectionOrNormConfig:
    """Settings of `DirectionOrNorm`.

    Attributes:
        ordinary: positions, counted from P0, whose direction replaces P0's.
        doses: factors on P0's norm, written as fractions.
        scan_samples: maximum number of prompts of the scan over blocks and of the doses.
        scan_blocks: maximum number of blocks of the scan.
        blocks: where the circuit is: the first two blocks, as the paper says, or those that `depth` finds.
    """

    ordinary: tuple[int, ...] = ORDINARY
    doses: tuple[str, ...] = ("1/8", "1/4", "1/2", "1", "2", "4")
    scan_samples: int = 128
    scan_blocks: int = 8
    blocks: tuple[int, ...] = CIRCUIT_BLOCKS


class DirectionOrNorm(Experiment[DirectionOrNormConfig]):
    """The share of the sink that is left with another norm, or another direction, of P0's stream after block 1."""

    id = "direction-or-norm"
    title = "Direction or norm"
    config_type = DirectionOrNormConfig
    claim = Claim(
        id="C8",
        title="Direction or norm",
        source="Peng et al., arXiv 2603.06591, section on amplification",
        statement="After block 1 it is P0's direction that later blocks see, not its norm.",
        measure="Share of the excess score that is left when P0's residual after block 1 keeps its direction and gets "
        "the median norm of the others, and when it keeps its norm and gets the direction of an ordinary position of "
        "another sample.",
        criteria=(
            Criterion("left_with_norm_cut", ">=", 0.8),
            Criterion("left_with_direction_replaced", "<=", 0.2),
        ),
        control="The same surgery at a random position.",
    )

    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        """Declare two interventions at two positions, the scan over blocks, and the doses."""
        rows, config = second_half(prompts), self.config
        scan_rows, blocks = min(rows, config.scan_samples), min(config.scan_blocks, describe(model).n_layers - 1)
        return (4 * rows + (2 * blocks + len(config.doses)) * scan_rows) / prompts.n

    def quick(self, info: ModelInfo) -> DirectionOrNorm:
        """Return a version for large models with fewer samples and blocks in the scan."""
        return DirectionOrNorm(replace(self.config, scan_samples=8, scan_blocks=4)) if is_large(info) else self

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Measure on the sink heads above the circuit; see `measure_on`."""
        return self.measure_on(studied_sink(model, prompts, above_block=max(self.config.blocks)))

    def measure_on(self, sink: StudiedSink) -> Result:
        """Measure a sink whose heads are known.

        Args:
            sink: the sink; its heads are above block 1.

        Raises:
            NotApplicable: rows are too short for an ordinary position.
        """
        import pandas as pd

        model = sink.model
        prompts = sink.prompts
        donor_positions = [offset for offset in self.config.ordinary if offset < prompts.length]
        if not donor_positions:
            raise NotApplicable(f"rows of {prompts.length} tokens have no position {self.config.ordinary[0]}")
        streams = ordinary_streams(model, prompts, donor_positions)
        clean = excess_by_head(model, prompts)[0]
        elsewhere = random_offsets(prompts.n, prompts.seed, 1, prompts.length, but=[CONTROL])
        rows, left = [], {}
        for position, offset in ((_AT_P0, 0), (_ELSEWHERE, elsewhere)):
            for surgery in (_CUT, _REPLACED):
                excess = _excess_after(model, prompts, surgery, max(self.config.blocks), streams, offset)
                left[position, surgery] = share_left(excess, clean, sink.heads)
                rows.append({"place": position, "surgery": surgery, **left[position, surgery].to_json()})
        norms = record(model, prompts, NORM_RATIO)[:, max(self.config.blocks) + 1].numpy()
        metrics = {
            "left_with_norm_cut": left[_AT_P0, _CUT],
            "left_with_direction_replaced": left[_AT_P0, _REPLACED],
            "left_with_norm_cut_elsewhere": left[_ELSEWHERE, _CUT],
            "left_with_direction_replaced_elsewhere": left[_ELSEWHERE, _REPLACED],
            "norm_over_median_of_others": bootstrap(norms),
        }
        first = slice(0, self.config.scan_samples)
        scan = self._scan(model, sink, prompts.subset(first), clean[first], streams[first])
        doses = self._doses(model, sink, prompts.subset(first), clean[first])
        donor = ", ".join(map(str, donor_positions))
        notes = [*sink.notes, f"directions come from positions {donor} of the next sample, in turn"]
        tables = {"surgery": pd.DataFrame(rows), "blocks": scan, "doses": doses}
        return Result(self.id, self.title, metrics, tables, notes=notes)

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw what is left of the sink, by the block of the intervention and by the norm after block 1."""
        return {
            "blocks": _draw_scan(result.tables["blocks"], result.model_title),
            "doses": _draw_doses(
                result.tables["doses"], result.model_title, max(result.provenance["config"]["blocks"])
            ),
        }

    def _scan(
        self, model: HookedModel, sink: StudiedSink, prompts: PromptSet, clean: Tensor, streams: Tensor
    ) -> pd.DataFrame:
        """Both interventions after each block, measured on the sink heads above it."""
        import pandas as pd

        norms = record(model, prompts, NORM_RATIO)
        rows = []
        for block in sink.blocks_to_scan(self.config.scan_blocks):
            heads = heads_above(sink.heads, block)
            for surgery in (_CUT, _REPLACED):
                left = share_left(_excess_after(model, prompts, surgery, block, streams, 0), clean, heads)
                row = {"surgery": surgery, "after_block": block, "heads": len(heads), **left.to_json()}
                rows.append(row | {"norm_over_median_of_others": float(norms[:, block + 1].double().mean())})
        return pd.DataFrame(rows)

    def _doses(self, model: HookedModel, sink: StudiedSink, prompts: PromptSet, clean: Tensor) -> pd.DataFrame:
        """P0's norm after block 1 times each dose."""
        import pandas as pd

        own = record(model, prompts, residual_at())[:, max(self.config.blocks) + 1].float().norm(dim=-1)
        rows = []
        for dose in self.config.doses:
            numerator, _, denominator = dose.partition("/")
            factor = float(numerator) / float(denominator or 1)
            scaled = replace_norm(model, prompts, [f"resid_post.{max(self.config.blocks)}"], factor * own)
            left = share_left(excess_by_head(model, prompts, [scaled])[0], clean, sink.heads)
            rows.append({"dose": dose, "factor": factor, **left.to_json()})
        return pd.DataFrame(rows)


def _excess_after(
    model: HookedModel, prompts: PromptSet, surgery: str, block: int, streams: Tensor, offset: Offset
) -> Tensor:
    """The excess scores of P0 under an intervention on the stream after a block at one position."""
    nodes = [f"resid_post.{block}"]
    if surgery == _CUT:
        intervention = replace_norm(model, prompts, nodes, offset=offset)
    else:
        intervention = replace_direction(model, prompts, nodes, streams[:, block + 1], offset=offset)
    return excess_by_head(model, prompts, [intervention])[0]


def _draw_scan(scan: pd.DataFrame, model: str) -> Figure:
    from p0circuit.figures.lines import trajectories

    title = f"{model}: P0's stream with another norm or direction"
    blocks = [str(block) for block in scan["after_block"].unique()]
    panels = {"What is left of the sink": series_by(scan, "surgery")}
    return trajectories(panels, blocks, title, "surgery after block", ["share of the excess left"], reference=1)


def _draw_doses(doses: pd.DataFrame, model: str, block: int) -> Figure:
    from p0circuit.figures.lines import trajectories

    title = f"{model}: P0's direction kept, its norm changed"
    panels = {f"After block {block}": series_by(doses.assign(surgery="norm"), "surgery")}
    labels = ["share of the excess left"]
    figure = trajectories(
        panels, doses["dose"].astype(str).tolist(), title, "norm of P0, times its own", labels, reference=1
    )
    # The axis starts at 0, so that the height of a line is in proportion to the share.
    figure.axes[0].set_ylim(bottom=min(0, figure.axes[0].get_ylim()[0]))
    return figure
