"""Super experts: one that was built in is found and carries the sink; numbers against weights set to zero by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from p0circuit import sink
from p0circuit.experiments import NotApplicable
from p0circuit.experiments.exploratory.experts import Experts, ExpertsConfig, _in_use, _random_order
from p0circuit.experiments.sink_under_study import excess_scores, studied_sink
from p0circuit.models import load_model
from p0circuit.models.hooked_transformer import has_hooked_transformer
from p0circuit.prompts import PromptSet, natural_text, random_tokens
from p0circuit.results import Result
from tests.families import build
from tests.interventions.test_experts import silent

LENGTH = 32
FIRST = 0
"""The token that the built-in expert knows, as a model knows its BOS."""
QUICK = ExpertsConfig(alone=3, samples=12, most=4, draws=6, top=1)


def behind_first(n: int = 32) -> PromptSet:
    drawn = random_tokens(95, n=n, length=LENGTH)
    ids = drawn.ids + 1
    ids[:, 0] = FIRST
    return PromptSet(ids, drawn.attention_mask, drawn.description, drawn.seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture in which expert 2 of block 1 makes the sink: it alone knows FIRST, and writes what all heads look for.

    Channels of the stream: 0 is FIRST, 1 is what the expert writes, 2 is in every token, the others are noise.
    """
    hf = build("mixtral")
    with torch.no_grad():
        embeddings = hf.model.embed_tokens.weight
        embeddings.mul_(0.3)
        embeddings[:, :3] = torch.tensor([0.0, 0.0, 1.0])
        embeddings[FIRST, 0] = 3.0
        for layer, block in enumerate(hf.model.layers):
            block.input_layernorm.weight.fill_(1.0)
            block.post_attention_layernorm.weight.fill_(1.0)
            block.self_attn.o_proj.weight.zero_()
            block.mlp.experts.down_proj.mul_(0.05)
            if layer == 1:
                block.mlp.gate.weight[2] = 0.0
                block.mlp.gate.weight[2, 0] = 10.0
                hidden = block.mlp.experts.gate_up_proj.shape[1] // 2
                for row in (0, hidden):
                    block.mlp.experts.gate_up_proj[2, row] = 0.0
                    block.mlp.experts.gate_up_proj[2, row, 0] = 2.0
                block.mlp.experts.down_proj[2] *= 0.0
                block.mlp.experts.down_proj[2, 1, 0] = 10.0
            if layer == 2:
                # The last pair of a head turns least with the position.
                for projection, channel in ((block.self_attn.q_proj, 2), (block.self_attn.k_proj, 1)):
                    projection.weight.mul_(0.05)
                    projection.weight[7::8] = 0.0
                    projection.weight[7::8, channel] = 4.0
    path = tmp_path_factory.mktemp("experts") / "built"
    hf.save_pretrained(path)
    return path


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_a_super_expert_that_was_built_in_is_found(folder: Path, backend: Any) -> None:
    if backend == "hooked" and not has_hooked_transformer():
        pytest.skip("HookedTransformer left TransformerLens with version 4")
    model = load_model(folder, backend=backend, device="cpu")
    result = Experts(QUICK).run(model, behind_first())
    alone = result.tables["alone"].set_index(["layer", "expert", "where"])
    assert result.metrics["excess"].value > 0.5
    assert alone.index[0][:2] == (1, 2)
    for where in ("at P0", "everywhere"):
        assert alone.loc[(1, 2, where), "excess_left"] < 0.1
        assert alone.loc[(1, 2, where), "norm_ratio"] < 2 < result.metrics["norm_ratio"].value / 2
    others = alone[[index[:2] != (1, 2) for index in alone.index]]
    assert len(others) and (others["excess_left"] - 1).abs().max() < 0.05
    # A token is given two experts of four, and this one is always the same.
    routed = result.tables["routing"].set_index(["layer", "expert"])
    assert routed.loc[(1, 2), "share_at_p0"] == 1 and routed.loc[(1, 2), "share_elsewhere"] < 0.7
    assert result.metrics["experts_in_use_at_p0"].value < result.metrics["experts_in_use_at_position_8"].value
    # A random expert of block 1 is this one a quarter of the times: the mean over six draws tells how often it was.
    left = result.metrics["excess_left_without_1_random_experts"]
    hits = (1 - left.value) * left.n / (1 - result.metrics["excess_left_without_1_top_experts_everywhere"].value)
    assert left.n == 6 and hits == pytest.approx(round(hits), abs=0.1) and hits < 6
    assert "1.2 (at P0: norm" in result.notes[-1]


