"""Rows recorded once serve every subset of the prompts, and never anything that they are not values of."""

from __future__ import annotations

import pytest
import torch

from p0circuit.experiments.paper.c12_function import relative_change_after
from p0circuit.interventions.ablation import ablate
from p0circuit.models import describe, load_model
from p0circuit.models.passes import count_passes
from p0circuit.prompts import random_tokens
from p0circuit.recording.memory import RowMemory, remember_rows
from p0circuit.recording.quantities import NORM_RATIO, SINK_SCORE, residual_at, score_at
from p0circuit.recording.record import record


@pytest.fixture(scope="module")
def model():
    return load_model("p0-nano")


@pytest.fixture(scope="module")
def prompts():
    return random_tokens(1024, n=12, length=20)


def passes(count, prompts, model):
    return count.passes(prompts.n, prompts.length, describe(model).n_layers)


def test_halves_and_subsets_come_from_the_whole(model, prompts):
    what = [SINK_SCORE, score_at(8), NORM_RATIO, residual_at()]
    with remember_rows():
        record(model, prompts, what)
        with count_passes() as count:
            parts = [*prompts.split(), prompts.subset([7, 2, 2]), prompts.subset(slice(0, 1))]
            shared = [record(model, part, what) for part in parts]
    assert count.token_blocks == 0
    for part, recording in zip(parts, shared, strict=True):
        # The slow twin: the part recorded by itself.
        alone = record(model, part, what, cache=None)
        for quantity in what:
            torch.testing.assert_close(recording[quantity], alone[quantity], rtol=1e-5, atol=1e-6)


def test_parts_that_were_recorded_make_up_the_whole(model, prompts):
    with remember_rows():
        for half in prompts.split():
            record(model, half, SINK_SCORE)
        with count_passes() as count:
            whole = record(model, prompts, SINK_SCORE)
    assert count.token_blocks == 0
    torch.testing.assert_close(whole, record(model, prompts, SINK_SCORE, cache=None))


def test_interventions_other_weights_and_other_quantities_are_recorded_anew(model, prompts):
    half = prompts.split()[0]
    with remember_rows():
        clean = record(model, prompts, SINK_SCORE)
        with count_passes() as count:
            changed = record(model, half, SINK_SCORE, interventions=[ablate(model, half, ["mlp.0"])])
            record(model, half, score_at(3))
        assert passes(count, prompts, model) == pytest.approx(1.0)
        assert not torch.allclose(changed, record(model, half, SINK_SCORE), atol=1e-3)
        other = load_model("p0-nano", checkpoint=0)
        assert not torch.allclose(record(other, prompts, SINK_SCORE), clean, atol=1e-3)
    # Outside there is no memory: the half is recorded.
    with count_passes() as count:
        record(model, half, SINK_SCORE)
    assert passes(count, prompts, model) == pytest.approx(0.5)


def test_what_depends_on_the_rows_beside_is_never_taken_apart(model, prompts):
    quantity = relative_change_after(10)
    with remember_rows() as memory:
        record(model, prompts, quantity)
        assert not memory.rows
        with count_passes() as count:
            record(model, prompts.subset([0, 3]), quantity)
    assert count.token_blocks > 0


def test_one_memory_serves_nested_runs_and_ends_with_the_outermost(model, prompts):
    with remember_rows() as outer:
        with remember_rows() as inner:
            assert inner is outer
            record(model, prompts, SINK_SCORE)
        assert outer.held > 0
    with remember_rows() as later:
        assert later is not outer and later.held == 0


def test_a_full_memory_takes_nothing_more():
    memory = RowMemory(limit=100)
    memory.write("key", ["a", "b"], torch.ones(2, 10))
    memory.write("key", ["c", "d"], torch.ones(2, 10))
    assert memory.read("key", ["a", "b"]) is not None and memory.read("key", ["a", "c"]) is None and memory.held == 80
