"""The sink of a model in a dozen numbers: what `p0circuit sink` prints."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from p0circuit import sink
from p0circuit.experiments.base import NotApplicable, mean_over_samples
from p0circuit.experiments.conditions import with_and_without_bos
from p0circuit.experiments.sink_under_study import studied_sink
from p0circuit.hooked_model import HookedModel
from p0circuit.models import describe
from p0circuit.prompts import WITH_BOS, WITHOUT_BOS, PromptSet, condition_of
from p0circuit.recording.quantities import NORM_RATIO, SINK_SCORE, residual_at
from p0circuit.recording.record import record

PROBED = 32
"""Prompts on which it is seen what a model would do after BOS."""


def sink_summary(model: HookedModel, prompts: PromptSet, bos: bool) -> dict[str, Any]:
    """Means over samples, ready for JSON.

    Keys: model, quantisation (None for plain weights), backend, n, length, bos, condition (what the rows begin with),
    uniform_score (what attention spread evenly would score on prompts of this length), sink_rate,
    sink_rate_from_layer_2 (None in models of one or two layers; both None where uniform attention is above the
    threshold, too, and a rate means nothing), sink_score [layers][heads], norm_ratio [layers + 1] and
    direction_consistency [layers + 1] of the residual before each block and at the end.
    """
    info = describe(model)
    recording = record(model, prompts, [SINK_SCORE, NORM_RATIO, residual_at()])
    scores = recording[SINK_SCORE]
    return {
        "model": info.name,
        "quantisation": info.quantisation,
        "backend": info.backend,
        "n": prompts.n,
        "length": prompts.length,
        "bos": bos,
        "condition": condition_of(model, prompts),
        "uniform_score": sink.uniform_score(prompts.length),
        **sink_rates(scores, prompts.length),
        "sink_score": mean_over_samples(scores).tolist(),
        "norm_ratio": mean_over_samples(recording[NORM_RATIO]).tolist(),
        "direction_consistency": mean_over_samples(sink.direction_cosines(recording[residual_at()])).tolist(),
    }


def sink_rates(scores: Float[Tensor, "sample layer head"], length: int) -> dict[str, float | None]:
    """The sink rate of all layers, and from layer 2 on; None where it means nothing or there are no such layers."""
    if length < sink.shortest_for():
        return {"sink_rate": None, "sink_rate_from_layer_2": None}
    later = float(sink.sink_rate(scores, from_layer=2).mean()) if scores.shape[1] > 2 else None
    return {"sink_rate": float(sink.sink_rate(scores).mean()), "sink_rate_from_layer_2": later}


def after_bos(model: HookedModel, prompts: PromptSet) -> dict[str, Any] | None:
    """The sink rates that a model without a sink on these prompts has after BOS, on the first `PROBED` of them.

    Keys: n, sink_rate, sink_rate_from_layer_2. None if the prompts begin with BOS or there is no BOS token, if there is
    a sink without BOS, or if there is none after BOS either.
    """
    if condition_of(model, prompts) != WITHOUT_BOS:
        return None
    sets = with_and_without_bos(model, prompts.subset(slice(0, PROBED)))
    if WITH_BOS not in sets or _has_sink(model, sets[WITHOUT_BOS]) or not _has_sink(model, sets[WITH_BOS]):
        return None
    rows = sets[WITH_BOS]
    return {"n": rows.n, **sink_rates(record(model, rows, SINK_SCORE), rows.length)}


def _has_sink(model: HookedModel, prompts: PromptSet) -> bool:
    try:
        studied_sink(model, prompts)
    except NotApplicable:
        return False
    return True
