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

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from p0circuit.activations import TOKEN_LOSSES, Batch, batch_size_for
from p0circuit.console import track
from p0circuit.experiments.base import Experiment, NotApplicable, is_large, second_half
from p0circuit.experiments.claim import Claim, Clause
from p0circuit.experiments.practice import find_used_sink, under
from p0circuit.experiments.surgery import random_offsets
from p0circuit.intervals import Interval, bootstrap, ratio_interval
from p0circuit.interventions.int8 import (
    INPUTS,
    Rounded,
    Site,
    Treatment,
    input_sites,
    largest_in_row,
    magnitudes,
    on_inputs,
    quantised,
    rounded_weights,
    with_weights,
)
from p0circuit.models import ModelInfo, describe, device_of, forward
from p0circuit.models.device_map import placement_of
from p0circuit.prompts import PromptSet
from p0circuit.results import Result, metric_name

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

STREAM = "stream"
"""The kind of site that the stream before a block is."""

Apart = Literal["P0", "another"]


@dataclass(frozen=True)
class Scheme:
    """A way to use int8.

    Attributes:
        grid: of the inputs: one for each row, one for each token, or, by input, where a grid for all rows ends; None:
            they stay exact.
        treatment: of one position of each row.
        apart: which position that is.
        weights: whether they are rounded too.
    """

    grid: Literal["row", "token"] | Mapping[Site, float] | None = "row"
    treatment: Treatment = "in"
    apart: Apart = "P0"
    weights: bool = False


