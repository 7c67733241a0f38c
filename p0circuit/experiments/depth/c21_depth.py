"""Does the circuit fit into two blocks? The paper speaks of two transformer blocks; here they are found.

1. *Circuit depth K*: the fewest first blocks in which recognition alone leaves at least 0.8 of the sink. In all later
   blocks P0's attention output is that of the same token when it is not first.
2. *Formation curve*: what is left of the sink above block b when P0's stream after it is that of the same token when it
   is not first. After block 1 next to nothing may be left if the circuit is complete there.
3. K is found for all measured samples, and for those of each of the three seeds that the prompts were drawn with.
4. The stages of the stream, who writes and who erases each, and the curves themselves are in the tables; they are no
   part of the verdict.

Source: Peng et al., arXiv 2603.06591.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from p0circuit.experiments.base import Experiment, is_large, second_half
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.depth.curves import CURVES
from p0circuit.experiments.depth.locator import (
    DepthConfig,
    Located,
    locate,
    passes_of_locator,
    quick_config,
    rows_by_seed,
)
from p0circuit.experiments.depth.writers import Role, find_roles, passes_of_roles
from p0circuit.hooked_model import HookedModel
from p0circuit.models import ModelInfo, describe
from p0circuit.prompts import PromptSet
from p0circuit.results import Result
from p0circuit.stats import Interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class Depth(Experiment[DepthConfig]):
    """The blocks of the circuit, the stages of P0's stream, and who writes and erases them."""

    id = "depth"
    title = "Depth of the circuit"
    config_type = DepthConfig
    claim = Claim(
        id="C21",
        title="Depth",
        source="Peng et al., arXiv 2603.06591",
        statement="The circuit fits into the first two blocks.",
        measure="The fewest first blocks in which recognition alone leaves 0.8 of the excess score, the largest over "
        "three prompt seeds; and the share of the excess score that is left when P0's stream after block 1 is that of "
        "the same token when it is not first.",
        criteria=(
            Criterion("circuit_depth", "<=", 2, "high"),
            Criterion("left_with_stream_replaced_after_block_1", "<=", 0.2, "high"),
        ),
        control="Untrained weights, shuffled neurons and a model without read-out: no sink, no depth.",
    )

    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        """Declare the curves of the locator, and the patching of writers and erasers."""
        measured = min(second_half(prompts), self.config.samples)
        return (
            passes_of_locator(model, prompts, self.config)
            + passes_of_roles(describe(model).n_layers) * measured / prompts.n
        )

    def quick(self, info: ModelInfo) -> Depth:
        """Return a version for large models with fewer samples."""
        return Depth(quick_config(self.config, 8)) if is_large(info) else self

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Raises NotApplicable where there is no sink or attention cannot be edited."""
        located = locate(model, prompts, self.config)
        info = describe(model)
        depths = depths_by_seed(located, prompts)
        largest = max(depths.values())
        metrics = {"circuit_depth": Interval(located.depth_of(), min(depths.values()), largest, located.pair.clean.n)}
        if (left := located.left("stream", min(1, info.n_layers - 1))) is not None:
            metrics["left_with_stream_replaced_after_block_1"] = left
        roles = find_roles(model, located.pair, located.stages)
        notes = [located.sink.note, _depth_note(located, depths)]
        notes += [
            f"stage {number}: {stage.blocks}, norm ratio {stage.norm_ratio:.1f}, read by {len(stage.heads)} sink heads"
            for number, stage in enumerate(located.stages, 1)
        ]
        if not located.stages:
            notes.append("no depth has one direction at P0 that a sink head reads: there is no stage")
        notes += [_role_note(role) for role in roles]
        tables = {
            "curves": curves_table(located),
            "depths": depths_table(located),
            "stages": stages_table(located),
            "roles": roles_table(roles),
        }
        return Result(self.id, self.title, metrics, tables, notes=notes)

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw norm, direction, sink heads and what is left: layers from left to right, stages shaded."""
        from p0circuit.figures.depth import depth_figure

        depths, curves, stages, roles = (result.tables[name] for name in ("depths", "curves", "stages", "roles"))
        n = result.metrics["circuit_depth"].n
        return {"depth": depth_figure(depths, curves, stages, roles, result.model_title, n)}


