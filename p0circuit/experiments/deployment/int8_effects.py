"""Int8 rounding of a model's inputs and weights: schemes, calibration, and their effects on outputs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from p0circuit.experiments.base import NotApplicable
from p0circuit.experiments.surgery import random_offsets
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.int8 import (
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
from p0circuit.log import progress_bar
from p0circuit.models import describe, device_of, forward
from p0circuit.models.device_map import placement_of
from p0circuit.prompts import PromptSet
from p0circuit.recording.batch_size import batch_size_for
from p0circuit.recording.quantities import TOKEN_LOSSES, Batch
from p0circuit.stats import Interval, ratio_interval

STREAM = "stream"
"""The kind of site that the stream before a block is."""

Apart = Literal["P0", "another"]


@dataclass(frozen=True)
class Scheme:
    """A way to use int8.

    Attributes:
        grid: quantisation scale of the inputs: "row" for per-tensor dynamic, "token" for per-token dynamic, or the
            largest magnitude of every input for a static scale; None for inputs that are not rounded.
        treatment: what is done to one position of each row.
        apart: which position that is.
        weights: whether weights are rounded too.
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
"""All schemes but the static ones, which `Calibration.schemes` makes."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """The largest magnitudes in an exact pass over some rows, for static quantisation scales.

    Attributes:
        sites: the second axis of the arrays.
        p0: the largest magnitude at P0.
        others: the largest magnitude at all other positions.
        positions: position of the latter, counted from P0.
    """

    sites: tuple[Site, ...]
    p0: Float[np.ndarray, "row site"]
    others: Float[np.ndarray, "row site"]
    positions: Int[np.ndarray, "row site"]

    def schemes(self, rows: slice | np.ndarray = slice(None)) -> dict[str, Scheme]:
        """Return the static schemes of some of these rows, with P0 included and with P0 kept in high precision.

        Args:
            rows: the calibration rows.
        """

        def ends(values: Float[np.ndarray, "row site"]) -> dict[Site, float]:
            return dict(zip(self.sites, values[rows].max(0).tolist(), strict=True))

        with_p0, others = ends(np.maximum(self.p0, self.others)), ends(self.others)
        return {CALIBRATED: Scheme(with_p0), CALIBRATED_P0_KEPT: Scheme(others, "kept")}


@dataclass(frozen=True, eq=False)
class Int8Effects:
    """The effects of int8 on a model, by scheme, at positions other than P0 and the control's.

    Attributes:
        sites: the second axis of `inputs` and `peaks`: inputs of matrix products, then the stream before each block.
        inputs: `|rounded - x| / |x|` of single sites, each rounded in an otherwise exact pass.
        peaks: P0's largest magnitude over that of all other positions of its row.
        logits: relative error of the logits with the scheme in use everywhere.
        loss: the loss that this adds, in nats per token.
        exact_loss: the loss of the exact pass at the same positions, in nats per token.
    """

    sites: tuple[Site, ...]
    inputs: Mapping[str, Float[np.ndarray, "sample site"]]
    peaks: Float[np.ndarray, "sample site"]
    logits: Mapping[str, Float[np.ndarray, " sample"]]
    loss: Mapping[str, Float[np.ndarray, " sample"]]
    exact_loss: Float[np.ndarray, " sample"]

    def error(self, scheme: str) -> Float[np.ndarray, " sample"]:
        """Return the mean error of the inputs of matrix products.

        Args:
            scheme: name of the scheme.
        """
        return _of_products(self.inputs[scheme], self.sites)

    def error_left(self, scheme: str, base: str = P0_IN) -> Interval:
        """Return the error of the inputs over that of another scheme.

        Args:
            scheme: name of the scheme.
            base: name of the scheme to compare with.
        """
        return ratio_interval(self.error(scheme), self.error(base))

    def logit_error_left(self, scheme: str, base: str = P0_IN) -> Interval:
        """Return the error of the logits over that of another scheme.

        Args:
            scheme: name of the scheme.
            base: name of the scheme to compare with.
        """
        return ratio_interval(self.logits[scheme], self.logits[base])

    def loss_share(self, scheme: str) -> Interval:
        """Return the loss added as a share of the loss of the exact pass.

        Args:
            scheme: name of the scheme.
        """
        return ratio_interval(self.loss[scheme], self.exact_loss)


SHARE_LEFT = "share that P0 kept leaves"
PEAK = "peak of P0 over that of others"


@torch.no_grad()
def int8_effects(model: HookedModel, prompts: PromptSet, schemes: Mapping[str, Scheme] = SCHEMES) -> Int8Effects:
    """Measure the effects of every scheme against the exact pass.

    With a device map there may be no memory for a second set of weights: schemes that round weights are then left out.

    Args:
        model: the model.
        prompts: prompts to measure on.
        schemes: the schemes by name.

    Raises:
        NotApplicable: a row is too short for a P0, a control, and a position to measure that predicts something.
    """
    if placement_of(model) is not None:
        schemes = {name: scheme for name, scheme in schemes.items() if not scheme.weights}
    weights = rounded_weights(model) if any(scheme.weights for scheme in schemes.values()) else []
    sites = _sites(model)
    parts = [
        _effects_on(model, rows, sites, schemes, weights) for rows in progress_bar(_batches(model, prompts), "rounding")
    ]
    values = {key: torch.cat([part[key] for part in parts]).double().numpy() for key in parts[0]}
    local, logits, loss = ({name: values[what, name] for what, name in values if what == kind} for kind in _MEASURED)
    return Int8Effects(sites, local, values["peak", ""], logits, loss, values["exact loss", ""])


@torch.no_grad()
def calibrated(model: HookedModel, prompts: PromptSet) -> Calibration:
    """Measure the largest magnitudes in an exact pass over calibration rows.

    Args:
        model: the model.
        prompts: the calibration rows.
    """
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
    model: HookedModel, prompts: PromptSet, calibration: Calibration, draws: int = 8
) -> dict[int, dict[str, Float[np.ndarray, " draw"]]]:
    """Measure the errors of static scales from 4, 16, 64 … random calibration rows, mean over the prompts.

    Args:
        model: the model.
        prompts: prompts to measure on.
        calibration: the largest magnitudes in all calibration rows.
        draws: number of draws for each number of rows.

    Returns:
        By the number of rows: errors with P0 included, errors with P0 kept, and the ratio of the latter to the former.
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
    by_count = {}
    for count in counts:
        of_count = {
            name: np.array([errors[count, draw, name] for draw in range(draws)])
            for name in (CALIBRATED, CALIBRATED_P0_KEPT)
        }
        by_count[count] = of_count | {SHARE_LEFT: of_count[CALIBRATED_P0_KEPT] / of_count[CALIBRATED]}
    return by_count


