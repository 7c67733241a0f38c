"""The sink of a model in a dozen numbers: what `p0circuit sink` prints."""

from __future__ import annotations

from typing import Any

from p0circuit import sink
from p0circuit.activations import NORM_RATIO, SINK_SCORE, record, residual_at
from p0circuit.experiments.base import mean_over_samples
from p0circuit.models import describe
from p0circuit.prompts import PromptSet


def sink_summary(model: Any, prompts: PromptSet, bos: bool) -> dict[str, Any]:
    """Means over samples, ready for JSON.

    Keys: model, quantisation (None for plain weights), backend, n, length, bos, sink_rate, sink_rate_from_layer_2 (None
    in models of one or two layers), sink_score [layers][heads], norm_ratio [layers + 1] and direction_consistency
    [layers + 1] of the residual before each block and at the end.
    """
    info = describe(model)
    recording = record(model, prompts, [SINK_SCORE, NORM_RATIO, residual_at()])
    scores = recording[SINK_SCORE]
    later = float(sink.sink_rate(scores, from_layer=2).mean()) if info.layers > 2 else None
    return {
        "model": info.name,
        "quantisation": info.quantisation,
        "backend": info.backend,
        "n": prompts.n,
        "length": prompts.length,
        "bos": bos,
        "sink_rate": float(sink.sink_rate(scores).mean()),
        "sink_rate_from_layer_2": later,
        "sink_score": mean_over_samples(scores).tolist(),
        "norm_ratio": mean_over_samples(recording[NORM_RATIO]).tolist(),
        "direction_consistency": mean_over_samples(sink.direction_cosines(recording[residual_at()])).tolist(),
    }
