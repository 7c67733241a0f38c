"""With and without BOS: rows told apart, the same pair from either, and the condition a model has its sink in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from p0circuit.experiments import (
    AnyToken,
    AnyTokenConfig,
    BosAblation,
    Mitigations,
    MitigationsConfig,
    NotApplicable,
    SinkMap,
)
from p0circuit.experiments.conditions import (
    default_text,
    pooled_prompts_for,
    prompts_for,
    text_as_it_is,
    text_like,
    with_and_without_bos,
)
from p0circuit.experiments.sink_condition import ROWS, SHARED, find_condition, rows_to_choose_on, unused_rows
from p0circuit.experiments.sink_summary import after_bos
from p0circuit.experiments.sink_under_study import studied_sink
from p0circuit.models import load_model
from p0circuit.models.controls import untrained_weights
from p0circuit.prompts import (
    SOME_BOS,
    TWO_BOS,
    WITH_BOS,
    WITHOUT_BOS,
    PromptSet,
    condition_of,
    from_ids,
    natural_text,
    random_tokens,
)

# The tokenizers of the shipped models have a BOS whose id is 0.
BOS = 0


@pytest.fixture(scope="module")
def nano() -> Any:
    """Its sink is in text as it is."""
    return load_model("p0-nano")


@pytest.fixture(scope="module")
def on_bos() -> Any:
    """Its sink depends on BOS: it was trained on rows that all begin with it."""
    return load_model("bos-0")


def text_of(model: Any, n: int = 32, length: int = 40) -> PromptSet:
    return pooled_prompts_for(model, "stdlib", n, length)


def test_rows_are_told_apart_by_what_they_begin_with(nano: Any) -> None:
    assert nano.tokenizer.bos_token_id == BOS
    text = text_of(nano, n=4)
    some = from_ids(torch.cat([text.ids, text.prepend(BOS).ids]))
    named = {WITHOUT_BOS: text, WITH_BOS: text.prepend(BOS), TWO_BOS: text.prepend(BOS).prepend(BOS), SOME_BOS: some}
    for name, prompts in named.items():
        assert condition_of(nano, prompts) == name
    padded = text.prepend(BOS).pad_left([9, 8, 40, 7], pad_token=5)
    assert condition_of(nano, padded) == WITH_BOS
    # What pads the rows is no token of theirs, though it be BOS.
    assert condition_of(nano, text.pad_left([9, 8, 40, 7], pad_token=BOS)) == WITHOUT_BOS
    assert condition_of(load_model("wired"), random_tokens(64, n=2, length=9, bos=BOS)) == WITHOUT_BOS


def test_the_pair_is_the_same_whatever_it_is_made_from(nano: Any) -> None:
    text = text_of(nano, n=5)
    expected = {name: rows.ids.tolist() for name, rows in with_and_without_bos(nano, text).items()}
    assert expected == {WITHOUT_BOS: text.ids.tolist(), WITH_BOS: text.prepend(BOS).ids.tolist()}
    for prompts in (text.prepend(BOS), text.prepend(BOS).prepend(BOS)):
        assert {name: rows.ids.tolist() for name, rows in with_and_without_bos(nano, prompts).items()} == expected
    # Rows that were given with their BOS keep it, and are shorter without.
    given = from_ids([[BOS, 7, 8, 9], [BOS, 9, 8, 7]])
    pair = with_and_without_bos(nano, given)
    assert pair[WITH_BOS].ids.tolist() == given.ids.tolist()
    assert pair[WITHOUT_BOS].ids.tolist() == [[7, 8, 9], [9, 8, 7]]
    with pytest.raises(NotApplicable, match="1 of 2 rows begin with BOS"):
        text_as_it_is(nano, from_ids([[BOS, 7, 8], [6, 7, 8]]))
    with pytest.raises(NotApplicable, match="2 of 2 rows begin with BOS, and not all with the same number"):
        text_as_it_is(nano, from_ids([[BOS, BOS, 8], [BOS, 7, 8]]))
    padded = text.pad_left([9, 8, 40, 7, 6])
    assert list(with_and_without_bos(nano, padded)) == [WITHOUT_BOS]


def test_new_text_has_as_many_bos_as_the_prompts(nano: Any) -> None:
    text = text_of(nano, n=6)
    begun = natural_text(nano, "stdlib", n=6, length=40, first_token="bos")
    for prompts, count in ((text, 0), (begun, 1), (text.prepend(BOS), 1), (text.prepend(BOS).prepend(BOS), 2)):
        assert text_like(nano, prompts, 24, 3).count_leading(BOS).tolist() == [count] * 3


def test_the_condition_is_the_first_in_which_there_is_a_sink(nano: Any, on_bos: Any) -> None:
    text = text_of(nano)
    as_it_is = find_condition(nano, text)
    assert as_it_is.name == WITHOUT_BOS and as_it_is.prompts is text
    assert "p0-nano has its sink in text as it is" in as_it_is.summary and "not measured on" in as_it_is.summary
    after = find_condition(on_bos, text_of(on_bos))
    assert after.name == WITH_BOS and condition_of(on_bos, after.prompts) == WITH_BOS
    assert after.prompts.description["behind"] == BOS
    assert "bos-0 has its sink in text after BOS" in after.summary and "none in text as it is" in after.summary
    # By the rule of `studied_sink`, on the rows that it says.
    rows, _ = rows_to_choose_on(on_bos, text_of(on_bos))
    with pytest.raises(NotApplicable, match="no sink to explain"):
        studied_sink(on_bos, rows)
    assert after.excess == {WITH_BOS: studied_sink(on_bos, rows.prepend(BOS)).excess}
    # A choice that was made is not made again.
    again = find_condition(on_bos, after.prompts)
    assert again.prompts is after.prompts and again.excess == {} and "given with BOS" in again.summary


def test_without_a_sink_or_a_bos_text_stays_as_it_is(nano: Any) -> None:
    text = text_of(nano)
    with untrained_weights(nano):
        none = find_condition(nano, text)
    assert none.name == WITHOUT_BOS and none.prompts is text and not none.excess
    assert "no sink" in none.summary and "neither in text as it is nor after BOS" in none.summary
    wired = load_model("wired")
    prompts = random_tokens(64, n=32, length=20)
    assert "it has no tokenizer" in find_condition(wired, prompts).summary
    padded = text.pad_left()
    assert "padded rows" in find_condition(nano, padded).summary


def test_the_rows_it_is_chosen_on_share_no_text_with_the_prompts(nano: Any) -> None:
    text = text_of(nano, n=48)
    rows, told = rows_to_choose_on(nano, text)
    assert rows.n == ROWS and "not measured on" in told
    used = {tuple(row[start : start + SHARED]) for row in text.ids.tolist() for start in range(40 - SHARED + 1)}
    for row in rows.ids.tolist():
        assert not used & {tuple(row[start : start + SHARED]) for start in range(40 - SHARED + 1)}
    assert unused_rows(text, text) == []
    # Ids that were given, and text that is all in use, leave nothing else to choose on.
    for prompts in (from_ids(text.ids), text_of(nano, n=1400)):
        same, told = rows_to_choose_on(nano, prompts)
        assert torch.equal(same.ids, prompts.ids[:ROWS]) and "measured on, too" in told


def test_c2_measures_the_same_in_either_condition(on_bos: Any) -> None:
    text = text_of(on_bos, n=24)
    plain, after = (BosAblation().run(on_bos, prompts) for prompts in (text, text.prepend(BOS)))
    assert plain.metrics == after.metrics
    assert plain.tables["heads"].equals(after.tables["heads"]) and plain.notes == after.notes
    assert plain.judgement is not None and plain.judgement.verdict == "not reproduced"
    assert any("the sink depends on BOS" in note for note in after.notes)
    assert any("does not depend on BOS" in note for note in BosAblation().run(load_model("p0-nano"), text).notes)
    # Rows that were given with BOS have a token less without it: the same targets all the same.
    given = BosAblation().run(on_bos, from_ids(text.prepend(BOS).ids))
    assert given.metrics["loss_without_bos"].value == pytest.approx(plain.metrics["loss_without_bos"].value, abs=0.2)
    with pytest.raises(NotApplicable, match="padded"):
        BosAblation().run(on_bos, text.pad_left())


def test_c3_fails_where_only_bos_is_the_sink(on_bos: Any, nano: Any) -> None:
    config = AnyTokenConfig(continuations=8, full_tokens=16, full_continuations=2, probe_tokens=16)
    bound = AnyToken(config).run(on_bos, text_of(on_bos, n=24).prepend(BOS))
    assert bound.judgement is not None and bound.judgement.verdict == "not reproduced"
    assert bound.metrics["median_score_over_that_of_bos"].high < 0.5
    assert any("the sink depends on BOS" in note for note in bound.notes)
    # By hand: every token's score as a row of the same table, BOS's among them.
    scores = bound.tables["tokens"].set_index("token")["sink_score"]
    assert bound.metrics["median_score_over_that_of_bos"].value == pytest.approx(scores.median() / scores[BOS], rel=0.2)
    free = AnyToken(config).run(nano, text_of(nano, n=24).prepend(BOS))
    assert free.metrics["median_score_over_that_of_bos"].low > 0.5
    assert "median_score_over_that_of_bos" not in AnyToken(config).run(nano, text_of(nano, n=24)).metrics


def test_what_chooses_its_condition_itself_goes_with_that_of_the_prompts(on_bos: Any, nano: Any) -> None:
    for model, expected in ((on_bos, WITH_BOS), (nano, WITHOUT_BOS)):
        text = text_of(model)
        sink = studied_sink(model, text, in_either_condition=True)
        assert sink.condition == expected
        again = studied_sink(model, find_condition(model, text).prompts, in_either_condition=True)
        assert (again.heads, again.condition) == (sink.heads, expected)
        assert torch.equal(again.prompts.ids, sink.prompts.ids)
    # Chosen by whoever put BOS there, though the text alone has a sink.
    assert studied_sink(nano, text_of(nano).prepend(BOS), in_either_condition=True).condition == WITH_BOS
    for prompts in (text_of(nano), text_of(nano).prepend(BOS)):
        assert torch.equal(with_and_without_bos(nano, prompts)[WITHOUT_BOS].ids, text_of(nano).ids)
        assert torch.equal(with_and_without_bos(nano, prompts)[WITH_BOS].ids, text_of(nano).prepend(BOS).ids)


def test_remedies_are_the_same_from_either_condition(on_bos: Any) -> None:
    text = text_of(on_bos, n=16)
    few = Mitigations(MitigationsConfig(samples=6, int8_samples=4, spread_samples=2, tokens=2, register_steps=2))
    plain, after = (few.run(on_bos, prompts) for prompts in (text, text.prepend(BOS)))
    assert plain.metrics == after.metrics


def test_the_sink_map_shows_the_heads_of_the_condition(on_bos: Any) -> None:
    text = text_of(on_bos, n=8)
    plain, after = (SinkMap().run(on_bos, prompts) for prompts in (text, text.prepend(BOS)))
    assert plain.metrics == after.metrics
    assert after.view is not None and after.view.tokens[0] == "<|bos|>"
    assert any("these prompts begin with BOS" in note for note in after.notes)


def test_the_sink_after_bos_is_told_where_there_is_none_without(on_bos: Any, nano: Any) -> None:
    told = after_bos(on_bos, text_of(on_bos, n=40))
    assert told is not None and told["n"] == 32 and told["sink_rate"] > 0.2
    assert after_bos(on_bos, text_of(on_bos).prepend(BOS)) is None
    assert after_bos(nano, text_of(nano)) is None
    with untrained_weights(nano):
        assert after_bos(nano, text_of(nano)) is None
    assert after_bos(load_model("wired"), random_tokens(64, n=32, length=20)) is None


def test_the_text_is_that_of_the_model(nano: Any, family_model: Any) -> None:
    assert default_text(nano) == "stdlib"
    prompts = prompts_for(nano, None, 4, 16)
    assert prompts.fingerprint() == prompts_for(nano, "stdlib", 4, 16).fingerprint()
    assert (prompts.description["source"], prompts.description["text_chosen_by"]) == ("stdlib", "the model")
    assert prompts_for(nano, "english", 4, 16).description["text_chosen_by"] == "the caller"
