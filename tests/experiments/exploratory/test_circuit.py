"""The circuit experiment recovers what is known by construction, and something sensible from a trained model."""

from __future__ import annotations

import pytest
import torch

from p0circuit.experiments.exploratory.circuit import Circuit, CircuitConfig
from p0circuit.experiments.sink_under_study import studied_sink
from p0circuit.models import describe, load_model
from p0circuit.models.constructed.build import decoy_model, wired_model
from p0circuit.models.constructed.truth import wired_truth
from p0circuit.models.passes import count_passes
from p0circuit.prompts import natural_text, random_tokens
from p0circuit.sink import any_sink_head, sink_heads


def auroc(positive: list[float], negative: list[float]) -> float:
    """The share of pairs in which the positive is the larger, ties counted half."""
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_the_wired_circuit_is_recovered_edge_by_edge(positions):
    truth = wired_truth()
    result = Circuit(CircuitConfig(samples=6)).run(wired_model(positions), random_tokens(64, n=12, length=24))
    edges = result.tables["edges"]
    real = [pair in truth.edges for pair in zip(edges["sender"], edges["receiver"], strict=True)]
    sizes = edges["effect"].abs()
    assert auroc(sizes[real].tolist(), sizes[[not it for it in real]].tolist()) == 1.0
    arrows = {tuple(note.split(":")[0].split(" -> ")) for note in result.notes if " -> " in note}
    assert arrows == {edge for edge in truth.edges if not edge[0].startswith("neuron")}
    assert result.notes[0] == "sink heads: attn.2.0, attn.2.2, attn.2.3"
    assert "closed form" in result.notes[1]


def test_the_decoy_has_no_circuit():
    """High norm at P0, but nothing reads it: no edge changes the score of the heads that stand in for sink heads."""
    result = Circuit(CircuitConfig(samples=6)).run(decoy_model(), random_tokens(64, n=12, length=24))
    assert "none is above the threshold" in result.notes[0]
    assert not any(" -> " in note for note in result.notes)


def test_the_circuit_of_p0_nano_runs_from_block_0_through_mlps_into_k():
    model = load_model("p0-nano")
    prompts = natural_text(model, "stdlib", n=24, length=32, first_token="random")
    result = Circuit(CircuitConfig(samples=8)).run(model, prompts)
    arrows = [note.split(":")[0] for note in result.notes if " -> " in note]
    assert "mlp.0 -> mlp.1" in arrows
    assert any(arrow.endswith(".k") for arrow in arrows)
    assert not any(arrow.endswith((".q", ".v")) and arrow.split(" -> ")[1].startswith("attn.3") for arrow in arrows)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_with_too_many_edges_they_are_searched_and_the_wired_circuit_is_the_same(positions):
    config = CircuitConfig(samples=6, most_edges=10, screening_rows=3)
    result = Circuit(config).run(wired_model(positions), random_tokens(64, n=12, length=24))
    arrows = {tuple(note.split(":")[0].split(" -> ")) for note in result.notes if " -> " in note}
    heads = {f"attn.{layer}.{head}" for layer, head in wired_truth().sink_heads}
    truth = {edge for edge in wired_truth().edges if not edge[0].startswith("neuron")}
    # Beside the true edges, the same into the group of the block and into all sink heads.
    groups = {("mlp.1", "attn.2.k"), ("mlp.1", "sink.k")}
    assert arrows == truth | groups
    assert {end for _, end in truth if end.endswith(".k")} == {f"{head}.k" for head in heads}
    assert "searched, coarse to fine" in result.notes[1]
    edges = result.tables["edges"].set_index(["sender", "receiver"])["effect"]
    assert edges["mlp.1", "sink.k"] == pytest.approx(edges["mlp.1", "attn.2.k"], abs=1e-5)
    assert "graph" in result.figures


def test_the_search_finds_what_patching_every_edge_of_p0_nano_finds():
    model = load_model("p0-nano")
    prompts = natural_text(model, "stdlib", n=24, length=32)
    every = Circuit(CircuitConfig(samples=8)).run(model, prompts).tables["edges"]
    config = CircuitConfig(samples=8, most_edges=0, screening_rows=8, budget=30.0)
    search = Circuit(config).run(model, prompts)
    found = search.tables["edges"].set_index(["sender", "receiver"])["effect"]
    least = config.share * search.metrics["sink_score"].value
    exact = every.set_index(["sender", "receiver"])["effect"]
    strong = exact[exact.abs() >= least]
    for (sender, receiver), effect in strong.items():
        if receiver.startswith("mlp"):
            assert found[sender, receiver] == pytest.approx(effect, abs=1e-5), (sender, receiver)
        else:
            # A head is a receiver where its group has the share; what one head has, the group has.
            assert abs(found[sender, f"{receiver[:6]}.{receiver[-1]}"]) >= 0.5 * least, (sender, receiver)
    assert len(strong) >= 5


@pytest.mark.parametrize("most_edges", [0, 2000])
def test_what_it_takes_is_declared(most_edges):
    model = load_model("p0-nano")
    prompts = natural_text(model, "stdlib", n=16, length=64)
    experiment = Circuit(CircuitConfig(most_edges=most_edges, samples=8))
    studied_sink(model, prompts)
    with count_passes() as counted:
        experiment.run(model, prompts)
    assert counted.passes(prompts.n, prompts.length, describe(model).n_layers) == pytest.approx(
        experiment.passes(model, prompts), rel=0.25
    )


def test_sink_heads_are_those_above_the_threshold_or_else_the_highest():
    scores = torch.tensor([[0.1, 0.4], [0.2, 0.35]]).expand(3, 2, 2)
    assert sink_heads(scores) == [(0, 1), (1, 1)] and any_sink_head(scores)
    assert sink_heads(scores, eps=0.9, fallback=2) == [(0, 1), (1, 1)] and not any_sink_head(scores, eps=0.9)
