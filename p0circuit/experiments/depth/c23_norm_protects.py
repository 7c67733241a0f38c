"""Does its norm protect P0's direction? A long vector is turned little by what later blocks add to it.

The paper argues that `Norm(x + dx) - Norm(x)` is about `dx` at right angles to x over `|x|`: the longer x, the less its
normed direction moves. So P0's norm is cut to the others' median at the first depth of each stage, and then

(a) later blocks run as they are, and turn the shorter vector;
(b) what later components write at P0 is scaled by the same factor, so that P0 has at every depth its clean direction.

Where the norm protects, (b) keeps the sink and (a) does not. Heads that read normed streams cannot tell (b) from the
clean run, but for the small constant in the norm: (b) says whether the norm itself is read.

Source: Peng et al., arXiv 2603.06591, section on amplification.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from p0circuit.experiments.base import Experiment, NotApplicable, is_large
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.depth.curves import excess_above
from p0circuit.experiments.depth.locator import DepthConfig, StagedSink, quick_config, staged_sink
from p0circuit.experiments.depth.runs import Excess, RowRuns, put_at_p0, row_batches
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.edits import median_norm_of_others
from p0circuit.models import Hook, ModelInfo, describe
from p0circuit.prompts import PromptSet
from p0circuit.results import Result
from p0circuit.stats import Interval, bootstrap, ratio_interval, ratio_of_means

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FREE, _SCALED = "later writes as they are", "later writes scaled alike"


class NormProtects(Experiment[DepthConfig]):
    """P0's norm cut at the start of each stage, with later writes as they are and scaled alike."""

    id = "norm-protects"
    title = "Norm protects the direction"
    config_type = DepthConfig
    claim = Claim(
        id="C23",
        title="Norm protects the direction",
        source="Peng et al., arXiv 2603.06591, section on amplification",
        statement="P0's high norm protects its direction from what later blocks write.",
        measure="P0's norm cut to the others' median at the first depth of the stage where it is largest: share of the "
        "excess score left (b) with later writes at P0 scaled by the same factor, and (b) minus (a), with later writes "
        "as they are.",
        criteria=(
            Criterion("left_with_later_writes_scaled", ">=", 0.8, "low"),
            Criterion("protected_by_the_norm", ">", 0.2, "low"),
        ),
        control="Untrained weights, shuffled neurons and a model without read-out.",
    )

    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        """Declare a clean run and two interventions for each stage."""
        # For each stage one clean run and two of the blocks after its first depth.
        runs = 2 * 2.5 if describe(model).n_layers >= 12 else 1.5
        return runs * min(prompts.n - round(prompts.n / 2), self.config.samples) / prompts.n

    def quick(self, info: ModelInfo) -> NormProtects:
        """Return a version for large models with fewer samples."""
        return NormProtects(quick_config(self.config, 8)) if is_large(info) else self

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Raises NotApplicable where there is no sink or no stage."""
        import pandas as pd

        located = staged_sink(model, prompts, self.config)
        if not located.stages:
            raise NotApplicable("P0 has one direction at no depth that a sink head reads: there is no stage")
        lines, by_stage = [], []
        for number, stage in enumerate(located.stages, 1):
            unchanged, free, scaled = norm_cut(model, located, stage.first)
            heads = [head for head in located.sink.heads if head[0] >= stage.first]
            clean = excess_above(unchanged, heads)
            with_free, with_scaled = excess_above(free, heads), excess_above(scaled, heads)
            assert clean is not None and with_free is not None and with_scaled is not None
            left = {_FREE: ratio_interval(with_free, clean), _SCALED: ratio_interval(with_scaled, clean)}
            difference = bootstrap(np.stack([with_scaled - with_free, clean], axis=1), ratio_of_means)
            by_stage.append((left, difference))
            lines += [
                {"stage": number, "depth": stage.first, "run": name, **interval.to_json()}
                for name, interval in left.items()
            ]
        largest = int(np.argmax([stage.norm_ratio for stage in located.stages]))
        left, difference = by_stage[largest]
        metrics: dict[str, Interval] = {
            "left_with_later_writes_scaled": left[_SCALED],
            "left_with_later_writes_as_they_are": left[_FREE],
            "protected_by_the_norm": difference,
        }
        notes = [
            located.sink.note,
            f"the stage where P0's norm is largest is stage {largest + 1}, {located.stages[largest].blocks}",
        ]
        return Result(self.id, self.title, metrics, {"left": pd.DataFrame(lines)}, notes=notes)

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw what is left at each stage."""
        from p0circuit.figures.intervals import intervals

        panels = {}
        for stage, lines in result.tables["left"].groupby("stage"):
            panels[f"Stage {stage}, cut after block {int(lines['depth'].iloc[0]) - 1}"] = {
                str(line["run"]): Interval(line["value"], line["low"], line["high"], line["n"])
                for line in lines.to_dict("records")
            }
        n = int(result.tables["left"]["n"].min())
        title = f"{result.model_title}: P0's norm cut to the others' median (n = {n}, 95 % intervals)"
        return {"left": intervals(panels, title, ["share of the excess left"] * len(panels))}


@torch.no_grad()
def norm_cut(model: HookedModel, located: StagedSink, depth: int) -> tuple[Excess, Excess, Excess]:
    """Excess scores with P0's norm cut to the others' median at a depth.

    Args:
        model: a hooked model.
        located: what `staged_sink` gives.
        depth: where the norm is cut; at least 1.

    Returns:
        Those of the clean run, with later writes at P0 as they are, and with them scaled by the same factor.
    """
    prompts, n_layers = located.measured, describe(model).n_layers
    unchanged, free, scaled = [], [], []
    for rows in row_batches(model, prompts):
        batch = RowRuns.of(model, prompts, rows)
        streams, clean = batch.clean(model)
        number = torch.arange(len(batch.ids), device=batch.ids.device)
        own = [stream[number, batch.p0] for stream in streams]
        median = median_norm_of_others(streams[depth].float(), batch.p0, batch.mask)
        factor = (median / own[depth].float().norm(dim=-1))[:, None]
        start = batch.with_p0(streams[depth], factor * own[depth])
        hooks: list[Hook] = [
            put_at_p0(f"blocks.{block}.hook_resid_post", factor * own[block + 1], batch.p0)
            for block in range(depth, n_layers)
        ]
        unchanged.append(clean.cpu())
        free.append(batch.run(model, clean, start, depth))
        scaled.append(batch.run(model, clean, start, depth, hooks))
    return torch.cat(unchanged), torch.cat(free), torch.cat(scaled)
