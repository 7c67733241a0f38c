"""Any token at P0: the wired model, where all are alike; one token taken out; the scores and the probe by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from p0circuit.experiments import NotApplicable
from p0circuit.experiments.paper.c03_any_token import (
    AnyToken,
    AnyTokenConfig,
    embedding_probe,
    probe_by_layer,
    scores_by_token,
    share_at_least,
    token_share,
)
from p0circuit.interventions.vocabulary import sink_scores_by_token, vocabulary_sweep
from p0circuit.models import load_model
from p0circuit.models.constructed.build import wired_model
from p0circuit.models.constructed.truth import wired_truth
from p0circuit.models.constructed.weights import residual_subspaces
from p0circuit.prompts import from_ids, random_tokens
from p0circuit.recording.quantities import SINK_SCORE
from p0circuit.recording.record import record
from p0circuit.results import Result

LENGTH = 32
QUICK = AnyTokenConfig(continuations=8, full_tokens=16, full_continuations=2)


@pytest.fixture(scope="module")
def result() -> Result:
    return AnyToken(QUICK).run(wired_model(), random_tokens(64, n=16, length=LENGTH))


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_every_token_of_the_wired_model_is_a_sink(positions: Any) -> None:
    result = AnyToken(QUICK).run(wired_model(positions), random_tokens(64, n=16, length=LENGTH))
    assert result.judgement is not None and result.judgement.verdict == "reproduced"
    assert result.metrics["share_of_tokens_with_half_the_median_score"].value == 1
    assert result.metrics["share_in_full_runs"].value == 1
    assert result.metrics["share_at_position_8_in_full_runs"].value == 0
    expected = np.mean(wired_truth().sink_scores(LENGTH))
    np.testing.assert_allclose(result.tables["tokens"]["sink_score"], expected, atol=1e-3)
    assert len(result.tables["tokens"]) == 64 and not len(result.tables["exceptions"])


def test_a_token_that_is_not_recognised_is_an_exception() -> None:
    model = wired_model()
    with torch.no_grad():
        # The ruler alone: nothing to echo, so nothing that is short beside it.
        model.embed.W_E[5] = residual_subspaces().ruler
    # No token twice, so that nothing but P0 is recognised.
    others = torch.tensor([token for token in range(64) if token != 5])
    prompts = from_ids(torch.stack([others[torch.randperm(63)[:LENGTH]] for _ in range(16)]))
    result = AnyToken(QUICK).run(model, prompts)
    assert result.tables["exceptions"]["token"].tolist() == [5]
    assert result.metrics["share_of_tokens_with_half_the_median_score"].value == 63 / 64
    # Without a key that heads look for, attention is uniform.
    lowest = result.tables["exceptions"]["sink_score"].iloc[0]
    assert lowest == pytest.approx(wired_truth().uniform_score(LENGTH), abs=1e-4)
    assert any("1 of 64 tokens" in note and "the lowest: 5" in note for note in result.notes)


@pytest.mark.parametrize("case", [("gpt2", "hooked"), ("qwen2", "hooked"), ("mistral", "bridge"), ("bloom", "bridge")])
def test_scores_by_token(family_model: Callable[[str, str], Any], case: tuple[str, str]) -> None:
    model = family_model(*case)
    prompts, heads = random_tokens(96, n=3, length=10), [(0, 1), (2, 0), (2, 3)]
    layers, numbers = map(list, zip(*heads, strict=True))
    tokens = torch.tensor([*prompts.ids[:, 0].tolist(), 7])
    found, norms = scores_by_token(model, prompts, tokens, heads, chunk=2)
    torch.testing.assert_close(norms, vocabulary_sweep(model, tokens).norms)
    # Each prompt's own first token leaves the prompt as it is.
    own = record(model, prompts, SINK_SCORE, cache=None)[:, layers, numbers].double().mean(1)
    np.testing.assert_allclose(found[:3].diagonal(), own, atol=1e-5)
    by_head = sink_scores_by_token(model, prompts, tokens)[:, layers, numbers].double().mean(1)
    np.testing.assert_allclose(found.mean(1), by_head, atol=1e-5)


def test_the_share_counts_from_half_the_median() -> None:
    assert share_at_least(np.array([0.1, 0.2, 0.4, 0.4, 0.9]), 0.5) == 0.8


def test_the_probe_finds_tokens_it_was_not_fitted_on() -> None:
    embedding = torch.randn(400, 16, dtype=torch.float64)
    units = torch.nn.functional.normalize(embedding @ torch.randn(16, 16, dtype=torch.float64), dim=-1)
    train = torch.arange(400) < 200
    hits, explained = embedding_probe(units, embedding, train)
    assert len(hits) == 200 and hits.double().mean() > 0.95 and explained > 0.8
    unrelated = torch.nn.functional.normalize(torch.randn(400, 16, dtype=torch.float64), dim=-1)
    hits, explained = embedding_probe(unrelated, embedding, train)
    assert hits.double().mean() < 0.05 and explained < 0.05


def test_the_probe_is_ridge_regression() -> None:
    x, y = torch.randn(40, 5, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    train = torch.arange(40) % 2 == 0
    centred, target = x - x[train].mean(0), y - y[train].mean(0)
    # Ridge is least squares with rows of the square root of the penalty added, which want zero.
    extra = (0.3 * 20 / 5) ** 0.5 * torch.eye(5, dtype=torch.float64)
    rows, wanted = torch.cat([centred[train], extra]), torch.cat([target[train], torch.zeros(5, 3).double()])
    said = centred[~train] @ torch.linalg.lstsq(rows, wanted).solution
    _, explained = embedding_probe(x, y, train, penalty=0.3)
    assert explained == pytest.approx(float(1 - (target[~train] - said).square().sum() / target[~train].square().sum()))


def test_a_common_direction_buries_the_token() -> None:
    embedding = torch.randn(400, 16, dtype=torch.float64)
    train = torch.arange(400) < 200
    shared = torch.zeros(16, dtype=torch.float64)
    shared[0] = 1000
    units = torch.nn.functional.normalize(embedding + shared, dim=-1)
    _, explained = embedding_probe(units, embedding, train)
    assert explained < 0.01 and token_share(units).value < 1e-4


def test_the_token_share_and_its_interval() -> None:
    units = torch.nn.functional.normalize(torch.randn(500, 8, dtype=torch.float64) + 1, dim=-1)
    share = token_share(units)
    assert share.value == pytest.approx(1 - float(units.mean(0).square().sum()))
    rng = np.random.default_rng(0)
    drawn = [1 - float(units[rng.integers(0, 500, 500)].mean(0).square().sum()) for _ in range(500)]
    assert [share.low, share.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist(), abs=0.01)


def test_p0_of_the_wired_model_says_less_of_its_token_than_position_8(result: Result) -> None:
    probe = result.tables["probe"].set_index(["place", "layer"])["token_share"]
    assert probe["P0", 0] == pytest.approx(probe["position 8", 0], abs=1e-6)
    assert probe["P0", 2] < 0.01 < 0.3 < probe["position 8", 2]
    assert any("no probe" in note for note in result.notes) and "accuracy" not in result.tables["probe"]


def test_the_probe_of_a_model_with_more_tokens_than_channels(family_model: Callable[[str, str], Any]) -> None:
    table, why = probe_by_layer(family_model("gpt2", "hooked"), torch.randperm(96))
    assert why == "" and len(table) == 2 * 4 and (table["chance"] == 1 / 96).all()
    # The stream before block 0 is the embedding itself.
    first = table[(table["layer"] == 0) & (table["place"] == "P0")].iloc[0]
    assert first["accuracy"] > 0.9 and first["variance_explained"] > 0.9


@pytest.mark.parametrize(("name", "checkpoint"), [("wired-decoy", None), ("p0-nano", 0)])
def test_without_a_sink_no_token_makes_one(name: str, checkpoint: int | None) -> None:
    with pytest.raises(NotApplicable, match="no sink to explain"):
        AnyToken().run(load_model(name, checkpoint=checkpoint), random_tokens(64, n=8, length=LENGTH))


def test_tokens_are_shown_as_text(tiny: Any) -> None:
    from p0circuit.experiments.paper.c03_any_token import token_texts

    ids = tiny.tokenizer.encode("return", add_special_tokens=False)
    assert "".join(map(eval, token_texts(tiny, torch.tensor(ids)))) == "return"


def test_the_figures(result: Result) -> None:
    figure: Any = result.figures["tokens"]
    assert figure.get_suptitle() == "wired: every token at position zero"
    assert len(figure.axes[0].lines) == 4
    probe: Any = result.figures["probe"]
    assert [axis.get_title() for axis in probe.axes] == ["What differs between tokens"]