def depths_by_seed(located: Located, prompts: PromptSet) -> dict[str, int]:
    """The circuit depth on the measured samples of each seed."""
    order = np.random.default_rng(prompts.seed).permutation(prompts.n)
    measured = sorted(order[round(prompts.n / 2) :].tolist())[: located.pair.clean.n]
    return {name: located.depth_of(places) for name, places in rows_by_seed(prompts, measured).items()}


def curves_table(located: Located) -> pd.DataFrame:
    """A line for every curve and block: the share of the sink that is left, of all heads and of each stage's."""
    import pandas as pd

    groups: dict[str, Sequence[tuple[int, int]]] = {"all": located.sink.heads}
    groups |= {f"stage {number}": stage.heads for number, stage in enumerate(located.stages, 1)}
    lines: list[dict[str, Any]] = []
    for curve in CURVES:
        for block in range(len(located.curves.stream)):
            for name, heads in groups.items():
                if (left := located.left(curve, block, heads)) is not None:
                    lines.append({"curve": curve, "block": block, "heads": name, **left.to_json()})
    return pd.DataFrame(lines)


def depths_table(located: Located) -> pd.DataFrame:
    """A line for every depth of the stream: norm ratio, consistency, and the mean score of the layer that reads it."""
    import pandas as pd

    clean = located.curves.clean.double().mean(0)
    heads = [sum(layer == depth for layer, _ in located.sink.heads) for depth in range(len(clean))]
    return pd.DataFrame(
        {
            "depth": range(len(located.staged.norm_ratios)),
            "norm_ratio": located.staged.norm_ratios,
            "consistency": located.staged.consistency,
            "sink_heads_of_the_layer": [*heads, np.nan],
            "mean_excess_of_the_layer": [*clean.mean(1).tolist(), np.nan],
        }
    )


def stages_table(located: Located) -> pd.DataFrame:
    """A line for every stage, with the cosine of its direction to the first one's."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "stage": number,
                "first_depth": stage.first,
                "last_depth": stage.last,
                "norm_ratio": stage.norm_ratio,
                "consistency": stage.consistency,
                "sink_heads": len(stage.heads),
                "cosine_to_first_stage": float(stage.direction @ located.stages[0].direction),
            }
            for number, stage in enumerate(located.stages, 1)
        ],
        columns=[
            "stage",
            "first_depth",
            "last_depth",
            "norm_ratio",
            "consistency",
            "sink_heads",
            "cosine_to_first_stage",
        ],
    )


def roles_table(roles: Sequence[Role]) -> pd.DataFrame:
    """A line for every writer and eraser that was patched."""
    import pandas as pd

    columns = ["stage", "role", "node", "share_of_the_direction", "effect", "effect_low", "effect_high", "n", "neurons"]
    return pd.DataFrame(
        [
            [
                role.stage,
                role.role,
                role.node,
                role.share.value,
                role.effect.value,
                role.effect.low,
                role.effect.high,
                role.effect.n,
                " ".join(role.neurons),
            ]
            for role in roles
        ],
        columns=columns,
    )


def _depth_note(located: Located, depths: dict[str, int]) -> str:
    by_seed = ", ".join(f"{depth} on {name}" for name, depth in depths.items())
    return f"circuit depth {located.depth_of()}: recognition in so many first blocks leaves 0.8 of the sink ({by_seed})"


def _role_note(role: Role) -> str:
    if role.role == "eraser":
        return f"stage {role.stage} is erased by {role.node}: its output takes away {role.effect} of the projection"
    neurons = f"; {len(role.neurons)} of its neurons have 80 % of that effect" if role.neurons else ""
    return (
        f"stage {role.stage} is written by {role.node}: without its output at P0 {role.effect} of the excess score of "
        f"the stage's heads goes{neurons}"
    )
