"""The curves of the depth locator, against one full run with an intervention for each of their points."""

from __future__ import annotations

import pytest
import torch

from p0circuit.experiments.depth.curves import CURVES, measure_curves, passes_of_curves, shifted_values
from p0circuit.experiments.sink_under_study import excess_by_head
from p0circuit.interventions.ablation import ablate
from p0circuit.interventions.nodes import Node
from p0circuit.interventions.pairs import shifted_pair
from p0circuit.models import describe, load_model
from p0circuit.models.passes import count_passes
from p0circuit.prompts import random_tokens


@pytest.fixture(scope="module", params=["p0-nano", "wired-learned"])
def model(request):
    return load_model(request.param)


def literal(model, pair, values, curve, block):
    """The excess scores with every value put in by an intervention on a full run."""
    layers = range(describe(model).n_layers)
    mixed = {
        "mixed_from": [layer for layer in layers if layer >= block],
        "mixed_up_to": [layer for layer in layers if layer <= block],
        "mixed_in": [block],
        "mixed_but_in": [layer for layer in layers if layer != block],
    }
    if curve == "stream":
        changes = [ablate(model, pair.clean, [Node("resid_post", block)], values.stream[:, block])]
    else:
        nodes = {Node("attn", layer): values.attention[:, layer] for layer in mixed[curve]}
        changes = [ablate(model, pair.clean, list(nodes), nodes)] if nodes else []
    return excess_by_head(model, pair.clean, changes)[0]


@pytest.mark.parametrize("padded", [False, True])
def test_every_point_is_that_of_a_full_run_with_an_intervention(model, padded):
    prompts = random_tokens(64, n=5, length=20)
    prompts = prompts.pad_left([20, 14, 20, 17, 12]) if padded else prompts
    pair = shifted_pair(model, prompts, 4)
    curves, values = measure_curves(model, pair), shifted_values(model, pair)
    torch.testing.assert_close(curves.clean.double(), excess_by_head(model, prompts)[0].double(), atol=1e-5, rtol=0)
    for name in CURVES:
        for block, run in enumerate(getattr(curves, name)):
            expected = literal(model, pair, values, name, block).double()
            assert float((run.double() - expected).abs().max()) < 1e-5, (name, block)


def test_the_passes_are_those_said(model):
    prompts = random_tokens(64, n=4, length=24)
    pair = shifted_pair(model, prompts, 4)
    layers = describe(model).n_layers
    for chosen in (CURVES, ("stream",), ("mixed_from", "mixed_in")):
        with count_passes() as count:
            measure_curves(model, pair, chosen)
        assert count.passes(prompts.n, prompts.length, layers) == pytest.approx(
            passes_of_curves(layers, chosen), rel=0.25
        )