P0_IN, P0_CLIPPED, P0_KEPT, ANOTHER_KEPT = "P0 in", "P0 clipped", "P0 kept", "another position kept"
PER_TOKEN, CALIBRATED, WEIGHTS = "a grid per token", "a calibrated grid", "int8 weights"
TOKEN_P0_CLIPPED, TOKEN_P0_KEPT = f"{PER_TOKEN}, {P0_CLIPPED}", f"{PER_TOKEN}, {P0_KEPT}"
CALIBRATED_P0_KEPT = f"{CALIBRATED}, {P0_KEPT}"
SCHEMES: dict[str, Scheme] = {
    P0_IN: Scheme(),
    P0_CLIPPED: Scheme(treatment="clipped"),
    P0_KEPT: Scheme(treatment="kept"),
    ANOTHER_KEPT: Scheme(treatment="kept", apart="another"),
    PER_TOKEN: Scheme(grid="token"),
    TOKEN_P0_CLIPPED: Scheme(grid="token", treatment="clipped"),
    TOKEN_P0_KEPT: Scheme(grid="token", treatment="kept"),
    WEIGHTS: Scheme(grid=None, weights=True),
    f"{WEIGHTS}, {P0_IN}": Scheme(weights=True),
    f"{WEIGHTS}, {P0_KEPT}": Scheme(treatment="kept", weights=True),
    f"{WEIGHTS}, {PER_TOKEN}": Scheme(grid="token", weights=True),
}
"""All but those with a calibrated grid, which `Calibration` makes."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """The largest magnitudes in an exact pass over some rows, for grids that are the same for all rows.

    Attributes:
        sites: the second axis of what follows.
        p0: at P0.
        others: at all other positions.
        places: how many positions after P0 the latter stands.
    """

    sites: tuple[Site, ...]
    p0: Float[np.ndarray, "row site"]
    others: Float[np.ndarray, "row site"]
    places: Int[np.ndarray, "row site"]

    def schemes(self, rows: slice | np.ndarray = slice(None)) -> dict[str, Scheme]:
        """Grids that end at the largest value in some of these rows, with P0 in and with P0 kept."""

        def ends(values: Float[np.ndarray, "row site"]) -> dict[Site, float]:
            return dict(zip(self.sites, values[rows].max(0).tolist(), strict=True))

        whole, others = ends(np.maximum(self.p0, self.others)), ends(self.others)
        return {CALIBRATED: Scheme(whole), CALIBRATED_P0_KEPT: Scheme(others, "kept")}


@dataclass(frozen=True, eq=False)
class Int8Effects:
    """What int8 does to a model on some prompts, by scheme; everything at positions other than P0 (and the control's).

    Attributes:
        sites: the second axis of what follows; the inputs of matrix products, then the stream before each block.
        inputs: `|rounded - x| / |x|` of single sites, each rounded in an otherwise exact pass.
        peaks: P0's largest magnitude over that of all other positions of its row.
        logits: relative error of the logits with the scheme in use everywhere.
        loss: nats per token that this adds.
        exact_loss: nats per token of the exact pass, at the same positions.
    """

    sites: tuple[Site, ...]
    inputs: Mapping[str, Float[np.ndarray, "sample site"]]
    peaks: Float[np.ndarray, "sample site"]
    logits: Mapping[str, Float[np.ndarray, " sample"]]
    loss: Mapping[str, Float[np.ndarray, " sample"]]
    exact_loss: Float[np.ndarray, " sample"]

    def error(self, scheme: str) -> Float[np.ndarray, " sample"]:
        """The mean error of the inputs of matrix products."""
        return _of_products(self.inputs[scheme], self.sites)

    def error_left(self, scheme: str, whole: str = P0_IN) -> Interval:
        """The error of the inputs over that of another scheme: P0 in, if not given."""
        return ratio_interval(self.error(scheme), self.error(whole))

    def logit_error_left(self, scheme: str, whole: str = P0_IN) -> Interval:
        """The error of the logits over that of another scheme: P0 in, if not given."""
        return ratio_interval(self.logits[scheme], self.logits[whole])

    def loss_share(self, scheme: str) -> Interval:
        """The loss added as a share of the exact one."""
        return ratio_interval(self.loss[scheme], self.exact_loss)


@dataclass(frozen=True)
class QuantisationConfig:
    """The most rows to measure on, and to calibrate on; `draws` of fewer of the latter, measured on `draw_samples`."""

    samples: int = 256
    draws: int = 8
    draw_samples: int = 32


class Quantisation(Experiment):
    """The error and the loss of int8 with P0 in, clipped, or kept in high precision."""

    id = "quantisation"
    title = "Int8 and P0's outlier"
    needs_control = False
    claim = Claim(
        id="C18",
        title="Quantisation",
        source="ours; Yang et al., arXiv 2405.14428, on activation spikes",
        statement="P0's outlier spoils int8 for all other positions: with P0 kept in high precision their error at "
        "least halves.",
        measure="Relative error of the inputs of all matrix products at positions other than P0, rounded to int8 with "
        "one grid per tensor (each row is a tensor of its own), with P0 kept in high precision over with P0 in.",
        clauses=(
            Clause("error_left_with_p0_kept", "<=", 0.5, "high"),
            Clause("error_left_with_another_position_kept", ">", 0.5, "low"),
        ),
        control="Another position kept in high precision instead of P0.",
    )

    def __init__(self, config: QuantisationConfig = QuantisationConfig()) -> None:
        super().__init__(config)

    def passes(self, model: Any, prompts: PromptSet) -> float:
        config, rows = self.config, second_half(prompts)
        measured, calibrated_on = (min(config.samples, half) for half in (rows, prompts.n - rows))
        # The exact pass, and one for each scheme in use, two of them calibrated.
        runs = 1 + len(SCHEMES) + 2
        drawn = min(config.draw_samples, measured) if calibrated_on > 4 else 0
        return (runs * measured + calibrated_on + drawn) / prompts.n

    def quick(self, info: ModelInfo) -> Quantisation:
        return Quantisation(QuantisationConfig(samples=8, draws=2, draw_samples=4)) if is_large(info) else self

    def measure(self, model: Any, prompts: PromptSet) -> Result:
        found, condition = find_used_sink(model, prompts)
        # The rows that the sink heads were chosen on, and the others.
        halves = under(model, prompts, condition).split()
        others, chosen = (half.subset(slice(0, self.config.samples)) for half in halves)
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
                f"error_left_with_p0_kept_of_a_grid_calibrated_on_{rows}_rows": bootstrap(drawn[_SHARE])
                for rows, drawn in draws.items()
            },
        }
        name = describe(model).title
        notes = [
            found.note,
            f"measured on text {condition}, {chosen.n} rows",
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
_PEAK = "peak of P0 over that of others"
_SHARE = "share that P0 kept leaves"


@torch.no_grad()
def int8_effects(model: Any, prompts: PromptSet, schemes: Mapping[str, Scheme] = SCHEMES) -> Int8Effects:
    """Round what each scheme rounds, and compare with the exact pass.

    A model with a device map need not have room for other weights beside its own: schemes that round them are left out.

    Raises:
        NotApplicable: a row is too short for a P0, a control, and a position to measure that predicts something.
    """
    if placement_of(model) is not None:
        schemes = {name: scheme for name, scheme in schemes.items() if not scheme.weights}
    weights = rounded_weights(model) if any(scheme.weights for scheme in schemes.values()) else []
    sites = _sites(model)
    parts = [_effects_on(model, rows, sites, schemes, weights) for rows in track(_batches(model, prompts), "rounding")]
    whole = {key: torch.cat([part[key] for part in parts]).double().numpy() for key in parts[0]}
    local, logits, loss = ({name: whole[what, name] for what, name in whole if what == kind} for kind in _MEASURED)
    return Int8Effects(sites, local, whole["peak", ""], logits, loss, whole["exact loss", ""])


@torch.no_grad()
def calibrated(model: Any, prompts: PromptSet) -> Calibration:
    """What a calibrated grid has to hold in these rows."""
    sites, parts = _sites(model), []
    for rows in _batches(model, prompts):
        seen: dict[Site, tuple[Tensor, ...]] = {}

        def look(site: Site, x: Tensor, rows: _Rows = rows, seen: dict[Site, tuple[Tensor, ...]] = seen) -> None:
            sizes = magnitudes(x)
            others, at = sizes.masked_fill(~rows.without("P0").to(x.device), 0).max(1)
            p0 = rows.p0.to(x.device)
            seen.setdefault(site, (sizes.gather(1, p0[:, None])[:, 0].float(), others.float(), at - p0))

        _exact(model, rows, sites, look)
        parts.append([torch.stack(values, dim=1).cpu() for values in zip(*map(seen.__getitem__, sites), strict=True)])
    return Calibration(sites, *(torch.cat(values).numpy() for values in zip(*parts, strict=True)))


@torch.no_grad()
def over_draws(
    model: Any, prompts: PromptSet, calibration: Calibration, draws: int = QuantisationConfig.draws
) -> dict[int, dict[str, Float[np.ndarray, " draw"]]]:
    """The errors of grids calibrated on 4, 16, 64 … rows drawn from all that there are, mean over the prompts.

    By the number of rows: with P0 in, with P0 kept, and the latter over the former.
    """
    total, rng = len(calibration.p0), np.random.default_rng(prompts.seed)
    counts = [4**power for power in range(1, total.bit_length()) if 4**power < total]
    schemes = {
        (count, draw, name): scheme
        for count in counts
        for draw in range(draws)
        for name, scheme in calibration.schemes(rng.permutation(total)[:count]).items()
    }
    parts = [_errors_on(model, rows, calibration.sites, schemes)[1] for rows in _batches(model, prompts)]
    errors = {
        key: _of_products(torch.cat([part["input", key] for part in parts]).double().numpy(), calibration.sites).mean()
        for key in schemes
    }
    found = {}
    for count in counts:
        drawn = {
            name: np.array([errors[count, draw, name] for draw in range(draws)])
            for name in (CALIBRATED, CALIBRATED_P0_KEPT)
        }
        found[count] = drawn | {_SHARE: drawn[CALIBRATED_P0_KEPT] / drawn[CALIBRATED]}
    return found


_MEASURED = ("input", "logits", "loss")


@dataclass(frozen=True)
class _Rows:
    ids: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    p0: Int[Tensor, " batch"]
    another: Int[Tensor, " batch"]

    def place(self, apart: Apart) -> Int[Tensor, " batch"]:
        return self.p0 if apart == "P0" else self.another

    def without(self, apart: Apart) -> Bool[Tensor, "batch pos"]:
        """The real positions but for one."""
        return self.real & ~one_hot(self.place(apart), self.ids.shape[1]).bool()

    @property
    def counted(self) -> Bool[Tensor, "batch pos"]:
        """The positions that errors are about."""
        return self.without("P0") & self.without("another")

    def rounded(self, site: Site, x: Tensor, scheme: Scheme) -> Tensor:
        counted = self.real if scheme.treatment == "in" else self.without(scheme.apart)
        largest = scheme.grid[site] if isinstance(scheme.grid, Mapping) else largest_in_row(x, counted)
        return quantised(x, largest, self.place(scheme.apart), scheme.treatment, scheme.grid == "token")


def _batches(model: Any, prompts: PromptSet) -> list[_Rows]:
    """The prompts in batches, with a control drawn for each row.

    Raises:
        NotApplicable: see `int8_effects`.
    """
    shortest = int(prompts.attention_mask.sum(1).min())
    if shortest < 4:
        raise NotApplicable(f"needs rows of at least 4 tokens, got one of {shortest}")
    another = prompts.p0 + random_offsets(prompts.n, prompts.seed + 1, 1, shortest)
    # The exact logits are there beside those of a scheme.
    size, device = max(1, batch_size_for(model, prompts.length, with_logits=True) // 2), device_of(model)
    whole = (part.to(device) for part in (prompts.ids, prompts.attention_mask, prompts.p0, another))
    return [_Rows(*parts) for parts in zip(*(part.split(size) for part in whole), strict=True)]


def _sites(model: Any) -> tuple[Site, ...]:
    """The inputs of matrix products, then the stream before each block."""
    return (*input_sites(model), *(Site(block, STREAM) for block in range(describe(model).layers)))


def _of_products(errors: Float[np.ndarray, "sample site"], sites: Sequence[Site]) -> Float[np.ndarray, " sample"]:
    """The mean over the inputs of matrix products."""
    return errors[:, [site.kind != STREAM for site in sites]].mean(1)


def _exact(model: Any, rows: _Rows, sites: Sequence[Site], look: Callable[[Site, Tensor], None]) -> Tensor:
    """The logits of a pass in which every input of a matrix product is looked at, and the stream before each block."""

    def at_hook(x: Tensor, hook: Any, site: Site) -> None:
        look(site, x)

    streams = [
        (f"blocks.{site.block}.hook_resid_pre", functools.partial(at_hook, site=site))
        for site in sites
        if site.kind == STREAM
    ]
    with on_inputs(model, look):
        return forward(model, rows.ids, rows.real, hooks=streams)


def _errors_on(
    model: Any, rows: _Rows, sites: Sequence[Site], schemes: Mapping[Any, Scheme]
) -> tuple[Tensor, dict[tuple[str, Any], Tensor]]:
    """The exact logits of a batch, and by scheme the errors of its inputs, each rounded in that same pass."""
    seen: dict[Site, dict[tuple[str, Any], Tensor]] = {}

    def look(site: Site, x: Tensor) -> None:
        if site in seen:
            return
        errors = {("input", name): _error(rows.rounded(site, x, each), x, rows) for name, each in schemes.items()}
        seen[site] = errors | {("peak", ""): _peak(x, rows)}

    exact = _exact(model, rows, sites, look)
    return exact, {key: torch.stack([seen[site][key] for site in sites], dim=1) for key in seen[sites[0]]}


def _effects_on(
    model: Any, rows: _Rows, sites: Sequence[Site], schemes: Mapping[str, Scheme], weights: list[Rounded]
) -> dict[tuple[str, str], Tensor]:
    """Everything measured on a batch, by kind and scheme, the first axis being the row."""
    on_inputs_alone = {name: scheme for name, scheme in schemes.items() if scheme.grid and not scheme.weights}
    exact, found = _errors_on(model, rows, sites, on_inputs_alone)
    found["exact loss", ""] = exact_loss = _loss(exact, rows)
    for name, scheme in schemes.items():
        with contextlib.ExitStack() as stack:
            if scheme.weights:
                stack.enter_context(with_weights(weights))
            if scheme.grid:
                stack.enter_context(on_inputs(model, functools.partial(rows.rounded, scheme=scheme)))
            logits = forward(model, rows.ids, rows.real)
        found["logits", name] = _logit_error(logits, exact, rows)
        found["loss", name] = _loss(logits, rows) - exact_loss
    return found


def _error(new: Tensor, x: Tensor, rows: _Rows) -> Float[Tensor, " batch"]:
    return _relative(new - x, x, rows.counted).cpu()


def _relative(
    change: Float[Tensor, "batch pos *value"], x: Float[Tensor, "batch pos *value"], counted: Bool[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    def size(values: Tensor) -> Tensor:
        return (values.float().square().flatten(2).sum(2) * counted.to(x.device)).sum(1).sqrt()

    whole = size(x)
    # Nothing but zeros is rounded without error.
    return torch.where(whole > 0, size(change) / whole, 0)


def _peak(x: Tensor, rows: _Rows) -> Float[Tensor, " batch"]:
    sizes = magnitudes(x).float().cpu()
    others = sizes.masked_fill(~rows.counted.cpu(), 0).amax(1)
    p0 = sizes.gather(1, rows.p0.cpu()[:, None])[:, 0]
    return torch.where(others > 0, p0 / others, 1)


def _logit_error(new: Tensor, exact: Tensor, rows: _Rows) -> Float[Tensor, " batch"]:
    def centred(logits: Tensor) -> Tensor:
        return logits.float() - logits.float().mean(-1, keepdim=True)

    # Row by row: in float32 the logits of a batch may be larger than all else.
    errors = []
    for one, other, counted in zip(new.split(1), exact.split(1), rows.counted.split(1), strict=True):
        errors.append(_relative(centred(one) - centred(other), centred(other), counted).cpu())
    return torch.cat(errors)


def _loss(logits: Tensor, rows: _Rows) -> Float[Tensor, " batch"]:
    batch = Batch(*(part.to(logits.device) for part in (rows.ids, rows.real, rows.p0)))
    losses = TOKEN_LOSSES.reduce(logits, batch).cpu()
    counted = rows.counted[:, :-1].cpu()
    return losses.masked_fill(~counted, 0).sum(1) / counted.sum(1)


def _site_table(effects: Int8Effects) -> pd.DataFrame:
    import pandas as pd

    labels = INPUTS | {STREAM: "the stream itself"}
    measured = {f"error, {name}": values for name, values in effects.inputs.items()} | {_PEAK: effects.peaks}
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
                "measured": name if name == _SHARE else f"error, {name}",
                **bootstrap(values).to_json(),
                "lowest": values.min(),
                "highest": values.max(),
            }
            for rows, drawn in draws.items()
            for name, values in drawn.items()
        ]
    )


def _draw_inputs(effects: Int8Effects, model: str) -> Figure:
    from p0circuit.report.figures import Series, sweeps

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
    from p0circuit.report.figures import intervals

    panel = {scheme: bootstrap(each) for scheme, each in values.items()}
    title = f"{model}: int8 in use (a grid per row where none is named)"
    return intervals({name: panel}, title, [unit], controls=(ANOTHER_KEPT,), reference=0)