_MEASURED = ("input", "logits", "loss")


@dataclass(frozen=True)
class _Rows:
    ids: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    p0: Int[Tensor, " batch"]
    another: Int[Tensor, " batch"]

    def position(self, apart: Apart) -> Int[Tensor, " batch"]:
        return self.p0 if apart == "P0" else self.another

    def without(self, apart: Apart) -> Bool[Tensor, "batch pos"]:
        """The positions that are not padding, without one."""
        return self.real & ~one_hot(self.position(apart), self.ids.shape[1]).bool()

    @property
    def counted(self) -> Bool[Tensor, "batch pos"]:
        """The positions that errors are about."""
        return self.without("P0") & self.without("another")

    def rounded(self, site: Site, x: Tensor, scheme: Scheme) -> Tensor:
        counted = self.real if scheme.treatment == "in" else self.without(scheme.apart)
        largest = scheme.grid[site] if isinstance(scheme.grid, Mapping) else largest_in_row(x, counted)
        return quantised(x, largest, self.position(scheme.apart), scheme.treatment, scheme.grid == "token")


def _batches(model: HookedModel, prompts: PromptSet) -> list[_Rows]:
    """The prompts in batches, with a control drawn for each row.

    Raises:
        NotApplicable: see `int8_effects`.
    """
    shortest = int(prompts.attention_mask.sum(1).min())
    if shortest < 4:
        raise NotApplicable(f"needs rows of at least 4 tokens, got one of {shortest}")
    another = prompts.p0 + random_offsets(prompts.n, prompts.seed + 1, 1, shortest)
    # Half of the usual batch: the exact logits and those of a scheme are in memory at once.
    size, device = max(1, batch_size_for(model, prompts.length, with_logits=True) // 2), device_of(model)
    tensors = (part.to(device) for part in (prompts.ids, prompts.attention_mask, prompts.p0, another))
    return [_Rows(*parts) for parts in zip(*(part.split(size) for part in tensors), strict=True)]


def _sites(model: HookedModel) -> tuple[Site, ...]:
    """The inputs of matrix products, then the stream before each block."""
    return (*input_sites(model), *(Site(block, STREAM) for block in range(describe(model).n_layers)))


def _of_products(errors: Float[np.ndarray, "sample site"], sites: Sequence[Site]) -> Float[np.ndarray, " sample"]:
    """The mean over the inputs of matrix products."""
    return errors[:, [site.kind != STREAM for site in sites]].mean(1)


def _exact(model: HookedModel, rows: _Rows, sites: Sequence[Site], look: Callable[[Site, Tensor], None]) -> Tensor:
    """The logits of a pass in which `look` reads every input of a matrix product, and the stream before each block."""

    def at_hook(x: Tensor, hook: object, site: Site) -> None:
        look(site, x)

    streams = [
        (f"blocks.{site.block}.hook_resid_pre", functools.partial(at_hook, site=site))
        for site in sites
        if site.kind == STREAM
    ]
    with on_inputs(model, look):
        return forward(model, rows.ids, rows.real, hooks=streams)


def _errors_on(
    model: HookedModel, rows: _Rows, sites: Sequence[Site], schemes: Mapping[Any, Scheme]
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
    model: HookedModel, rows: _Rows, sites: Sequence[Site], schemes: Mapping[str, Scheme], weights: list[Rounded]
) -> dict[tuple[str, str], Tensor]:
    """Everything measured on a batch, by kind and scheme, the first axis being the row."""
    on_inputs_alone = {name: scheme for name, scheme in schemes.items() if scheme.grid and not scheme.weights}
    exact, values = _errors_on(model, rows, sites, on_inputs_alone)
    values["exact loss", ""] = exact_loss = _loss(exact, rows)
    for name, scheme in schemes.items():
        with contextlib.ExitStack() as stack:
            if scheme.weights:
                stack.enter_context(with_weights(weights))
            if scheme.grid:
                stack.enter_context(on_inputs(model, functools.partial(rows.rounded, scheme=scheme)))
            logits = forward(model, rows.ids, rows.real)
        values["logits", name] = _logit_error(logits, exact, rows)
        values["loss", name] = _loss(logits, rows) - exact_loss
    return values


def _error(new: Tensor, x: Tensor, rows: _Rows) -> Float[Tensor, " batch"]:
    return _relative(new - x, x, rows.counted).cpu()


def _relative(
    change: Float[Tensor, "batch pos *value"], x: Float[Tensor, "batch pos *value"], counted: Bool[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    def size(values: Tensor) -> Tensor:
        return (values.float().square().flatten(2).sum(2) * counted.to(x.device)).sum(1).sqrt()

    norm = size(x)
    # Zeros are rounded without error.
    return torch.where(norm > 0, size(change) / norm, 0)


def _peak(x: Tensor, rows: _Rows) -> Float[Tensor, " batch"]:
    sizes = magnitudes(x).float().cpu()
    others = sizes.masked_fill(~rows.counted.cpu(), 0).amax(1)
    p0 = sizes.gather(1, rows.p0.cpu()[:, None])[:, 0]
    return torch.where(others > 0, p0 / others, 1)


def _logit_error(new: Tensor, exact: Tensor, rows: _Rows) -> Float[Tensor, " batch"]:
    def centred(logits: Tensor) -> Tensor:
        return logits.float() - logits.float().mean(-1, keepdim=True)

    # Row by row: the logits of a whole batch in float32 may not fit in memory.
    errors = []
    for one, other, counted in zip(new.split(1), exact.split(1), rows.counted.split(1), strict=True):
        errors.append(_relative(centred(one) - centred(other), centred(other), counted).cpu())
    return torch.cat(errors)


def _loss(logits: Tensor, rows: _Rows) -> Float[Tensor, " batch"]:
    batch = Batch(*(part.to(logits.device) for part in (rows.ids, rows.real, rows.p0)))
    losses = TOKEN_LOSSES.reduce(logits, batch).cpu()
    counted = rows.counted[:, :-1].cpu()
    return losses.masked_fill(~counted, 0).sum(1) / counted.sum(1)
