"""The loss over first tokens, prefixes and recall, against single rows put together by hand."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from p0circuit.experiments.base import NotApplicable
from p0circuit.experiments.deployment import c20_first_token as first_token
from p0circuit.experiments.deployment.c20_first_token import (
    BOS,
    FAR,
    MIDDLE,
    NEUTRAL,
    NONE,
    REGISTER,
    SECOND,
    FirstToken,
    FirstTokenConfig,
    first_token_losses,
    neutral_token,
    prefixes_of,
    recall_by_place,
    sampled_tokens,
    spread,
    spreads_at_same_distance,
    trained_register,
)
from p0circuit.models import forward, load_model
from p0circuit.models.constructed.build import decoy_model, wired_model
from p0circuit.prompts import from_ids, natural_text, random_tokens
from tests.families import VOCAB
from tests.literal import loss
from tests.report.test_figures import assert_legible

N, T, TOKENS, NEWLINE = 3, 30, 4, 7
PROMPTS = random_tokens(VOCAB, N, T, seed=5)
TEXT = PROMPTS.ids[:, :-1]
VECTOR = torch.linspace(-2, 2, 32)
CASES = [("gpt2", "hooked"), ("llama-grouped", "bridge"), ("opt", "bridge")]
PREFIXES = {NONE: None, NEUTRAL: NEWLINE, BOS: 0, REGISTER: VECTOR}


@torch.no_grad()
def losses_of(model: Any, ids: list[int], first: Tensor | None = None) -> list[float]:
    """The loss of every token but the first, with a vector in the place of what block 0 reads of the first."""

    def put(stream: Tensor, hook: Any) -> Tensor | None:
        if first is not None:
            stream = stream.clone()
            stream[:, 0] = first
            return stream

    row = torch.tensor(ids)
    return loss(forward(model, row[None], hooks=[("blocks.0.hook_resid_pre", put)])[0], row)


def drawn(model: Any) -> Tensor:
    return sampled_tokens(model, PROMPTS, TOKENS, torch.Generator().manual_seed(6))


@pytest.mark.parametrize("case", CASES)
def test_losses_behind_every_prefix(case: tuple[str, str], family_model: Any) -> None:
    model = family_model(*case)
    measured = first_token_losses(model, PROMPTS, PREFIXES, TOKENS)
    assert list(measured) == [NONE, NEUTRAL, BOS, REGISTER, SECOND, MIDDLE]
    middle = (T - 1) // 2
    for row, tokens in enumerate(drawn(model).tolist()):
        rest = TEXT[row].tolist()[1:]
        for number, token in enumerate(tokens):
            whole = TEXT[row].tolist()
            expected = {
                NONE: losses_of(model, [token, *rest]),
                NEUTRAL: losses_of(model, [NEWLINE, token, *rest])[1:],
                BOS: losses_of(model, [0, token, *rest])[1:],
                REGISTER: losses_of(model, [11, token, *rest], VECTOR)[1:],
                SECOND: losses_of(model, [token, NEWLINE, *rest])[1:],
                MIDDLE: losses_of(model, [*whole[:middle], token, *whole[middle + 1 :]])[middle:],
            }
            for name, values in expected.items():
                np.testing.assert_allclose(measured[name][row, number], values, atol=2e-4)
    # The same predictions in all of them, and fewer behind the middle.
    assert {measured[name].shape for name in measured if name != MIDDLE} == {(N, TOKENS, T - 2)}


def test_spreads() -> None:
    rng = np.random.default_rng(0)
    losses = {NONE: rng.normal(size=(N, TOKENS, T - 2)), MIDDLE: rng.normal(size=(N, TOKENS, 14))}
    for row in range(N):
        means = [np.mean(losses[NONE][row, token, FAR:14]) for token in range(TOKENS)]
        expected = np.sqrt(sum((mean - np.mean(means)) ** 2 for mean in means) / (TOKENS - 1))
        assert spreads_at_same_distance(losses)[NONE][row] == pytest.approx(expected)
    np.testing.assert_allclose(spreads_at_same_distance(losses)[MIDDLE], spread(losses[MIDDLE][:, :, FAR:]))


def test_recall_by_place(family_model: Any) -> None:
    model = family_model("llama-grouped", "bridge")
    measured = recall_by_place(model, PROMPTS, PREFIXES)
    # Of 29 tokens a fifth is to be recalled; the last place leaves as much between the two.
    size, places = 5, [0, 4, 7, 10, 14]
    snippets = sampled_tokens(model, PROMPTS, size, torch.Generator().manual_seed(7)).tolist()
    for row, snippet in enumerate(snippets):
        unseen = TEXT[row].tolist()[:-size] + snippet
        for name, prefix in PREFIXES.items():

            def last(ids: list[int], prefix: int | Tensor | None = prefix) -> float:
                before = [] if prefix is None else [11 if isinstance(prefix, Tensor) else prefix]
                vector = prefix if isinstance(prefix, Tensor) else None
                return float(np.mean(losses_of(model, [*before, *ids], vector)[1 - size :]))

            assert list(measured[name]) == places
            for place in places:
                seen = unseen[:place] + snippet + unseen[place + size :]
                assert len(seen) == T - 1 and seen[-size:] == snippet
                assert measured[name][place][row] == pytest.approx(last(unseen) - last(seen), abs=2e-4)


def test_the_register_is_learned_on_a_frozen_model() -> None:
    model = load_model("p0-nano")
    text, held_out = natural_text(model, "stdlib", n=48, length=32).split()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    neutral = neutral_token(model, text)
    config = FirstTokenConfig(steps=15, batch=16)
    register = trained_register(model, text, neutral, config)
    assert torch.equal(register, trained_register(model, text, neutral, config))
    assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())
    assert all(weight.grad is None for weight in model.parameters())
    embedded = trained_register(model, text, neutral, FirstTokenConfig(steps=0))
    with torch.no_grad():
        start = forward(model, torch.tensor([[neutral]]), stop_at_layer=0)[0, 0]
    torch.testing.assert_close(embedded, start)
    losses = first_token_losses(model, held_out, {NEUTRAL: neutral, "start": embedded, REGISTER: register}, 2)
    far = {name: values[:, :, FAR:].mean((1, 2)) for name, values in losses.items()}
    # As a vector the token is still that token; as a register it serves texts it was not trained on.
    np.testing.assert_allclose(far["start"], far[NEUTRAL], atol=1e-4)
    assert (far[REGISTER] - far[NEUTRAL]).mean() < -0.005


def test_a_register_is_trained_once(tiny: Any, text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    counted = functools.wraps(trained_register)(lambda *given: calls.append(1) or trained_register(*given))
    monkeypatch.setattr(first_token, "trained_register", counted)
    model, config = copy.deepcopy(tiny), FirstTokenConfig(steps=2, batch=2)
    first, again = (prefixes_of(model, text, config)[REGISTER] for _ in range(2))
    assert isinstance(first, Tensor) and torch.equal(first, again) and len(calls) == 1
    # Other settings, other prompts and other weights make another one.
    prefixes_of(model, text, FirstTokenConfig(steps=1, batch=2))
    prefixes_of(model, text.subset(slice(1, None)), config)
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    assert not torch.equal(prefixes_of(model, text, config)[REGISTER], first) and len(calls) == 4


def test_the_neutral_token(tiny: Any, text: Any) -> None:
    newline = neutral_token(tiny, text)
    assert tiny.tokenizer.decode([newline]) == "\n"
    assert prefixes_of(tiny, text, FirstTokenConfig(steps=1, batch=2))[BOS] == tiny.tokenizer.bos_token_id
    ids = from_ids(torch.tensor([[5, 9, 9, 8], [9, 5, 8, 5]])).pad_left([4, 2], pad_token=5)
    # The padding does not count.
    assert neutral_token(wired_model(), ids) == 9
    assert BOS not in prefixes_of(wired_model(), random_tokens(64, 2, 24), FirstTokenConfig(steps=1, batch=2))


def test_the_shipped_model_hides_its_first_token() -> None:
    """What stands at P0 is half lost, so a prefix gives it back: the opposite of what the claim says."""
    model = load_model("p0-nano")
    prompts = natural_text(model, "stdlib", n=40, length=40)
    result = FirstToken(FirstTokenConfig(tokens=6, steps=5)).run(model, prompts)
    assert result.judgement is not None and result.judgement.verdict == "not reproduced"
    metrics = result.metrics
    assert metrics["spread_left_with_neutral_prefix_all_predictions"].low > 1.3
    assert metrics["spread_left_with_bos"].value > 1
    assert metrics["recall_of_middle_beyond_start_with_no_prefix"].low > 0.5
    back = metrics["recall_of_middle_beyond_start_with_bos"]
    assert back.high < metrics["recall_of_middle_beyond_start_with_no_prefix"].low
    reach = result.tables["reach"].set_index(["condition", "distance"])["value"]
    # The token itself predicts its neighbour only where it is not first.
    assert reach[NONE, "0"] < 0.3 * reach[MIDDLE, "0"] and reach[NEUTRAL, "0"] > 0.8 * reach[MIDDLE, "0"]
    assert any("'\\n'" in note for note in result.notes)
    for figure in result.figures.values():
        assert_legible(figure)


def test_where_there_is_nothing_to_vary_nothing_is_claimed() -> None:
    untrained = load_model("p0-nano", checkpoint=0)
    text = natural_text(untrained, "english", n=8, length=32)
    for model, prompts in ((untrained, text), (decoy_model(), random_tokens(64, 8, 32))):
        with pytest.raises(NotApplicable, match="no sink to explain"):
            FirstToken().run(model, prompts)
    wired, rows = wired_model(), random_tokens(64, 8, 32)
    with pytest.raises(NotApplicable, match="without padding"):
        FirstToken().run(wired, rows.pad_left([30] * 8))
    with pytest.raises(NotApplicable, match="at least 24 tokens, got 20"):
        FirstToken().run(wired, random_tokens(64, 8, 20))


def test_a_model_without_a_tokenizer_reads_random_tokens() -> None:
    result = FirstToken(FirstTokenConfig(tokens=3, steps=2)).run(wired_model(), random_tokens(64, 16, 26))
    assert result.judgement is not None and result.judgement.verdict == "not reproduced"
    assert any("most frequent" in note for note in result.notes) and any("random" in note for note in result.notes)
    assert "spread_left_with_bos" not in result.metrics
    for figure in result.figures.values():
        assert_legible(figure)
