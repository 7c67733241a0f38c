"""Every experiment takes as many passes as it declares, to 25 %; the clean recording stands apart."""

from __future__ import annotations

import pytest

from p0circuit.experiments import EXPERIMENTS
from p0circuit.experiments.base import NotApplicable, is_large
from p0circuit.experiments.clean_recording import CLEAN_PASSES, record_clean
from p0circuit.experiments.conditions import prompts_for
from p0circuit.models import describe, load_model
from p0circuit.models.passes import count_passes
from p0circuit.recording.memory import remember_rows

TOLERANCE = 0.25
NEXT_TO_NOTHING = 0.1
"""Passes: below this, what is declared and what is used may differ by any factor."""
FEW = 32


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_declared_is_used(experiment):
    model = load_model("p0-nano")
    prompts = prompts_for(model, None, FEW, 64)
    with remember_rows():
        record_clean(model, prompts)
        check(EXPERIMENTS[experiment](), model, prompts)


def test_experts(tmp_path):
    model = load_model("moe-0")
    prompts = prompts_for(model, None, FEW, 64)
    check(EXPERIMENTS["experts"](), model, prompts)


def test_the_clean_recording_takes_two_passes():
    model = load_model("p0-nano")
    prompts = prompts_for(model, None, 8, 48)
    with count_passes() as count, remember_rows():
        record_clean(model, prompts)
    assert count.passes(8, 48, describe(model).n_layers) == CLEAN_PASSES


@pytest.mark.parametrize("experiment", ["recognition", "key-side", "direction-or-norm"])
def test_a_quick_run_of_a_real_model(smollm2, experiment):
    prompts = prompts_for(smollm2, None, 16, 64)
    info = describe(smollm2)
    chosen = EXPERIMENTS[experiment]()
    assert is_large(info) and chosen.quick(info).passes(smollm2, prompts) <= chosen.passes(smollm2, prompts)
    with remember_rows():
        record_clean(smollm2, prompts)
        check(chosen.quick(info), smollm2, prompts)


def check(experiment, model, prompts):
    try:
        passes = experiment.run(model, prompts).provenance["passes"]
    except NotApplicable as reason:
        pytest.skip(f"{experiment.id}: {reason}")
    difference = abs(passes["declared"] - passes["used"])
    assert difference <= max(TOLERANCE * passes["used"], NEXT_TO_NOTHING), passes
