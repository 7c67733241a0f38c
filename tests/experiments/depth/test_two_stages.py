"""The locator finds what is true of the two-stage model by construction."""

from __future__ import annotations

import numpy as np
import pytest

from p0circuit.experiments.depth.c22_recognised_again import RecognisedAgain
from p0circuit.experiments.depth.c25_one_circuit import OneCircuit
from p0circuit.experiments.depth.locator import locate
from p0circuit.experiments.depth.writers import find_roles
from p0circuit.interventions.nodes import components
from p0circuit.interventions.pairs import values_at
from p0circuit.models import load_model
from p0circuit.models.constructed.two_stages import TwoStagesTruth
from p0circuit.prompts import random_tokens
from p0circuit.sink import uniform_excess

TRUTH = TwoStagesTruth()
# What the eraser leaves of the first direction is below a tenth of the second stage's length.
TOLERANCE = 0.1


@pytest.fixture(scope="module")
def model():
    return load_model("wired-two-stages")


@pytest.fixture(scope="module")
def prompts():
    return random_tokens(64, n=16, length=32)


@pytest.fixture(scope="module")
def located(model, prompts):
    return locate(model, prompts)


def test_stages_depth_and_readers_are_those_of_the_construction(located):
    assert [(stage.first, stage.last) for stage in located.stages] == list(TRUTH.stages)
    assert [stage.heads for stage in located.stages] == list(TRUTH.sink_heads)
    assert located.depth_of() == TRUTH.circuit_depth
    assert located.stages[0].direction @ located.stages[1].direction == pytest.approx(TRUTH.cosine, abs=TOLERANCE)


def test_writers_and_erasers_are_found_down_to_the_neuron(model, located):
    roles = find_roles(model, located.pair, located.stages)
    for number, (layer, index) in enumerate(TRUTH.writers, 1):
        writers = [role for role in roles if (role.stage, role.role) == (number, "writer")]
        strongest = max(writers, key=lambda role: role.effect.value)
        assert (strongest.node, strongest.neurons) == (f"mlp.{layer}", (f"neuron.{layer}.{index}",))
        assert strongest.effect.low > 0.9
    erasers = [role for role in roles if role.role == "eraser" and role.effect.low > 0.5]
    assert [(role.stage, role.node) for role in erasers] == [(1, f"mlp.{TRUTH.erasers[0][0]}")]


def test_what_is_written_along_a_stage_ranks_its_writer_first_and_its_eraser_last(model, located):
    nodes = components(model)
    values = values_at(model, located.pair.clean, nodes)
    for number, stage in enumerate(located.stages):
        along = {str(node): float(values[node].double().numpy().mean(0) @ stage.direction) for node in nodes}
        order = sorted(along, key=lambda node: -along[node])
        assert order[0] == f"mlp.{TRUTH.writers[number][0]}"
        if number < len(TRUTH.erasers):
            assert order[-1] == f"mlp.{TRUTH.erasers[number][0]}"


def test_nothing_is_left_without_recognition_in_block_0_and_nothing_is_rebuilt(model, prompts, located):
    # Uniform attention is what is left where the sink is gone: its excess score is known.
    gone = uniform_excess(prompts.length) / located.sink.excess.value
    for block in range(5):
        assert located.left("stream", block).value == pytest.approx(gone, abs=1e-3)
    alone = [located.left("mixed_but_in", block).value for block in range(6)]
    assert alone == pytest.approx([1, *[gone] * 5], abs=1e-3)
    result = RecognisedAgain().run(model, prompts)
    assert result.judgement is not None and result.judgement.verdict == "not reproduced"
    assert result.metrics["rebuilt_by_later_recognition"].high < 0.05


def test_two_directions_are_not_one_circuit(model, prompts):
    result = OneCircuit().run(model, prompts)
    assert result.judgement is not None and result.judgement.verdict == "not reproduced"
    assert np.isclose(result.metrics["cosine_of_first_and_last_stage"].value, TRUTH.cosine, atol=TOLERANCE)
