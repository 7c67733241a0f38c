"""The cost of P0's outlier in int8, and the gain of keeping P0 in high precision (C18).

1. *Text* in which the model has a sink: as it is or, if the sink depends on BOS, after BOS. Samples that the sink heads
   were not chosen on.
2. *Quantisation scale*: one for each input of the matrix products of a block (`interventions.int8`) and each row
   (per-tensor dynamic, every row being a batch of its own), from the row's largest magnitude. P0 is included; or it is
   excluded and clipped; or excluded and kept in high precision.
3. *Error of the inputs*: each is rounded to int8 in an otherwise exact pass. The error is `|rounded - x| / |x|` over
   the positions other than P0, where only the scale differs; that of a model is the mean over its inputs. The claim is
   about this error.
4. *Control*: another position, drawn for each row, is kept in high precision instead of P0; the verdict requires that
   this does not help. No scheme counts this position in its error, so all errors are over the same positions.
5. *In use*: all inputs rounded at once. The error of the logits (minus their mean over the vocabulary, which does not
   change the softmax) and the loss added, at the positions of step 3. Also with per-token dynamic scales, and with int8
   weights.
6. *The stream* between the blocks is no input of a product and is not rounded in use; its error is measured as in 3.
7. *A static (calibrated) scale*, added after the first results and no part of the verdict: the same for all rows, from
   the largest magnitude in an exact pass over other rows. A few of those rows decide it, so its errors are also
   measured over draws of 4, 16, 64 … of them. If in some rows another position has values as large as P0's, the scale
   must cover them, and keeping P0 alone gains little; a note gives the number of such rows.

Rounding is simulated: floating-point numbers on the symmetric grid of int8. Intervals are over rows, for given
calibrated scales, or over draws. Sources: massive activations: Sun et al. 2024 (arXiv 2402.17762); what they
do to int8, and first tokens kept exact: Yang et al. 2024 (arXiv 2405.14428), Liu et al. 2024 (arXiv 2403.01241);
calibrated and other grids: Xiao et al. 2022 (arXiv 2211.10438).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from p0circuit.experiments.base import Experiment, is_large, second_half
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.sink_under_study import studied_sink
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.int8 import (
    INPUTS,
)
from p0circuit.models import ModelInfo, describe
from p0circuit.prompts import PromptSet
from p0circuit.results import Result, metric_name
from p0circuit.stats import bootstrap

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
from p0circuit.experiments.deployment.int8_effects import (
    ANOTHER_KEPT,
    CALIBRATED,
    CALIBRATED_P0_KEPT,
    P0_CLIPPED,
    P0_IN,
    P0_KEPT,
    PEAK,
    PER_TOKEN,
    SCHEMES,
    SHARE_LEFT,
    STREAM,
    TOKEN_P0_CLIPPED,
    TOKEN_P0_KEPT,
    WEIGHTS,
    Calibration,
    Int8Effects,
    calibrated,
    int8_effects,
    over_draws,
)


@dataclass(frozen=True)
class QuantisationConfig:
    """Settings of `Quantisation`.

    Attributes:
        samples: maximum number of prompts to measure on, and to calibrate on.
        draws: number of draws of fewer calibration rows.
        draw_samples: maximum number of prompts on which the draws are measured.
    """

    samples: int = 256
    draws: int = 8
    draw_samples: int = 32


class Quantisation(Experiment[QuantisationConfig]):
    """The error and the loss of int8 with P0 included, clipped, or kept in high precision."""

    id = "quantisation"
    title = "Int8 and P0's outlier"
    config_type = QuantisationConfig
    needs_control = False
    claim = Claim(
        id="C18",
        title="Quantisation",
        source="ours; Yang et al., arXiv 2405.14428, on activation spikes",
        statement="P0's outlier spoils int8 for all other positions: with P0 kept in high precision their error at "
        "least halves.",
        measure="Relative error of the inputs of all matrix products at positions other than P0, rounded to int8 with "
        "one grid per tensor (each row is a tensor of its own), with P0 kept in high precision over with P0 in.",
        criteria=(
            Criterion("error_left_with_p0_kept", "<=", 0.5, "high"),
            Criterion("error_left_with_another_position_kept", ">", 0.5, "low"),
        ),
        control="Another position kept in high precision instead of P0.",
    )

    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        """Declare the calibration and a run for each set of positions kept in high precision."""
        config, rows = self.config, second_half(prompts)
        measured, calibrated_on = (min(config.samples, half) for half in (rows, prompts.n - rows))
        # The exact pass, and one for each scheme in use, two of them calibrated.
        runs = 1 + len(SCHEMES) + 2
        draws = min(config.draw_samples, measured) if calibrated_on > 4 else 0
        return (runs * measured + calibrated_on + draws) / prompts.n

    def quick(self, info: ModelInfo) -> Quantisation:
        """Return a version for large models with fewer samples and draws."""
        return Quantisation(QuantisationConfig(samples=8, draws=2, draw_samples=4)) if is_large(info) else self

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Quantise activations to int8, with and without P0 kept in high precision, and compare the losses."""
        sink = studied_sink(model, prompts, in_either_condition=True)
        others, rows = (half.subset(slice(0, self.config.samples)) for half in (sink.chosen_on, sink.prompts))
        calibration = calibrated(model, others)
        effects = int8_effects(model, rows, SCHEMES | calibration.schemes())
        draws = over_draws(model, rows.subset(slice(0, self.config.draw_samples)), calibration, self.config.draws)
        metrics = {
            # Schemes that differ only in how P0 itself is rounded have equal errors at the other positions.
            **{f"error_left_with_{metric_name(name)}": effects.error_left(name) for name in _LEFT[:3]},
            "error_with_p0_in": bootstrap(effects.error(P0_IN)),
            "logit_error_with_p0_in": bootstrap(effects.logits[P0_IN]),
            **{f"logit_error_left_with_{metric_name(name)}": effects.logit_error_left(name) for name in _LEFT},
            **{f"loss_added_with_{metric_name(name)}": bootstrap(values) for name, values in effects.loss.items()},
            "loss_added_as_a_share": effects.loss_share(P0_IN),
            "error_with_a_calibrated_grid": bootstrap(effects.error(CALIBRATED)),
            "error_left_with_p0_kept_of_a_calibrated_grid": effects.error_left(CALIBRATED_P0_KEPT, CALIBRATED),
            **{
                f"error_left_with_p0_kept_of_a_grid_calibrated_on_{count}_rows": bootstrap(errors[SHARE_LEFT])
                for count, errors in draws.items()
            },
        }
        notes = [
            sink.note,
            f"measured on text {sink.condition}, {rows.n} rows",
            _worst_input(effects),
            f"in use, P0 kept leaves {metrics['logit_error_left_with_p0_kept']} of the error of the logits",
            f"added later and no part of the verdict: a calibrated grid, made on {others.n} other rows, has an error "
            f"of {metrics['error_with_a_calibrated_grid']}, of which P0 kept leaves "
            f"{metrics['error_left_with_p0_kept_of_a_calibrated_grid']}",
        ]
        notes += _as_large_as_p0(effects, calibration)
        if WEIGHTS not in effects.logits:
            notes.append("int8 weights are left out: the model was loaded with a device map")
        if describe(model).experts:
            notes.append("the hidden layers of the experts are not rounded: no hook reaches them")
        tables = {"sites": _site_table(effects), "blocks": _block_table(effects), "schemes": _scheme_table(effects)}
        if draws:
            tables["calibration"] = _calibration_table(draws)
        return Result(self.id, self.title, metrics, tables, notes=notes)

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw the error of the inputs by block, and the error of the logits and the loss added by scheme."""
        schemes, name = result.tables["schemes"], result.model_title
        return {
            "inputs": _draw_inputs(result.tables["blocks"], result.tables["sites"], name),
            "logits": _draw_schemes(schemes, _OF_LOGITS, "Error of the logits", "relative error", name),
            "loss": _draw_schemes(schemes, _LOSS_ADDED, "Loss added", "nats per token", name),
        }


def _worst(effects: Int8Effects) -> int:
    """The number of the input with the largest ratio of P0's largest magnitude to that of the others."""
    return int(np.where([site.kind == STREAM for site in effects.sites], 0, effects.peaks.mean(0)).argmax())


