"""Amplification: the wired detector and sink neuron are found; projections and experts add up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from p0circuit import sink
from p0circuit.experiments import NotApplicable
from p0circuit.experiments.paper.c06_amplification import (
    Amplification,
    AmplificationConfig,
    first_two_tokens,
    projections,
    share_carried,
)
from p0circuit.experiments.sink_under_study import excess_scores, studied_sink
from p0circuit.interventions.experts import experts_at_p0
from p0circuit.interventions.nodes import Node
from p0circuit.interventions.pairs import patch_values, shift_prompts
from p0circuit.models import forward, load_model
from p0circuit.models.constructed.build import wired_model
from p0circuit.models.constructed.truth import wired_truth
from p0circuit.prompts import random_tokens
from p0circuit.results import Result
from p0circuit.sink import uniform_excess
from tests.literal import run_with_cache

LENGTH = 32
QUICK = AmplificationConfig(draws=20, draw_samples=4, singles=3, single_samples=8)


@pytest.fixture(scope="module")
def result() -> Result:
    return Amplification(QUICK).run(wired_model(), random_tokens(64, n=24, length=LENGTH))


def excess_kept(length: int) -> float:
    """The excess score of the wired sink heads: of P0, minus what position 8 has of the rest."""
    truth = wired_truth()
    kept = truth.sink_scores(length)
    beside = [sum(1 / (math.exp(s) + t) for t in range(8, length)) / (length - 8) for s in truth.sink_strengths]
    return float(np.mean(kept) - np.mean(beside))


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_the_wired_neurons_are_found_and_carry_the_sink(positions: Any) -> None:
    result = Amplification(QUICK).run(wired_model(positions), random_tokens(64, n=24, length=LENGTH))
    assert result.judgement is not None and result.judgement.verdict == "reproduced"
    truth = wired_truth()
    expected = {f"neuron.{layer}.{index}" for layer, index in (*truth.detector_neurons, *truth.sink_neurons)}
    # 1 % of 256 neurons are two.
    neurons = result.tables["neurons"]
    assert set(neurons["neuron"][:2]) == expected
    assert (neurons["change_of_projection"][2:] > -1).all() and (neurons["change_of_projection"][:2] < -50).all()
    # Without them attention is uniform, and what is left is what uniform attention has.
    carried = 1 - uniform_excess(LENGTH) / excess_kept(LENGTH)
    for name in ("the_top_neurons", "mlp_0", "mlp_1"):
        assert result.metrics[f"excess_carried_by_{name}"].value == pytest.approx(carried, abs=2e-3)
    np.testing.assert_allclose(neurons["excess_carried_alone"][:2], carried, atol=2e-3)
    assert abs(neurons["excess_carried_alone"][2]) < 1e-3
    assert result.metrics["excess_carried_by_the_top_neurons_at_position_8"].value == pytest.approx(0, abs=1e-4)
    assert result.metrics["share_of_mlp_1"].value > 0.99
    assert result.metrics["share_of_mlps_0_and_1"].value == pytest.approx(1, abs=1e-3)


def test_one_neuron_is_half_the_circuit_and_the_rest_adds_nothing(result: Result) -> None:
    table = result.tables["by_number"].set_index("neurons")["excess_carried"]
    assert table[1] == pytest.approx(table[256], abs=1e-3)


def test_random_neurons_carry_what_they_hit(result: Result) -> None:
    interval = result.metrics["excess_carried_by_random_neurons"]
    carried = result.metrics["excess_carried_by_the_top_neurons"].value
    # A group either has one of the two neurons or does nothing, and no neuron is in two groups.
    hits = interval.value * interval.n / carried
    assert interval.n == QUICK.draws and hits == pytest.approx(round(hits), abs=0.01) and hits <= 2


@pytest.mark.parametrize("case", [("qwen2", "hooked"), ("neox", "bridge"), ("olmo2", "hooked"), ("gpt2", "bridge")])
def test_projections_add_up(family_model: Callable[[str, str], Any], case: tuple[str, str]) -> None:
    model, layer = family_model(*case), 2
    prompts = random_tokens(96, n=3, length=8)
    direction = torch.nn.functional.normalize(torch.randn(32), dim=0)
    writers, total = projections(model, prompts, direction, layer)
    assert list(writers) == ["embed", "attn.0", "mlp.0", "attn.1", "mlp.1"]
    np.testing.assert_allclose(sum(writers.values()), total, rtol=1e-4, atol=1e-4)
    for row, ids in enumerate(prompts.ids):
        _, cache = run_with_cache(model, ids)
        stream = cache["blocks.2.hook_resid_pre"][0, 0]
        assert float(stream @ direction) == pytest.approx(total[row], rel=1e-4, abs=1e-4)
        written = cache["blocks.1.hook_mlp_out"][0, 0]
        assert float(written @ direction) == pytest.approx(writers["mlp.1"][row], rel=1e-4, abs=1e-4)


def test_what_follows_a_token_makes_no_difference_to_its_new_value(family_model: Callable[[str, str], Any]) -> None:
    model, prompts = family_model("qwen2", "hooked"), random_tokens(96, n=3, length=8)
    nodes = [Node("mlp", 1), Node("neuron", 0, 5)]
    long, short = (patch_values(model, shift_prompts(p, 4, 96, 3), nodes) for p in (prompts, first_two_tokens(prompts)))
    for node in nodes:
        torch.testing.assert_close(short[node], long[node], rtol=1e-4, atol=1e-5)


def test_two_tokens_of_padded_rows() -> None:
    prompts = random_tokens(96, n=2, length=6).pad_left([3, 5])
    short = first_two_tokens(prompts)
    assert short.ids.tolist() == [prompts.ids[0, 3:5].tolist(), prompts.ids[1, 1:3].tolist()]
    assert bool(short.attention_mask.all())


def test_the_share_carried_against_an_edit_by_hand() -> None:
    model = wired_model()
    found = studied_sink(model, random_tokens(64, n=8, length=16))
    node = Node("mlp", 1)
    clean = excess_scores(model, found.prompts, found.heads)

    def edit(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        activation[:, 0] = 0
        return activation

    with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", edit)]):
        left = excess_scores(model, found.prompts, found.heads)
    carried = share_carried(found, [node], {node: torch.zeros(found.prompts.n, 160)})
    assert carried.value == pytest.approx(1 - left.mean() / clean.mean(), abs=1e-6)


@pytest.mark.parametrize(
    "case", [("mixtral", "hooked"), ("mixtral", "bridge"), ("qwen3-moe", "bridge"), ("olmoe", "bridge")]
)
@pytest.mark.parametrize("layer", [0, 1])
def test_experts_add_up_to_their_mlp(
    family_model: Callable[[str, str], Any], case: tuple[str, str], layer: int
) -> None:
    model, prompts = family_model(*case), random_tokens(96, n=6, length=5)
    found = experts_at_p0(model, prompts, layer)
    assert found is not None
    seen: list[torch.Tensor] = []
    hook = (f"blocks.{layer}.hook_mlp_out", lambda activation, hook: seen.append(activation[:, 0].clone()))
    with torch.no_grad():
        forward(model, prompts.ids, hooks=[hook], stop_at_layer=layer + 1)
    torch.testing.assert_close(found.written.sum(1), seen[0], rtol=1e-4, atol=1e-5)
    # Two experts of four for every row, and nothing from the others.
    assert (found.weights > 0).sum(1).tolist() == [2] * 6 and found.weights.shape == (6, 4)
    torch.testing.assert_close(found.written.norm(dim=-1) > 0, found.weights > 0)


def test_both_backends_route_alike(family_model: Callable[[str, str], Any]) -> None:
    prompts = random_tokens(96, n=6, length=5)
    hooked, bridge = (experts_at_p0(family_model("mixtral", backend), prompts, 1) for backend in ("hooked", "bridge"))
    assert hooked is not None and bridge is not None
    torch.testing.assert_close(hooked.weights, bridge.weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hooked.written, bridge.written, rtol=1e-4, atol=1e-5)


def test_a_dense_mlp_has_no_experts(family_model: Callable[[str, str], Any]) -> None:
    for backend in ("hooked", "bridge"):
        assert experts_at_p0(family_model("llama", backend), random_tokens(96, n=2, length=4), 0) is None


def test_a_mixture_has_a_table_of_experts_and_no_neurons(
    family_model: Callable[[str, str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Random weights have no sink; what is measured on them has to be right all the same.
    monkeypatch.setattr(sink, "TIMES_UNIFORM", -1e9)
    model, prompts = family_model("qwen3-moe", "bridge"), random_tokens(96, n=8, length=12)
    result = Amplification(QUICK).run(model, prompts)
    assert result.judgement is not None and "neurons" not in result.judgement.reason
    assert "neurons" not in result.tables and not any("neurons" in name for name in result.metrics)
    table = result.tables["experts"]
    assert [table.loc[table["block"] == block, "routed"].sum() for block in (0, 1)] == pytest.approx([2, 2])

    # Taking an expert away is taking what it writes away, at P0, where it is chosen.
    line = table.iloc[0]
    found = studied_sink(model, prompts)
    experts = experts_at_p0(model, found.prompts, int(line["block"]))
    assert experts is not None

    def edit(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        activation[:, 0] -= experts.written[:, int(line["expert"])]
        return activation

    clean = excess_scores(model, found.prompts, found.heads)
    with model.hooks(fwd_hooks=[(f"blocks.{int(line['block'])}.hook_mlp_out", edit)]):
        left = excess_scores(model, found.prompts, found.heads)
    assert line["excess_carried"] == pytest.approx(1 - left.mean() / clean.mean(), abs=1e-5)


@pytest.mark.parametrize(("name", "checkpoint"), [("wired-decoy", None), ("p0-nano", 0)])
def test_without_a_sink_there_is_nothing_to_amplify(name: str, checkpoint: int | None) -> None:
    with pytest.raises(NotApplicable, match="no sink to explain"):
        Amplification().run(load_model(name, checkpoint=checkpoint), random_tokens(64, n=8, length=LENGTH))


def test_the_figure(result: Result) -> None:
    figure: Any = result.figures["writers"]
    assert figure.get_suptitle() == "wired: who writes the P0 direction"
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()][-2:] == ["random\n1 %", "top,\nat 8"]
