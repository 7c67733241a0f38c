"""Sink heads and their excess score, against literal arithmetic and the wired model's truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from p0circuit.experiments.base import NotApplicable
from p0circuit.experiments.sink_under_study import excess_scores, head_list, sink_scores, studied_sink
from p0circuit.interventions.attention_edits import mask_key
from p0circuit.models import describe, forward
from p0circuit.models.constructed.build import decoy_model, wired_model
from p0circuit.models.constructed.truth import wired_truth
from p0circuit.prompts import random_tokens
from p0circuit.recording.quantities import SINK_SCORE
from p0circuit.recording.record import record
from p0circuit.sink import uniform_excess


@pytest.fixture(scope="module")
def wired():
    model = wired_model("rotary")
    return model, random_tokens(describe(model).vocab_size, n=24, length=20)


def test_the_wired_heads_are_found_and_measured_on_other_prompts(wired):
    model, prompts = wired
    found = studied_sink(model, prompts)
    assert set(found.heads) == set(wired_truth().sink_heads) and "highest" not in found.note
    assert found.prompts.fingerprint() == prompts.split()[1].fingerprint()
    expected = record(model, found.prompts, SINK_SCORE).double()
    layers, heads = zip(*found.heads, strict=True)
    scores = sink_scores(model, found.prompts, found.heads)
    np.testing.assert_allclose(scores, expected[:, layers, heads].mean(1).numpy(), atol=1e-6)
    excess = excess_scores(model, found.prompts, found.heads)
    np.testing.assert_allclose(excess, scores - sink_scores(model, found.prompts, found.heads, 8), atol=1e-6)
    assert found.excess.value == pytest.approx(excess.mean(), abs=1e-9)
    assert "attn.2" in found.note and "highest" not in found.note


def test_scores_under_an_intervention(wired):
    model, prompts = wired
    heads = wired_truth().sink_heads
    masked = mask_key(model, prompts, [f"attn.{layer}.{head}" for layer, head in heads])
    # What is left is the attention P0 pays to itself, one query of twenty.
    np.testing.assert_allclose(
        sink_scores(model, prompts, heads, interventions=[masked]), np.full(prompts.n, 1 / 20), atol=1e-5
    )


def test_where_there_is_no_sink_there_is_nothing_to_explain():
    model = decoy_model("rotary")
    with pytest.raises(NotApplicable, match="no sink to explain"):
        studied_sink(model, random_tokens(describe(model).vocab_size, n=24, length=20))
    with pytest.raises(NotApplicable, match="too few"):
        studied_sink(model, random_tokens(describe(model).vocab_size, n=24, length=8))


def test_uniform_attention_has_the_excess_it_is_said_to_have(wired):
    model, prompts = wired
    length = prompts.length

    def uniform(pattern: torch.Tensor, hook: object) -> torch.Tensor:
        lower = torch.ones_like(pattern).tril()
        return lower / lower.sum(-1, keepdim=True)

    seen: list[torch.Tensor] = []
    hook = "blocks.0.attn.hook_pattern"
    forward(model, prompts.ids, hooks=[(hook, uniform), (hook, lambda pattern, hook: seen.append(pattern))])
    columns = [sum(float(seen[0][0, 0, i, k]) for i in range(k, length)) / (length - k) for k in (0, 8)]
    assert uniform_excess(length) == pytest.approx(columns[0] - columns[1], abs=1e-6)


def test_few_heads_are_named_and_many_are_counted_by_layer():
    assert head_list([(2, 0), (3, 1)]) == "attn.2.0, attn.3.1"
    many = [(layer, head) for layer in (2, 3, 4, 7) for head in range(4)]
    assert head_list(many) == "16 heads in layers 2 to 4, 7"
