"""Cache reads: everything that `record` and `cached` read or compute has its name in the open blocks."""

from __future__ import annotations

import torch

from p0circuit.interventions.ablation import ablate
from p0circuit.models.constructed.build import wired_model
from p0circuit.models.constructed.weights import VOCABULARY
from p0circuit.prompts import random_tokens
from p0circuit.recording.cache_reads import note_cache_reads
from p0circuit.recording.quantities import NORM_RATIO, SINK_SCORE
from p0circuit.recording.record import cached, record


def test_first_computed_then_read() -> None:
    model, prompts = wired_model(), random_tokens(VOCABULARY, n=4, length=12)
    names = {"text/sink_score", "text/norm_ratio"}
    with note_cache_reads() as first:
        record(model, prompts, [SINK_SCORE, NORM_RATIO], condition="text")
    with note_cache_reads() as second:
        record(model, prompts, [SINK_SCORE, NORM_RATIO], condition="text")
    assert (first.computed, first.cached) == (names, set())
    assert (second.computed, second.cached) == (set(), names)


def test_without_a_condition_the_fingerprint_names_the_prompts() -> None:
    model, prompts = wired_model(), random_tokens(VOCABULARY, n=4, length=12)
    with note_cache_reads() as reads:
        record(model, prompts, SINK_SCORE)
        cached(model, prompts, "zeros", lambda: torch.zeros(2))
    start = prompts.fingerprint()[:12]
    assert reads.computed == {f"{start}/sink_score", f"{start}/zeros"}
    with note_cache_reads() as reads:
        cached(model, prompts, "zeros", lambda: torch.zeros(2))
    assert reads.cached == {f"{start}/zeros"}


def test_what_never_touches_the_cache_is_left_out() -> None:
    model, prompts = wired_model(), random_tokens(VOCABULARY, n=4, length=12)
    cut = ablate(model, prompts, ["mlp.0"])
    with note_cache_reads() as reads:
        record(model, prompts, SINK_SCORE, cache=None)
        record(model, prompts, SINK_SCORE, interventions=[cut])
        with cut:
            record(model, prompts, SINK_SCORE)
            cached(model, prompts, "zeros", lambda: torch.zeros(2))
    assert not reads.cached and not reads.computed


def test_blocks_nest() -> None:
    model, prompts = wired_model(), random_tokens(VOCABULARY, n=4, length=12)
    with note_cache_reads() as outer:
        with note_cache_reads() as inner:
            record(model, prompts, SINK_SCORE, condition="inside")
        record(model, prompts, NORM_RATIO, condition="outside")
    record(model, prompts, NORM_RATIO, condition="after")
    assert inner.computed == {"inside/sink_score"}
    assert outer.computed == {"inside/sink_score", "outside/norm_ratio"} and not outer.cached
