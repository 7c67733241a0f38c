"""The claims about blocks 0 and 1 with the blocks that the locator finds, beside their verdicts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from p0circuit.experiments import (
    CausalPath,
    CausalPathConfig,
    Content,
    Depth,
    DirectionOrNorm,
    Recognition,
    Structure,
    StructureConfig,
)
from p0circuit.experiments.base import Experiment, block_names
from p0circuit.experiments.paper.c06_amplification import Amplification, AmplificationConfig
from p0circuit.models import load_model
from p0circuit.prompts import random_tokens
from p0circuit.reproduction import reproduce_model
from p0circuit.reproduction.located import located_note, located_row, with_blocks
from p0circuit.results import Result
from p0circuit.stats import Interval

VALUE = Interval(0.5, 0.4, 0.6, 8)


def row(
    experiment: Experiment[Any], blocks: tuple[int, ...], metrics: Mapping[str, Interval], reason: str = ""
) -> dict[str, Any]:
    """The row of an experiment with these blocks whose entry has these metrics."""
    measured = {name: interval.to_json() for name, interval in metrics.items()}
    return located_row(with_blocks(experiment, blocks), blocks, {"measured": measured, "why": reason})


@pytest.mark.parametrize(
    ("blocks", "name"), [((0,), "block 0"), ((0, 1), "blocks 0 and 1"), (range(4), "blocks 0 to 3")]
)
def test_blocks_are_named(blocks: Any, name: str) -> None:
    assert block_names(blocks) == name


def test_the_metrics_of_the_criteria_are_found_for_any_blocks() -> None:
    metrics = dict.fromkeys(
        ["squared_norm_over_others_block_4", "variance_over_others_block_4", "share_of_mlps_0", "share_of_mlp_0"], VALUE
    )
    assert list(row(Recognition(), (4,), metrics)["measured"]) == ["squared_norm_over_others_block_4"]
    assert list(row(Amplification(), (0,), metrics)["measured"]) == ["share_of_mlps_0"]
    for kind in (Recognition, Amplification, CausalPath, Structure, DirectionOrNorm, Content):
        assert kind().deciding_metrics == tuple(dict.fromkeys(one.metric for one in kind.claim.criteria))


def test_a_row_says_what_it_holds() -> None:
    kind = Content()
    assert located_note(row(kind, (0,), {"left_with_content_replaced": VALUE})) == (
        "with block 0, where C21 finds the circuit: left with content replaced 0.500 [0.400, 0.600]"
    )
    assert located_note(row(kind, (0, 1, 2), {}, "no sink")).endswith(
        "blocks 0 to 2, where C21 finds the circuit: not applicable, no sink"
    )
    assert "K = 0" in located_note(row(kind, (), {"left_with_content_replaced": VALUE}))


def test_other_blocks_have_no_verdict_and_other_values() -> None:
    model = load_model("wired")
    prompts = random_tokens(model.cfg.d_vocab, n=16, length=24)
    config = StructureConfig(positions=(4,), scan_blocks=1)
    both, second = Structure(config), with_blocks(Structure(config), (1,))
    assert second.config.blocks == (1,) and second.config.positions == (4,)
    results = [experiment.run(model, prompts, figures=False) for experiment in (both, second)]
    assert results[0].judgement is not None and results[1].judgement is None
    assert any("C5 is about blocks 0 and 1, and this is block 1: no verdict" in note for note in results[1].notes)
    values = [result.metrics["taken_from_p0_by_mixing"].value for result in results]
    # P0 is recognised in block 0 of this model.
    assert values[0] > 0.9 and abs(values[1]) < 0.01


@pytest.mark.parametrize("kind", [Recognition, Content, DirectionOrNorm])
def test_three_blocks(kind: Any) -> None:
    model = load_model("wired-two-stages")
    prompts = random_tokens(model.cfg.d_vocab, n=16, length=24)
    result = with_blocks(kind(), (0, 1, 2)).run(model, prompts, figures=False)
    assert result.judgement is None
    assert set(with_blocks(kind(), (0, 1, 2)).deciding_metrics) <= set(result.metrics)


def test_the_path_of_one_block() -> None:
    model = load_model("wired")
    prompts = random_tokens(model.cfg.d_vocab, n=12, length=16)
    config = CausalPathConfig(shifts=(4,), samples=4, runs=64)
    result = with_blocks(CausalPath(config), (0,)).run(model, prompts)
    names = ["share_of_blocks_0_in_noising", "share_of_blocks_0_in_denoising", "share_of_k_among_edges_into_sink_heads"]
    assert list(with_blocks(CausalPath(), (0,)).deciding_metrics) == names and set(names) <= set(result.metrics)
    assert set(result.figures) == {
        "components",
        "shares",
    }
    assert set(result.tables["joint"]["patched"]) == {"block 0", "whole stream", "block 0 at a random position"}
    # Later blocks make the rest from what block 0 recognises; what block 2 writes, no sink head reads.
    assert result.metrics["share_of_blocks_0_in_denoising"].value > 0.9
    later = with_blocks(CausalPath(config), (2,)).run(model, prompts, figures=False)
    assert abs(later.metrics["share_of_blocks_2_in_denoising"].value) < 0.1


def test_amplification_in_one_block_and_in_three() -> None:
    model = load_model("wired")
    prompts = random_tokens(model.cfg.d_vocab, n=12, length=16)
    config = AmplificationConfig(draws=2, choosing=4)
    for blocks, name in (((0,), "share_of_mlps_0"), ((0, 1, 2), "share_of_mlps_0_and_1_and_2")):
        result = with_blocks(Amplification(config), blocks).run(model, prompts)
        assert name in result.metrics and set(result.figures) == {"writers"}
        ablated = result.tables["ablations"]["ablated"].tolist()
        assert ("all MLPs" in ablated) == (len(blocks) == 3)


def test_a_run_puts_the_row_beside_the_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("wired")
    prompts = random_tokens(model.cfg.d_vocab, n=12, length=24)
    experiments = [Structure(StructureConfig(positions=(4,), scan_blocks=1)), Depth()]
    reproduce_model(model, prompts, tmp_path / "one", experiments, controls=False)
    entry, depth = json.loads((tmp_path / "one" / "claims.json").read_text())
    assert depth["measured"]["circuit_depth"]["value"] == 1 and entry["verdict"] == "reproduced"
    assert entry["located"]["blocks"] == [0] and entry["notes"][-1].startswith("with block 0, where C21 finds")
    passes = json.loads((tmp_path / "one" / "manifest.json").read_text())["passes"]
    assert passes["structure, located"]["used"] > 1

    measure = Depth.measure

    def deeper(self: Depth, *given: Any) -> Result:
        result = measure(self, *given)
        result.metrics["circuit_depth"] = Interval(2, 2, 2, 6)
        return result

    monkeypatch.setattr(Depth, "measure", deeper)
    same = reproduce_model(model, prompts, tmp_path / "two", experiments, controls=False)[0]["located"]
    assert same["blocks"] == [0, 1] and not (tmp_path / "two" / "located").exists()
    assert same["measured"]["taken_from_p0_by_mixing"] == entry["measured"]["taken_from_p0_by_mixing"]