def _worst_input(effects: Int8Effects) -> str:
    """A sentence on the input where P0's values are largest compared with the others."""
    number = _worst(effects)
    site, peak = effects.sites[number], float(effects.peaks[:, number].mean())
    if peak <= 1:
        return f"P0 stands out nowhere: its largest value is at most {peak:.3g} times that of all others"
    with_p0, without_p0 = (bootstrap(effects.inputs[name][:, number]) for name in (P0_IN, P0_KEPT))
    return (
        f"P0 stands out most in block {site.block}, {INPUTS[site.kind]}: its largest value there is "
        f"{peak:.3g} times that of all others, the error {with_p0} with P0 in and {without_p0} with P0 kept"
    )


def _as_large_as_p0(effects: Int8Effects, calibration: Calibration) -> list[str]:
    """A note on the calibration rows in which another position has values as large as P0's, if there are any."""
    number = _worst(effects)
    usual = float(np.median(calibration.p0[:, number]))
    as_large = calibration.others[:, number] >= usual
    if effects.peaks[:, number].mean() <= 1 or not as_large.any():
        return []
    rows, site = np.bincount(calibration.positions[as_large, number]), effects.sites[number]
    return [
        f"in {as_large.sum()} of these {len(as_large)} rows another position (position {rows.argmax()} in "
        f"{rows.max()} of them) has, in block {site.block}, {INPUTS[site.kind]}, a value as large as P0's usual one, "
        f"{usual:.3g}: a calibrated grid has to hold it, P0 kept or not"
    ]


