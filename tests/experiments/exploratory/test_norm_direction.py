"""Norm and direction of P0: every line of the table against a literal computation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import Tensor

from p0circuit.experiments import NormDirection, NormDirectionConfig
from p0circuit.models.constructed.build import wired_model
from p0circuit.models.constructed.truth import wired_truth
from p0circuit.prompts import PromptSet, random_tokens
from p0circuit.results import Result
from p0circuit.stats import Interval, bootstrap
from tests.literal import direction_cosines, over_others, run_with_cache
from tests.tiny import LAYERS

OTHERS = (3, 7)
HOOKS = {"attention out": "hook_attn_out", "MLP out": "hook_mlp_out", "residual": "hook_resid_pre"}


@pytest.fixture(scope="module")
def result(tiny: Any, text: PromptSet) -> Result:
    return NormDirection(NormDirectionConfig(OTHERS)).run(tiny, text)


@pytest.fixture(scope="module")
def written(tiny: Any, text: PromptSet) -> dict[tuple[str, int], list[Tensor]]:
    """What every component has at all positions, one tensor [pos, d_model] for each row."""
    caches = [run_with_cache(tiny, ids)[1] for ids in text.ids]
    found = {
        (component, layer): [cache[f"blocks.{layer}.{hook}"][0] for cache in caches]
        for component, hook in HOOKS.items()
        for layer in range(LAYERS)
    }
    found["residual", LAYERS] = [cache[f"blocks.{LAYERS - 1}.hook_resid_post"][0] for cache in caches]
    found["embedding", 0] = found["residual", 0]
    return found


def columns(row: Any, name: str) -> list[float]:
    return [row[name], row[f"{name}_low"], row[f"{name}_high"]]


def close(found: list[float], expected: Interval) -> None:
    assert found == pytest.approx([expected.value, expected.low, expected.high], rel=1e-4, abs=1e-5)


def test_every_line_of_the_table(result: Result, written: dict[tuple[str, int], list[Tensor]]) -> None:
    table = result.tables["layers"].set_index(["component", "layer"])
    assert set(table.index) == written.keys()
    for place, rows in written.items():
        line = table.loc[place]
        close(columns(line, "norm_ratio"), bootstrap(np.array([over_others(row) for row in rows])))
        at_p0 = direction_cosines([row[0] for row in rows])
        close(columns(line, "direction_consistency"), bootstrap(np.array(at_p0)))
        others = np.mean([direction_cosines([row[other] for row in rows]) for other in OTHERS], axis=0)
        close(columns(line, "direction_consistency_others"), bootstrap(others))
        assert line["n"] == 5


def test_the_metrics_are_those_lines(result: Result) -> None:
    table = result.tables["layers"]
    stream = table[table["component"] == "residual"].set_index("layer")
    for name in ("norm_ratio", "direction_consistency"):
        interval = result.metrics[f"{name}_after_block_1"]
        assert columns(stream.loc[2], name) == pytest.approx([interval.value, interval.low, interval.high])
    assert result.metrics["largest_norm_ratio"].value == pytest.approx(stream["norm_ratio"].max())


def test_the_wired_circuit_shows_in_norm_and_direction() -> None:
    result = NormDirection().run(wired_model(), random_tokens(64, n=8, length=64))
    table = result.tables["layers"].set_index(["component", "layer"])
    # Uniform attention keeps P0's output unmixed; MLP 1 turns that into a large vector of one direction.
    assert table.loc[("residual", 0), "norm_ratio"] == pytest.approx(1, abs=0.01)
    assert table.loc[("attention out", 0), "norm_ratio"] > 2
    assert table.loc[("MLP out", 1), "norm_ratio"] > 50
    assert table.loc[("residual", 2), "norm_ratio"] > 10
    assert table.loc[("residual", 2), "direction_consistency"] > 0.99
    assert table.loc[("residual", 2), "direction_consistency_others"] < 0.8
    assert table.loc[("embedding", 0), "direction_consistency"] == table.loc[("residual", 0), "direction_consistency"]
    assert wired_truth().sink_neurons[0][0] == 1
    assert result.metrics["largest_norm_ratio"].value == table.loc["residual", "norm_ratio"].max()


def test_a_component_that_is_silent_elsewhere_has_no_ratio_and_that_is_said(tiny: Any, text: PromptSet) -> None:
    def only_p0(activation: Tensor, hook: Any) -> Tensor:
        activation[:, 1:] = 0
        return activation

    with tiny.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", only_p0)]):
        result = NormDirection().run(tiny, text)
    table = result.tables["layers"].set_index(["component", "layer"])
    assert np.isnan(table.loc[("MLP out", 1), "norm_ratio"])
    assert table["norm_ratio"].isna().sum() == 1
    assert result.notes == ["No norm ratio where the other positions write nothing: MLP out of block 1."]


def test_short_prompts_are_compared_with_their_last_position(tiny: Any, text: PromptSet) -> None:
    pair = PromptSet(text.ids[:, :2], text.attention_mask[:, :2], text.description)
    table = NormDirection().run(tiny, pair).tables["layers"]
    assert table["direction_consistency_others"].notna().all()
    assert (NormDirection(NormDirectionConfig((1,))).run(tiny, pair).tables["layers"]).equals(table)


@pytest.mark.usefixtures("shown_messages")
def test_a_second_run_says_what_it_read(tiny: Any, text: PromptSet, capsys: pytest.CaptureFixture[str]) -> None:
    first = NormDirection().run(tiny, text)
    capsys.readouterr()
    second = NormDirection().run(tiny, text)
    count = len(second.provenance["from_cache"])
    assert f"norm-direction: {count} of {count} recordings read from the cache" in capsys.readouterr().err
    assert count > 5 and second.metrics == first.metrics


def test_the_figures_name_the_model_and_draw_the_table(result: Result) -> None:
    for name, lines in (("layers", 1), ("components", 2)):
        figure: Any = result.figures[name]
        assert figure.get_suptitle().startswith("tiny: ")
        norm, direction = figure.axes
        assert norm.get_yscale() == "log" and direction.get_yscale() == "linear"
        assert len(norm.lines) == lines and len(direction.lines) == 2
    table = result.tables["layers"]
    stream = table[table["component"] == "residual"]
    layers: Any = result.figures["layers"]
    np.testing.assert_allclose(layers.axes[0].lines[0].get_ydata(), stream["norm_ratio"])
    assert [label.get_text() for label in layers.axes[0].get_xticklabels()] == ["emb", "0", "1", "2"]
