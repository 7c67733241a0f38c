"""What P0's outlier costs in int8, and what keeping P0 in high precision gains (C18).

1. *Text* in which the model has a sink: as it is or, if the sink hangs on BOS, behind BOS. Samples that its sink heads
   were not chosen on.
2. *Grids*: one for each input of the matrix products of a block (`interventions.int8`) and each row ("per tensor",
   every row being a batch of its own), which ends at the row's largest value. P0 is in; or it is left out and clipped
   to the end; or left out and kept in high precision.
3. *Error of the inputs*: each is rounded to int8 in an otherwise exact pass. The error is `|rounded - x| / |x|` over
   the positions other than P0, for which only the grid differs; that of a model is the mean over its inputs. This is
   what the claim is about.
4. *Control*: another position, drawn for each row, is kept in high precision instead of P0; the verdict asks that it
   does not help. In no scheme does it count for an error, so that all errors are about the same positions.
5. *In use*: all inputs rounded at once. The error of the logits (their mean over the vocabulary taken off, which no
   softmax sees) and the loss added, at the positions of step 3. Beside it a grid per token, and int8 weights.
6. *The stream* between the blocks is no input of a product and stays as it is; its error stands beside those of step 3.
7. *A calibrated grid*, added after the first look at the figures above and no part of the verdict: the same for all
   rows, it ends at the largest value in an exact pass over rows that nothing is measured on. That is a matter of few of
   them, so its errors are measured over draws of 4, 16, 64 … such rows, too. Where in some rows another position has
   values as large as P0's, such a grid has to hold them, and keeping P0 alone gains little; a note tells how many rows.

Rounding is simulated: floating-point numbers on the grid of int8, which is symmetric. Intervals are over rows, with the
calibrated grids as they are, or over draws. Sources: massive activations: Sun et al. 2024 (arXiv 2402.17762); what they
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
    """The most rows to measure on, and to calibrate on; `draws` of fewer of the latter, measured on `draw_samples`."""

    samples: int = 256
    draws: int = 8
    draw_samples: int = 32


class Quantisation(Experiment[QuantisationConfig]):
    """The error and the loss of int8 with P0 in, clipped, or kept in high precision."""

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
        config, rows = self.config, second_half(prompts)
        measured, calibrated_on = (min(config.samples, half) for half in (rows, prompts.n - rows))
        # The exact pass, and one for each scheme in use, two of them calibrated.
        runs = 1 + len(SCHEMES) + 2
        drawn = min(config.draw_samples, measured) if calibrated_on > 4 else 0
        return (runs * measured + calibrated_on + drawn) / prompts.n

    def quick(self, info: ModelInfo) -> Quantisation:
        return Quantisation(QuantisationConfig(samples=8, draws=2, draw_samples=4)) if is_large(info) else self

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        sink = studied_sink(model, prompts, in_either_condition=True)
        others, chosen = (half.subset(slice(0, self.config.samples)) for half in (sink.chosen_on, sink.prompts))
        calibration = calibrated(model, others)
        effects = int8_effects(model, chosen, SCHEMES | calibration.schemes())
        draws = over_draws(model, chosen.subset(slice(0, self.config.draw_samples)), calibration, self.config.draws)
        metrics = {
            # What a scheme does to P0 itself, such as clipping, does not show at the others.
            **{f"error_left_with_{metric_name(name)}": effects.error_left(name) for name in _LEFT[:3]},
            "error_with_p0_in": bootstrap(effects.error(P0_IN)),
            "logit_error_with_p0_in": bootstrap(effects.logits[P0_IN]),
            **{f"logit_error_left_with_{metric_name(name)}": effects.logit_error_left(name) for name in _LEFT},
            **{f"loss_added_with_{metric_name(name)}": bootstrap(values) for name, values in effects.loss.items()},
            "loss_added_as_a_share": effects.loss_share(P0_IN),
            "error_with_a_calibrated_grid": bootstrap(effects.error(CALIBRATED)),
            "error_left_with_p0_kept_of_a_calibrated_grid": effects.error_left(CALIBRATED_P0_KEPT, CALIBRATED),
            **{
                f"error_left_with_p0_kept_of_a_grid_calibrated_on_{rows}_rows": bootstrap(drawn[SHARE_LEFT])
                for rows, drawn in draws.items()
            },
        }
        name = describe(model).title
        notes = [
            sink.note,
            f"measured on text {sink.condition}, {chosen.n} rows",
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
        tables = {"sites": _site_table(effects), "schemes": _scheme_table(effects)}
        if draws:
            tables["calibration"] = _calibration_table(draws)
        figures = {
            "inputs": _draw_inputs(effects, name),
            "logits": _draw_schemes(effects.logits, "Error of the logits", "relative error", name),
            "loss": _draw_schemes(effects.loss, "Loss added", "nats per token", name),
        }
        return Result(self.id, self.title, metrics, tables, figures, notes=notes)


def _worst(effects: Int8Effects) -> int:
    """The input at which P0 stands out most."""
    return int(np.where([site.kind == STREAM for site in effects.sites], 0, effects.peaks.mean(0)).argmax())


def _worst_input(effects: Int8Effects) -> str:
    """Where P0 stands out most, in words."""
    number = _worst(effects)
    site, peak = effects.sites[number], float(effects.peaks[:, number].mean())
    if peak <= 1:
        return f"P0 stands out nowhere: its largest value is at most {peak:.3g} times that of all others"
    whole, kept = (bootstrap(effects.inputs[name][:, number]) for name in (P0_IN, P0_KEPT))
    return (
        f"P0 stands out most in block {site.block}, {INPUTS[site.kind]}: its largest value there is "
        f"{peak:.3g} times that of all others, the error {whole} with P0 in and {kept} with P0 kept"
    )


def _as_large_as_p0(effects: Int8Effects, calibration: Calibration) -> list[str]:
    """In how many rows a calibrated grid has to hold others than P0 that are as large, where P0 stands out most."""
    number = _worst(effects)
    usual = float(np.median(calibration.p0[:, number]))
    as_large = calibration.others[:, number] >= usual
    if effects.peaks[:, number].mean() <= 1 or not as_large.any():
        return []
    places, site = np.bincount(calibration.places[as_large, number]), effects.sites[number]
    return [
        f"in {as_large.sum()} of these {len(as_large)} rows another position (position {places.argmax()} in "
        f"{places.max()} of them) has, in block {site.block}, {INPUTS[site.kind]}, a value as large as P0's usual one, "
        f"{usual:.3g}: a calibrated grid has to hold it, P0 kept or not"
    ]


_LEFT = (P0_KEPT, ANOTHER_KEPT, PER_TOKEN, P0_CLIPPED, TOKEN_P0_CLIPPED, TOKEN_P0_KEPT)


def _site_table(effects: Int8Effects) -> pd.DataFrame:
    import pandas as pd

    labels = INPUTS | {STREAM: "the stream itself"}
    measured = {f"error, {name}": values for name, values in effects.inputs.items()} | {PEAK: effects.peaks}
    rows = [
        {"input": labels[site.kind], "block": site.block, "measured": name, **bootstrap(values[:, number]).to_json()}
        for number, site in enumerate(effects.sites)
        for name, values in measured.items()
    ]
    return pd.DataFrame(rows)


def _scheme_table(effects: Int8Effects) -> pd.DataFrame:
    import pandas as pd

    kinds = {"error of inputs": {name: effects.error(name) for name in effects.inputs}}
    kinds |= {"error of logits": dict(effects.logits), "loss added": dict(effects.loss)}
    return pd.DataFrame(
        [
            {"measured": kind, "scheme": name, **bootstrap(values).to_json()}
            for kind, schemes in kinds.items()
            for name, values in schemes.items()
        ]
    )


def _calibration_table(draws: Mapping[int, Mapping[str, np.ndarray]]) -> pd.DataFrame:
    """Over draws of calibration rows: the mean with its interval, and the ends of the range."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "rows": rows,
                "measured": name if name == SHARE_LEFT else f"error, {name}",
                **bootstrap(values).to_json(),
                "lowest": values.min(),
                "highest": values.max(),
            }
            for rows, drawn in draws.items()
            for name, values in drawn.items()
        ]
    )


