"""The norm and the direction of P0's stream, by layer and by component.

1. Norm ratio: P0's residual norm over the median of the other positions, before every block and at the end.
2. Direction consistency: mean cosine of P0's residual to the mean P0 direction over samples; the same for other
   positions.
3. Both for the output of each component (embedding, attention, MLP).
Paper: the sections on recognition and amplification; Sun et al. 2024 (arXiv 2402.17762) on massive activations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from p0circuit import sink
from p0circuit.experiments.base import Experiment
from p0circuit.hooked_model import HookedModel
from p0circuit.prompts import PromptSet
from p0circuit.recording.quantities import (
    ATTENTION_OUT_NORMS,
    MLP_OUT_NORMS,
    NORM_RATIO,
    Quantity,
    component_at,
    residual_at,
)
from p0circuit.recording.record import record
from p0circuit.results import Result
from p0circuit.stats import Interval, bootstrap

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from p0circuit.figures.style import Series

_COMPONENTS = {"hook_attn_out": ATTENTION_OUT_NORMS, "hook_mlp_out": MLP_OUT_NORMS}
_NAMES = {"hook_attn_out": "attention out", "hook_mlp_out": "MLP out"}


@dataclass(frozen=True)
class NormDirectionConfig:
    """Settings of `NormDirection`.

    Attributes:
        others: positions, counted from P0, whose direction consistency is compared with P0's.
    """

    others: tuple[int, ...] = (8, 16, 32)


class NormDirection(Experiment[NormDirectionConfig]):
    """Norm ratio and direction consistency of P0, by layer and by component."""

    id = "norm-direction"
    title = "Norm and direction of P0"
    config_type = NormDirectionConfig

    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        """Declare no passes: everything is in the clean recording."""
        return 0.0  # everything is in the clean recording

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Summarise norms and directions of P0 by layer."""
        import pandas as pd

        others = sorted({min(offset, prompts.length - 1) for offset in self.config.others})
        positions = [0, *others]
        what = [NORM_RATIO, *_COMPONENTS.values(), *(residual_at(offset) for offset in positions)]
        what += [component_at(component, offset) for component in _COMPONENTS for offset in positions]
        recording = record(model, prompts, what, condition="text")

        def row(component: str, layer: int, ratios: Tensor, at: Callable[[int], Quantity]) -> dict[str, Any]:
            at_p0, *at_others = (sink.direction_cosines(recording[at(offset)][:, layer]) for offset in positions)
            return _row(component, layer, ratios, at_p0, at_others)

        ratios = recording[NORM_RATIO]
        rows = [row("residual", layer, ratios[:, layer], residual_at) for layer in range(ratios.shape[1])]
        # The output of the embedding is the stream before block 0.
        rows.append(rows[0] | {"component": "embedding"})
        for component, norms in _COMPONENTS.items():
            for layer in range(recording[norms].shape[1]):
                ratio = sink.ratio_to_others(recording[norms][:, layer], prompts.p0, prompts.attention_mask)
                rows.append(row(_NAMES[component], layer, ratio, functools.partial(component_at, component)))
        table = pd.DataFrame(rows)
        after_block_1 = min(2, ratios.shape[1] - 1)
        metrics = {
            "norm_ratio_after_block_1": bootstrap(ratios[:, after_block_1].numpy()),
            "direction_consistency_after_block_1": bootstrap(
                sink.direction_cosines(recording[residual_at()][:, after_block_1]).numpy()
            ),
            "largest_norm_ratio": bootstrap(ratios[:, int(ratios.mean(0).argmax())].numpy()),
        }
        silent = [f"{row['component']} of block {row['layer']}" for row in rows if math.isnan(row["norm_ratio"])]
        notes = [f"No norm ratio where the other positions write nothing: {', '.join(silent)}."] if silent else []
        return Result(self.id, self.title, metrics, {"layers": table}, notes=notes)

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw norm ratio and direction consistency of the stream, and those of every component."""
        table, name = result.tables["layers"], result.model_title
        return {
            "layers": _draw_layers(table.loc[table["component"] == "residual"], name),
            "components": _draw_components(table, name),
        }


def _row(component: str, layer: int, ratio: Tensor, at_p0: Tensor, at_others: list[Tensor]) -> dict[str, Any]:
    # A component whose output is zero at most positions, as a detector's may be, has no median to compare with.
    norm = bootstrap(ratio.numpy()) if ratio.isfinite().all() else Interval(math.nan, math.nan, math.nan, len(ratio))
    direction = bootstrap(at_p0.numpy())
    # Consistency of several positions: cosines to each position's own mean direction, averaged over positions.
    other = bootstrap(torch.stack(at_others).mean(0).numpy())
    return {
        "component": component,
        "layer": layer,
        **_columns("norm_ratio", norm),
        **_columns("direction_consistency", direction),
        **_columns("direction_consistency_others", other),
        "n": norm.n,
    }


def _columns(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _draw_layers(stream: pd.DataFrame, model: str) -> Figure:
    from p0circuit.figures.lines import trajectories

    norms = [_series(stream, "norm_ratio", "P0")]
    directions = [
        _series(stream, "direction_consistency", "P0"),
        _series(stream, "direction_consistency_others", "other positions"),
    ]
    return trajectories(
        {"Norm": norms, "Direction": directions},
        ["emb", *map(str, stream["layer"][:-1])],
        f"{model}: the residual stream at position zero",
        "after block",
        ["norm of P0 / median of others", "cosine to the mean direction"],
        log=[True, False],
    )


def _draw_components(table: pd.DataFrame, model: str) -> Figure:
    from p0circuit.figures.lines import trajectories

    parts = {name: table.loc[table["component"] == name] for name in _NAMES.values()}
    layers = [str(layer) for layer in parts["MLP out"]["layer"]]
    return trajectories(
        {
            "Norm": [_series(part, "norm_ratio", name) for name, part in parts.items()],
            "Direction": [_series(part, "direction_consistency", name) for name, part in parts.items()],
        },
        layers,
        f"{model}: what each component writes at position zero",
        "block",
        ["norm at P0 / median of others", "cosine to the mean direction"],
        log=[True, False],
    )


def _series(part: pd.DataFrame, column: str, label: str) -> Series:
    from p0circuit.figures.style import Series

    return Series(label, *(part[name].tolist() for name in (column, f"{column}_low", f"{column}_high")))