@pytest.fixture(scope="module")
def random_result(family_model: Callable[[str, str], Any]) -> Result:
    # Random weights have no sink; what is measured on them has to be right all the same.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sink, "TIMES_UNIFORM", -1e9)
        return Experts(QUICK).run(family_model("qwen3-moe", "bridge"), random_tokens(96, n=24, length=12))


def test_numbers_against_weights_set_to_zero(
    family_model: Callable[[str, str], Any], random_result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink, "TIMES_UNIFORM", -1e9)
    model, prompts = family_model("qwen3-moe", "bridge"), random_tokens(96, n=24, length=12)
    found = studied_sink(model, prompts)
    clean = excess_scores(model, found.prompts, found.heads)
    together = random_result.tables["together"].set_index(["removed", "which"])
    alone = random_result.tables["alone"]
    line = alone[alone["where"] == "everywhere"].iloc[0]
    with silent(model, [(int(line["layer"]), int(line["expert"]))]):
        left = excess_scores(model, found.prompts, found.heads)
    assert line["excess_left"] == pytest.approx(left.mean() / clean.mean(), abs=1e-5)
    assert together.loc[(1, "everywhere"), "excess_left"] == pytest.approx(line["excess_left"], abs=1e-6)
    assert sorted(alone["norm_at_p0"], reverse=True) == alone["norm_at_p0"].tolist()
    # No sink head hears the experts of its own block or a later one.
    assert alone["layer"].max() < max(layer for layer, _ in found.heads)


def test_shares_of_a_position_are_as_many_as_a_token_is_given(random_result: Result) -> None:
    table = random_result.tables["routing"]
    assert len(table) == 3 * 4
    for column in ("share_at_p0", "share_elsewhere"):
        np.testing.assert_allclose(table.groupby("layer")[column].sum(), 2, atol=1e-6)


def test_experts_in_use() -> None:
    every = torch.eye(4).bool()[:, None].repeat(5, 2, 1)
    assert _in_use(every).value == pytest.approx(4)
    two = torch.tensor([True, True, False, False]).expand(6, 3, 4)
    assert _in_use(two).value == _in_use(two).low == pytest.approx(2)


def test_random_experts_stand_in_the_same_blocks() -> None:
    experts = [(1, 2), (0, 3), (1, 0), (1, 1), (1, 3)]
    drawn = _random_order(experts, [0, 1, 2], 4, np.random.default_rng(0))
    assert [layer for layer, _ in drawn] == [layer for layer, _ in experts] and len(set(drawn)) == len(drawn)
    # Four of four: all experts of the block, whatever the order.
    assert Counter(number for layer, number in drawn if layer == 1) == Counter(range(4))


@pytest.mark.parametrize(("family", "reason"), [("qwen3", "is no mixture of experts"), ("olmoe", "no sink to explain")])
def test_where_there_is_nothing_to_measure(family_model: Callable[[str, str], Any], family: str, reason: str) -> None:
    with pytest.raises(NotApplicable, match=reason):
        Experts().run(family_model(family, "bridge"), random_tokens(96, n=8, length=12))


def test_the_figures(random_result: Result) -> None:
    routing: Any = random_result.figures["routing"]
    assert [axis.get_xlabel() for axis in routing.axes[:3]] == ["expert"] * 3
    removed: Any = random_result.figures["removed"]
    assert removed.get_suptitle() == "qwen3-moe: without some experts"
    assert [label.get_text() for label in removed.axes[0].get_xticklabels()] == ["0", "1", "2", "4"]


@pytest.mark.slow
def test_the_shipped_mixture_as_the_command_for_a_large_one_loads_it(tmp_path: Path) -> None:
    """In bfloat16, where experts add up to their MLP but for rounding; with its blocks on the disk and without."""
    config = replace(QUICK, alone=1, draws=1, top=4)
    found = []
    for given in ({}, {"device_map": "disk", "offload_folder": tmp_path}):
        model = load_model("moe-0", device="cpu", dtype=torch.bfloat16, **given)
        found.append(Experts(config).run(model, natural_text(model, "code", n=16, length=64)))
    here, waiting = (result.metrics for result in found)
    assert here == waiting and here["norm_ratio"].value > 5
    assert here["excess_left_without_4_top_experts_at_p0"].value < here["excess_left_without_4_random_experts"].low