def _draw_inputs(effects: Int8Effects, model: str) -> Figure:
    from p0circuit.figures.lines import sweeps
    from p0circuit.figures.style import Series

    kinds = dict.fromkeys(site.kind for site in effects.sites)
    shown = {"All inputs of a block, mean": [kind for kind in kinds if kind != STREAM]}
    shown |= {name: [kind] for kind, name in (("down", "Of these: MLP, out of hidden"), (STREAM, "The stream itself"))}
    panels = {}
    for title, wanted in shown.items():
        blocks: dict[int, list[int]] = {}
        for number, site in enumerate(effects.sites):
            if site.kind in wanted:
                blocks.setdefault(site.block, []).append(number)
        drawn = []
        for name in (P0_IN, P0_KEPT, PER_TOKEN):
            points = [bootstrap(effects.inputs[name][:, numbers].mean(1)) for numbers in blocks.values()]
            drawn.append(Series(name, *([getattr(point, end) for point in points] for end in ("value", "low", "high"))))
        if blocks:
            panels[title] = (drawn, [str(block) for block in blocks])
    title = f"{model}: error of int8 at the positions other than P0 (a grid per row where none is named)"
    return sweeps(panels, title, ["block"] * len(panels), "relative error")


def _draw_schemes(values: Mapping[str, np.ndarray], name: str, unit: str, model: str) -> Figure:
    from p0circuit.figures.intervals import intervals

    panel = {scheme: bootstrap(each) for scheme, each in values.items()}
    title = f"{model}: int8 in use (a grid per row where none is named)"
    return intervals({name: panel}, title, [unit], controls=(ANOTHER_KEPT,), reference=0)
