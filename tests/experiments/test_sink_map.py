"""The sink map: every cell and rate against a literal computation, and the known heads of the wired model."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch

from p0circuit.experiments import EXPERIMENTS, SinkMap, SinkMapConfig
from p0circuit.experiments.conditions import conditions
from p0circuit.experiments.sink_summary import sink_summary
from p0circuit.models.constructed.build import decoy_model, wired_model
from p0circuit.models.constructed.truth import wired_truth
from p0circuit.prompts import PromptSet, random_tokens
from p0circuit.results import Result
from p0circuit.stats import bootstrap
from p0circuit.text import BOS_TOKEN
from tests.literal import direction_cosines, over_others, run_with_cache, score
from tests.tiny import HEADS, LAYERS

EPS = 0.3
NAMES = ["without BOS", "with BOS", "random first", "random tokens", "repeated token"]


def literal_scores(model: Any, prompts: PromptSet, offset: int = 0) -> np.ndarray:
    """[sample, layer, head]"""
    caches = [run_with_cache(model, ids)[1] for ids in prompts.ids]
    layers = range(model.cfg.n_layers)
    return np.array(
        [[score(cache[f"blocks.{layer}.attn.hook_pattern"][0], offset) for layer in layers] for cache in caches]
    )


@pytest.fixture(scope="module")
def result(tiny: Any, text: PromptSet) -> Result:
    return SinkMap().run(tiny, text)


def test_the_conditions_are_what_their_names_say(tiny: Any, text: PromptSet) -> None:
    made = conditions(tiny, text)
    assert list(made) == NAMES
    bos = tiny.tokenizer.bos_token_id
    assert tiny.tokenizer.convert_ids_to_tokens(bos) == BOS_TOKEN
    assert torch.equal(made["without BOS"].ids, text.ids) and bos not in text.ids
    for name in ("with BOS", "random first"):
        assert torch.equal(made[name].ids[:, 1:], text.ids[:, :-1])
    assert made["with BOS"].ids[:, 0].eq(bos).all()
    for name in ("random first", "random tokens", "repeated token"):
        assert len(made[name].ids[:, 0].unique()) > 1 and not torch.isin(made[name].ids, torch.tensor([0, 1])).any()
    assert made["random tokens"].ids.unique().numel() > 40
    assert (made["repeated token"].ids == made["repeated token"].ids[:, :1]).all()
    assert all(condition.ids.shape == text.ids.shape for condition in made.values())


def test_random_prompts_do_not_get_their_own_first_token_twice() -> None:
    prompts = random_tokens(64, n=32, length=8)
    made = conditions(wired_model(), prompts)
    assert list(made) == [name for name in NAMES if name != "with BOS"]
    assert (made["random first"].ids[:, 0] == made["random first"].ids[:, 1]).float().mean() < 0.2
    assert not torch.equal(made["random tokens"].ids, prompts.ids)


def test_every_cell_is_the_mean_score_of_its_head(tiny: Any, text: PromptSet, result: Result) -> None:
    table = result.tables["scores"]
    assert len(table) == len(NAMES) * LAYERS * HEADS
    for name, condition in conditions(tiny, text).items():
        scores, control = literal_scores(tiny, condition), literal_scores(tiny, condition, 8)
        cells = table[table["condition"] == name].set_index(["layer", "head"])
        for layer, head in np.ndindex(LAYERS, HEADS):
            cell, samples = cells.loc[(layer, head)], scores[:, layer, head]
            assert cell["sink_score"] == pytest.approx(samples.mean(), abs=1e-5)
            assert cell["standard_deviation"] == pytest.approx(samples.std(ddof=1), abs=1e-5)
            assert cell["score_at_8"] == pytest.approx(control[:, layer, head].mean(), abs=1e-5)


def test_rates_count_heads_above_the_threshold(tiny: Any, text: PromptSet) -> None:
    made = conditions(tiny, text)
    scores = {name: literal_scores(tiny, condition) for name, condition in made.items()}
    # A threshold in the middle of what is there, and not next to any score.
    ordered = np.sort(scores["without BOS"].ravel())
    middle = len(ordered) // 2 + int(np.diff(ordered[len(ordered) // 2 : len(ordered) // 2 + 8]).argmax())
    eps = float(ordered[middle : middle + 2].mean())
    result = SinkMap(SinkMapConfig(eps=eps, control=3)).run(tiny, text)
    table = result.tables["rates"].set_index(["condition", "position", "from_layer"])
    assert len(table) == len(NAMES) * 2 * 2
    for name, condition in made.items():
        for position, values in ((0, scores[name]), (3, literal_scores(tiny, condition, 3))):
            for start in (0, 2):
                expected = bootstrap((values[:, start:] > eps).mean((1, 2)))
                row = table.loc[(name, position, start)]
                assert row[["sink_rate", "low", "high", "n"]].tolist() == pytest.approx(
                    list(dataclasses.astuple(expected)), abs=1e-6
                )
    without = (scores["without BOS"] > eps).mean()
    assert 0.2 < without < 0.8
    assert result.metrics["sink_rate"].value == pytest.approx(without, abs=1e-6)
    later = result.metrics["sink_rate_from_layer_2"]
    assert later == bootstrap((scores["without BOS"][:, 2:] > eps).mean((1, 2)))


def test_the_best_head_is_that_of_the_mean(tiny: Any, text: PromptSet, result: Result) -> None:
    for name, key in (("without BOS", "best_head"), ("with BOS", "best_head_with_bos")):
        scores = literal_scores(tiny, conditions(tiny, text)[name])
        best = scores.reshape(len(scores), -1)[:, scores.mean(0).argmax()]
        interval = result.metrics[key]
        assert interval.value == pytest.approx(best.mean(), abs=1e-5)
        assert interval.low < interval.value < interval.high and interval.n == text.n


def test_an_untrained_model_has_no_sink(tiny: Any) -> None:
    from p0circuit.prompts import natural_text

    result = SinkMap().run(tiny, natural_text(tiny, "english", n=8, length=64))
    assert result.tables["rates"]["sink_rate"].tolist() == [0] * 20
    assert result.metrics["sink_rate"].high == 0


def test_the_sinks_of_the_wired_model_are_found_and_only_they() -> None:
    truth, prompts = wired_truth(), random_tokens(64, n=8, length=64)
    table = SinkMap().run(wired_model(), prompts).tables["scores"]
    text = table[table["condition"] == "without BOS"]
    found = {(row.layer, row.head) for row in text.itertuples() if row.sink_score > EPS}
    assert found == set(truth.sink_heads)
    # By construction a repeated token hides P0, and the decoy reads it nowhere.
    assert table[table["condition"] == "repeated token"]["sink_score"].max() < 0.1
    assert SinkMap().run(decoy_model(), prompts).metrics["sink_rate"].value == 0


@pytest.mark.usefixtures("shown_messages")
def test_a_second_run_says_what_it_read(tiny: Any, text: PromptSet, capsys: pytest.CaptureFixture[str]) -> None:
    first = SinkMap().run(tiny, text)
    assert "cache" not in capsys.readouterr().err and first.provenance["from_cache"] == []
    second = SinkMap().run(tiny, text)
    assert "sink-map: 10 of 10 recordings read from the cache" in capsys.readouterr().err
    assert second.provenance["from_cache"] == sorted(
        f"{name}/{quantity}" for name in NAMES for quantity in ("sink_score", "score_at_8")
    )
    assert second.metrics == first.metrics
    for name, table in first.tables.items():
        assert table.equals(second.tables[name])
    # Another position to compare with has to be measured anew.
    SinkMap(SinkMapConfig(control=2)).run(tiny, text)
    assert "sink-map: 5 of 10 recordings read from the cache" in capsys.readouterr().err


def test_the_provenance_is_complete_and_json(tiny: Any, text: PromptSet, result: Result) -> None:
    provenance = json.loads(json.dumps(result.provenance))
    assert provenance["model"]["name"] == "tiny" and provenance["model"]["n_layers"] == LAYERS
    assert provenance["prompts"]["fingerprint"] == text.fingerprint()
    assert (provenance["prompts"]["source"], provenance["prompts"]["seed"]) == ("english", 2)
    assert (provenance["samples"], provenance["length"]) == (5, 12)
    assert provenance["config"] == {"eps": EPS, "control": 8}
    assert provenance["seconds"] >= 0


def test_the_figure_has_a_map_per_condition_and_names_the_model(result: Result) -> None:
    figure: Any = result.figures["map"]
    assert [axis.get_title() for axis in figure.axes[: len(NAMES)]] == NAMES
    assert figure.get_suptitle().startswith("tiny: ")


def test_without_bos_the_condition_is_left_out_and_that_is_said() -> None:
    result = SinkMap().run(wired_model(), random_tokens(64, n=3, length=6))
    assert "with BOS" not in set(result.tables["scores"]["condition"])
    assert "The model has no BOS token: the condition with BOS is left out." in result.notes
    # The control stands at the last position where the prompts are shorter than it asks for.
    assert "score_at_5" in result.tables["scores"].columns
    assert set(result.tables["rates"]["position"]) == {0, 5}


def test_configurations_are_frozen() -> None:
    for experiment in (make() for make in EXPERIMENTS.values()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            experiment.config.eps = 1


@pytest.mark.parametrize("bos", [False, True])
def test_the_summary_holds_the_same_numbers(tiny: Any, text: PromptSet, bos: bool) -> None:
    prompts = text.prepend(tiny.tokenizer.bos_token_id) if bos else text
    summary = sink_summary(tiny, prompts, bos)
    scores = literal_scores(tiny, prompts)
    caches = [run_with_cache(tiny, ids)[1] for ids in prompts.ids]
    names = [*(f"blocks.{layer}.hook_resid_pre" for layer in range(LAYERS)), f"blocks.{LAYERS - 1}.hook_resid_post"]
    assert {key: summary[key] for key in ("model", "n", "length", "bos")} == {
        "model": "tiny",
        "n": 5,
        "length": 12,
        "bos": bos,
    }
    np.testing.assert_allclose(summary["sink_score"], scores.mean(0), atol=1e-5)
    assert summary["sink_rate"] == pytest.approx((scores > EPS).mean(), abs=1e-6)
    assert summary["sink_rate_from_layer_2"] == pytest.approx((scores[:, 2:] > EPS).mean(), abs=1e-6)
    ratios = [np.mean([over_others(cache[name][0]) for cache in caches]) for name in names]
    np.testing.assert_allclose(summary["norm_ratio"], ratios, rtol=1e-5)
    cosines = [np.mean(direction_cosines([cache[name][0, 0] for cache in caches])) for name in names]
    np.testing.assert_allclose(summary["direction_consistency"], cosines, atol=1e-5)
