"""The path: recovered on the wired model with exact scores, joint patches against single rows, and its refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from p0circuit.experiments import NotApplicable
from p0circuit.experiments.measures.joint_patches import JOINT, JOINT_CONTROL, WHOLE_STREAM, joint_changes
from p0circuit.experiments.measures.sink_head_edges import input_shares
from p0circuit.experiments.measures.whole_stream import measured_at_p0
from p0circuit.experiments.paper.c07_causal_path import CausalPath, CausalPathConfig
from p0circuit.experiments.sink_under_study import studied_sink
from p0circuit.interventions.edge_effects import PathEffects
from p0circuit.interventions.metrics import measure, sink_score_of
from p0circuit.interventions.pairs import shift_prompts
from p0circuit.models import describe, forward, load_model
from p0circuit.models.bridge import to_bridge
from p0circuit.models.constructed.build import decoy_model, wired_huggingface, wired_model
from p0circuit.models.constructed.truth import wired_truth
from p0circuit.models.passes import count_passes
from p0circuit.prompts import natural_text, random_tokens
from p0circuit.results import Result
from p0circuit.sink import uniform_excess
from tests.experiments.wired import distinct, embedded_sink, predicted_scores
from tests.families import VOCAB

SHIFTS, LENGTH = (4, 9), 24
QUICK = CausalPathConfig(shifts=SHIFTS, runs=600)


@pytest.fixture(scope="module", params=["rotary", "learned"])
def wired(request: pytest.FixtureRequest) -> Result:
    return CausalPath(QUICK).run(wired_model(request.param), distinct(12, LENGTH))


def test_the_wired_path_is_reproduced_and_the_control_shows_nothing(wired: Result) -> None:
    assert wired.judgement is not None and wired.judgement.verdict == "reproduced"
    for direction in ("noising", "denoising"):
        # Blocks from 2 on write nothing that a sink head reads, so blocks 0-1 are all there is.
        assert wired.metrics[f"share_of_blocks_0_1_in_{direction}"].value == pytest.approx(1, abs=1e-3)
        assert wired.metrics[f"share_of_random_position_in_{direction}"].value == pytest.approx(0, abs=1e-3)
    for kind in ("among_edges_into_sink_heads", "in_total_effect"):
        assert wired.metrics[f"share_of_k_{kind}"].value == pytest.approx(1, abs=1e-3)
        for part in "qv":
            assert wired.metrics[f"share_of_{part}_{kind}"].value == pytest.approx(0, abs=1e-3)
    assert wired.metrics["edges_at_random_position_over_those_at_p0"].value == pytest.approx(0, abs=1e-3)


def test_the_total_effects_are_those_of_the_construction(wired: Result) -> None:
    truth, table = wired_truth(), wired.tables["joint"]
    lost = np.mean(truth.sink_scores(LENGTH)) - truth.uniform_score(LENGTH)
    chosen = distinct(12, LENGTH).split()[1]
    for number, shift in enumerate(SHIFTS):
        whole = table[(table["shift"] == shift) & (table["patched"] == WHOLE_STREAM)].set_index("direction")["change"]
        assert whole["noising"] == pytest.approx(-lost, abs=2e-3)
        # The prefix's own P0 and the patched position share the sink.
        shifted = shift_prompts(chosen, shift, 64, number).shifted.ids
        won = predicted_scores(shifted, shift, also=shift) - predicted_scores(shifted, shift)
        assert whole["denoising"] == pytest.approx(won.mean(), abs=2e-3)


def test_each_necessary_component_is_found_and_no_other(wired: Result) -> None:
    table = wired.tables["components"].set_index(["direction", "node"])["share"]
    for node in ("attn.0", "mlp.0", "mlp.1", "resid_pre.2", "resid_mid.0", "resid_mid.1", "resid_pre.1"):
        assert table["noising", node] == pytest.approx(1, abs=2e-3), node
        assert table["denoising", node] == pytest.approx(1, abs=2e-2), node
    for node in ("embed", "resid_pre.0", "attn.1", "attn.2", "mlp.2", "resid_mid.2"):
        for direction in ("noising", "denoising"):
            assert table[direction, node] == pytest.approx(0, abs=2e-3), node


def test_the_edges_are_recognition_to_amplification_to_keys(wired: Result) -> None:
    edges = wired.tables["edges"]
    found = {(sender, receiver) for sender, receiver, effect in edges.iloc[:, :3].values if abs(effect) > 0.02}
    keys = {("mlp.1", f"attn.{layer}.{head}.k") for layer, head in wired_truth().sink_heads}
    assert found == {("attn.0", "mlp.0"), ("mlp.0", "mlp.1"), *keys}


def test_both_figures_are_drawn_with_labels(wired: Result) -> None:
    maps: Any = wired.figures["components"]
    assert [axis.get_title() for axis in maps.axes[:2]] == ["Noising at P0: share lost", "Denoising at m: share gained"]
    shares: Any = wired.figures["shares"]
    assert [label.get_text() for label in shares.axes[1].get_yticklabels()] == ["K", "Q", "V"]


def test_a_sink_made_by_the_position_embedding_takes_another_path() -> None:
    """Learned positions can carry the sink: then the embedding has it, blocks 0-1 none, and the claim is missed."""
    result = CausalPath(QUICK).run(embedded_sink(), distinct(12, LENGTH))
    assert result.judgement is not None and result.judgement.verdict == "not reproduced"
    for direction in ("noising", "denoising"):
        assert result.metrics[f"share_of_blocks_0_1_in_{direction}"].value == pytest.approx(0, abs=1e-3)
        table = result.tables["components"].set_index(["direction", "node"])["share"]
        assert table[direction, "embed"] == pytest.approx(1, abs=1e-3)
    assert result.metrics["share_of_k_among_edges_into_sink_heads"].value == pytest.approx(1, abs=1e-3)
    assert any("embedding is not part of any block" in note for note in result.notes)


@pytest.mark.parametrize("name, backend", [("llama-grouped", "hooked"), ("neox", "bridge"), ("qwen3-moe", "bridge")])
def test_joint_patches_against_rows_patched_one_by_one(family_model: Any, name: str, backend: str) -> None:
    model, heads = family_model(name, backend), [(1, 0), (2, 3)]
    prompts = random_tokens(VOCAB, n=3, length=14)
    pair = shift_prompts(prompts, 5, VOCAB)
    beside = torch.tensor([1, 13, 6])
    blocks = [f"blocks.{layer}.hook_{part}_out" for layer in (0, 1) for part in ("attn", "mlp")]
    stream = [f"blocks.{layer}.hook_resid_pre" for layer in range(describe(model).n_layers)]
    found = joint_changes(model, pair, heads, beside)
    for row in range(3):
        clean, shifted = pair.clean.ids[row : row + 1], pair.shifted.ids[row : row + 1]
        away = int(beside[row])
        for direction, (base, place, source, from_place) in {
            "noising": (clean, 0, shifted, 5),
            "denoising": (shifted, 5, clean, 0),
        }.items():
            before = literal_score(model, base, place, heads)
            for key, names, step in ((JOINT, blocks, 0), (WHOLE_STREAM, stream, 0), (JOINT_CONTROL, blocks, away)):
                values = literal_values(model, source, names, from_place + step)
                after = literal_score(model, base, place, heads, values, place + step)
                assert found[direction, key][row] == pytest.approx(after - before, abs=2e-6), (direction, key)
    assert all(abs(found[direction, JOINT]).max() > 1e-4 for direction in ("noising", "denoising"))


def literal_values(model: Any, ids: torch.Tensor, names: list[str], position: int) -> dict[str, torch.Tensor]:
    found = {}

    def keep(activation, hook, name):
        found[name] = activation[0, position].clone()

    with torch.no_grad():
        forward(model, ids, hooks=[(name, lambda a, hook, name=name: keep(a, hook, name)) for name in names])
    return found


def literal_score(
    model: Any,
    ids: torch.Tensor,
    place: int,
    heads: list[tuple[int, int]],
    values: dict[str, torch.Tensor] | None = None,
    position: int = 0,
) -> float:
    """The mean attention to `place` of all queries from it on, with values put in at `position`."""
    patterns = {}

    def put(activation, hook, value):
        activation = activation.clone()
        activation[0, position] = value
        return activation

    def keep(pattern, hook, layer):
        patterns[layer] = pattern[0].clone()

    hooks = [(name, lambda a, hook, value=value: put(a, hook, value)) for name, value in (values or {}).items()]
    for layer in {layer for layer, _ in heads}:
        hooks.append((f"blocks.{layer}.attn.hook_pattern", lambda a, hook, layer=layer: keep(a, hook, layer)))
    with torch.no_grad():
        forward(model, ids, hooks=hooks)
    length = ids.shape[1]
    return sum(
        sum(float(patterns[layer][head, query, place]) for query in range(place, length)) / (length - place)
        for layer, head in heads
    ) / len(heads)


def test_a_metric_at_p0_is_the_same_wherever_the_place_is(family_model: Any) -> None:
    model = family_model("llama", "bridge")
    prompts = random_tokens(VOCAB, n=4, length=10).pad_left([10, 6, 8, 7])
    metric = sink_score_of([(0, 1), (2, 2)])
    expected = measure(model, prompts, metric)
    torch.testing.assert_close(measure(model, prompts, measured_at_p0(metric), torch.full((4,), 9)), expected)
    assert not torch.allclose(measure(model, prompts, metric, torch.full((4,), 9)), expected)


def test_shares_of_inputs_are_summed_sizes_of_edges_into_these_heads() -> None:
    edges = (("embed", "attn.1.0.k"), ("mlp.0", "attn.1.0.k"), ("mlp.0", "attn.1.0.q"), ("mlp.0", "attn.1.1.v"))
    edges += (("embed", "attn.1.2.k"), ("attn.0", "mlp.0"))
    effect = torch.tensor([[-0.3, 0.1], [0.1, 0.1], [0.05, -0.15], [0.2, 0.0], [9.0, 9.0], [9.0, 9.0]])
    effects = PathEffects(edges, torch.zeros(2), effect, "score", "direct")
    shares = input_shares(effects, ["attn.1.0", "attn.1.1"])
    assert shares is not None
    whole = 0.3 + 0.1 + 0.1 + 0.1 + 0.05 + 0.15 + 0.2
    assert [shares[part].value for part in "kqv"] == pytest.approx([0.6 / whole, 0.2 / whole, 0.2 / whole])
    assert input_shares(PathEffects(edges, torch.zeros(2), 0 * effect, "score", "direct"), ["attn.1.0"]) is None


def test_rows_are_dealt_out_to_the_shifts_and_bounded_by_the_runs(wired: Result) -> None:
    components, edges = wired.tables["components"], wired.tables["edges"]
    # 6 rows are measured; 15 single patches both ways, and 5 senders to 9 inputs, would allow 20 and 6 of them.
    assert set(components["n"]) == {6} and set(edges["n"]) == {6}
    few = CausalPath(CausalPathConfig(shifts=SHIFTS, runs=100, samples=5)).run(wired_model(), distinct(12, LENGTH))
    assert set(few.tables["joint"]["n"]) == {5}
    assert set(few.tables["components"]["n"]) == {3} and set(few.tables["edges"]["n"]) == {2}


def test_the_trained_model_runs_through_blocks_0_and_1() -> None:
    model = load_model("p0-nano")
    prompts = natural_text(model, "stdlib", n=24, length=32, first_token="random")
    result = CausalPath(CausalPathConfig(shifts=(8,), runs=600)).run(model, prompts)
    assert result.judgement is not None and result.judgement.verdict == "reproduced"
    assert abs(result.metrics["share_of_random_position_in_noising"].value) < 0.05


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_a_bounded_run_says_of_the_wired_model_what_a_thorough_one_says(wired: Result, positions: Any) -> None:
    config = CausalPathConfig(shifts=SHIFTS, most_edges=0)
    result = CausalPath(config).run(wired_model(positions), distinct(12, LENGTH))
    assert result.judgement is not None and result.judgement.verdict == "reproduced"
    for name, interval in wired.metrics.items():
        # Denoising differs between the shifts, and a bounded run has each row at one of them.
        tolerance = 0.05 if "denoising" in name and "total" in name else 2e-3
        assert result.metrics[name].value == pytest.approx(interval.value, abs=tolerance), name
    shares = result.tables["components"].set_index(["direction", "node"])["share"]
    for node in ("attn.0", "mlp.0", "mlp.1", "resid_pre.2", "resid_mid.0"):
        assert shares["noising", node] == pytest.approx(1, abs=2e-3), node
    for node in ("embed", "attn.1", "mlp.2"):
        assert shares["noising", node] == pytest.approx(0, abs=2e-3), node
    edges = result.tables["edges"]
    found = {(sender, receiver) for sender, receiver, effect in edges.iloc[:, :3].values if abs(effect) > 0.02}
    assert found == {("attn.0", "mlp.0"), ("mlp.0", "mlp.1"), ("mlp.1", "attn.2.0+2+3.k")}
    assert any("error of the estimates" in note for note in result.notes)


def test_a_bounded_run_on_a_bridge_with_padded_rows() -> None:
    model = to_bridge(wired_huggingface("rotary"), "wired")
    prompts = distinct(12, LENGTH).pad_left([LENGTH - row for row in range(12)])
    result = CausalPath(CausalPathConfig(shifts=SHIFTS, most_edges=0)).run(model, prompts)
    assert result.judgement is not None and result.judgement.verdict == "reproduced"
    assert result.metrics["share_of_k_in_total_effect"].value == pytest.approx(1, abs=2e-3)
    assert result.metrics["edges_at_random_position_over_those_at_p0"].value == pytest.approx(0, abs=2e-3)


def test_the_map_of_a_bounded_run_has_every_layer_in_its_place() -> None:
    """Where most cells of denoising have no exact patch, those that have one must not move to another layer."""
    result = CausalPath(CausalPathConfig(shifts=SHIFTS, most_edges=0, row_runs=20)).run(
        wired_model(), distinct(12, LENGTH)
    )
    table = result.tables["components"]
    assert (table["direction"] == "denoising").sum() < (table["direction"] == "noising").sum()
    maps: Any = result.figures["components"]
    for axis in maps.axes[:2]:
        assert axis.images[0].get_array().shape[0] == describe(wired_model()).n_layers


def test_a_bounded_run_of_p0_nano_is_near_the_thorough_one() -> None:
    model = load_model("p0-nano")
    prompts = natural_text(model, "stdlib", n=24, length=32, first_token="random")
    config = {"shifts": (8,), "rows": 12, "row_runs": 30}
    thorough = CausalPath(CausalPathConfig(shifts=(8,), runs=3072)).run(model, prompts)
    bounded = CausalPath(CausalPathConfig(**config, most_edges=0)).run(model, prompts)
    for direction in ("noising", "denoising"):
        # With one shift the same rows are patched, and only where values are read differs.
        for name in (f"share_of_blocks_0_1_in_{direction}", f"total_effect_of_{direction}"):
            assert bounded.metrics[name].value == pytest.approx(thorough.metrics[name].value, abs=1e-4), name
    joined = thorough.tables["components"].merge(bounded.tables["components"], on=["direction", "node"])
    # Estimates are of all 12 rows, as the exact patches of the thorough run; exact ones of the first three.
    estimates = joined[~joined["exact"]]
    assert set(estimates["n_x"]) == set(estimates["n_y"]) == {12} and set(joined[joined["exact"]]["n_y"]) == {3}
    assert (estimates["share_x"] - estimates["share_y"]).abs().max() < 0.1 < estimates["share_x"].max()
    k = "share_of_k_among_edges_into_sink_heads"
    assert bounded.metrics[k].value == pytest.approx(thorough.metrics[k].value, abs=0.02)


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("most_edges", [0, 2000])
def test_a_few_prompts_are_enough_to_run_it(n: int, most_edges: int) -> None:
    config = CausalPathConfig(shifts=(2, 4, 9), most_edges=most_edges)
    result = CausalPath(config).run(wired_model(), distinct(n, LENGTH))
    assert result.metrics["share_of_k_among_edges_into_sink_heads"].value == pytest.approx(1, abs=1e-3)
    assert set(result.tables["edges"]["n"]) == {result.metrics["total_effect_of_noising"].n}


@pytest.mark.parametrize("most_edges", [0, 2000])
def test_what_it_takes_is_declared(most_edges: int) -> None:
    model = load_model("p0-nano")
    prompts = natural_text(model, "stdlib", n=24, length=64)
    experiment = CausalPath(CausalPathConfig(most_edges=most_edges, row_runs=24))
    studied_sink(model, prompts)
    with count_passes() as counted:
        experiment.run(model, prompts)
    assert counted.passes(prompts.n, prompts.length, describe(model).n_layers) == pytest.approx(
        experiment.passes(model, prompts), rel=0.25
    )


def test_nothing_to_explain_is_not_applicable() -> None:
    model = load_model("p0-nano", checkpoint=0)
    with pytest.raises(NotApplicable, match="no sink to explain"):
        CausalPath().run(model, natural_text(model, "stdlib", n=16, length=32))
    with pytest.raises(NotApplicable, match="no sink to explain"):
        CausalPath().run(decoy_model(), distinct(12, LENGTH))


def test_without_room_for_a_prefix_it_is_not_applicable_and_with_some_it_says_so() -> None:
    model = wired_model()
    with pytest.raises(NotApplicable, match=r"no room for a prefix of 4 tokens before prompts of 254"):
        CausalPath().run(model, random_tokens(64, n=4, length=254))
    result = CausalPath(CausalPathConfig(shifts=(2, 250), runs=100)).run(model, distinct(8, 20))
    assert "longer prefixes do not fit 256 positions" in result.notes
    assert set(result.tables["joint"]["shift"]) == {2}
    assert uniform_excess(20) < result.metrics["total_effect_of_denoising"].value