_OF_LOGITS, _LOSS_ADDED = "error of logits", "loss added"
_STREAM_LABEL = "the stream itself"
_LEFT = (P0_KEPT, ANOTHER_KEPT, PER_TOKEN, P0_CLIPPED, TOKEN_P0_CLIPPED, TOKEN_P0_KEPT)


def _error_of(scheme: str) -> str:
    return f"error, {scheme}"


def _site_table(effects: Int8Effects) -> pd.DataFrame:
    import pandas as pd

    labels = INPUTS | {STREAM: _STREAM_LABEL}
    measured = {_error_of(name): values for name, values in effects.inputs.items()} | {PEAK: effects.peaks}
    rows = [
        {"input": labels[site.kind], "block": site.block, "measured": name, **bootstrap(values[:, number]).to_json()}
        for number, site in enumerate(effects.sites)
        for name, values in measured.items()
    ]
    return pd.DataFrame(rows)


def _block_table(effects: Int8Effects) -> pd.DataFrame:
    """The error of every scheme by block, mean over the inputs of matrix products in the block."""
    import pandas as pd

    blocks: dict[int, list[int]] = {}
    for number, site in enumerate(effects.sites):
        if site.kind != STREAM:
            blocks.setdefault(site.block, []).append(number)
    rows = [
        {"block": block, "measured": _error_of(name), **bootstrap(values[:, numbers].mean(1)).to_json()}
        for block, numbers in blocks.items()
        for name, values in effects.inputs.items()
    ]
    return pd.DataFrame(rows)


def _scheme_table(effects: Int8Effects) -> pd.DataFrame:
    import pandas as pd

    kinds = {"error of inputs": {name: effects.error(name) for name in effects.inputs}}
    kinds |= {_OF_LOGITS: dict(effects.logits), _LOSS_ADDED: dict(effects.loss)}
    return pd.DataFrame(
        [
            {"measured": kind, "scheme": name, **bootstrap(values).to_json()}
            for kind, schemes in kinds.items()
            for name, values in schemes.items()
        ]
    )


def _calibration_table(draws: Mapping[int, Mapping[str, np.ndarray]]) -> pd.DataFrame:
    """The mean over draws of calibration rows with its interval, and the ends of the range."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "rows": count,
                "measured": name if name == SHARE_LEFT else _error_of(name),
                **bootstrap(values).to_json(),
                "lowest": values.min(),
                "highest": values.max(),
            }
            for count, errors in draws.items()
            for name, values in errors.items()
        ]
    )


def _draw_inputs(blocks: pd.DataFrame, sites: pd.DataFrame, model: str) -> Figure:
    from p0circuit.figures.lines import sweeps
    from p0circuit.figures.style import Series

    tables = {
        "All inputs of a block, mean": blocks,
        "Of these: MLP, out of hidden": sites[sites["input"] == INPUTS["down"]],
        "The stream itself": sites[sites["input"] == _STREAM_LABEL],
    }
    panels = {}
    for title, table in tables.items():
        parts = {name: table[table["measured"] == _error_of(name)] for name in (P0_IN, P0_KEPT, PER_TOKEN)}
        lines = [
            Series(name, *(part[end].tolist() for end in ("value", "low", "high"))) for name, part in parts.items()
        ]
        if len(table):
            panels[title] = (lines, [str(block) for block in table["block"].unique()])
    title = f"{model}: error of int8 at the positions other than P0 (a grid per row where none is named)"
    return sweeps(panels, title, ["block"] * len(panels), "relative error")


def _draw_schemes(schemes: pd.DataFrame, measured: str, name: str, unit: str, model: str) -> Figure:
    from p0circuit.figures.intervals import intervals, intervals_by

    panel = intervals_by(schemes.loc[schemes["measured"] == measured], "scheme")
    title = f"{model}: int8 in use (a grid per row where none is named)"
    return intervals({name: panel}, title, [unit], controls=(ANOTHER_KEPT,), reference=0)
