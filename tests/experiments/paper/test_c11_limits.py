"""The limits: exact on the wired model, with and without windows, and its parts against plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from p0circuit.experiments import NotApplicable
from p0circuit.experiments.paper.c11_limits import (
    Limits,
    LimitsConfig,
    blind_queries,
    different_tokens,
    with_repeated_prefix,
)
from p0circuit.interventions.pairs import shift_prompts
from p0circuit.models import load_model
from p0circuit.models.constructed.build import decoy_model, wired_model
from p0circuit.models.hooked_transformer import has_hooked_transformer
from p0circuit.prompts import from_ids, natural_text, random_tokens
from p0circuit.recording.record import record
from p0circuit.results import Result
from p0circuit.sink import uniform_excess
from tests.experiments.wired import distinct, embedded_sink, predicted_scores
from tests.families import VOCAB

LENGTH = 24
QUICK = LimitsConfig(repetitions=(1, 2, 4, 8), prefixes=(1, 3), lengths=(8, 12, 48, 512))


@pytest.fixture(scope="module", params=["rotary", "learned"])
def wired(request: pytest.FixtureRequest) -> Result:
    return Limits(QUICK).run(wired_model(request.param), distinct(12, LENGTH))


def shared_score(copies: int, length: int, offset: int = 0) -> float:
    """The wired sink heads' score of a position among the first `copies`, which are the same token."""
    ids = torch.tensor([[0] * copies + list(range(1, 1 + length - copies))])
    return float(predicted_scores(ids, offset)[0])


def test_one_repeated_token_leaves_what_uniform_attention_gives(wired: Result) -> None:
    """So rotary positions meet the threshold; the learned ones of this model do not, since nothing reads them."""
    table = wired.tables["repetitions"].set_index(["tokens", "count", "quantity"])["value"]
    text = table["repeated", 1, "excess"]
    assert text == pytest.approx(shared_score(1, LENGTH), abs=2e-3)
    assert wired.metrics["excess_on_one_repeated_token"].value == pytest.approx(uniform_excess(LENGTH), abs=1e-5)
    assert wired.judgement is not None
    left = "excess_left_of_one_repeated_token"
    if left in wired.metrics:
        assert wired.judgement.verdict == "reproduced"
    else:
        left = "excess_kept_with_learned_positions"
        assert wired.judgement.verdict == "not reproduced"
    assert wired.metrics[left].value == pytest.approx(uniform_excess(LENGTH) / text, rel=1e-4)
    assert wired.metrics["excess_left_of_different_tokens"].value == pytest.approx(1, abs=1e-3)


def test_copies_share_the_sink_in_equal_parts(wired: Result) -> None:
    table = wired.tables["repetitions"].set_index(["tokens", "count", "quantity"])["value"]
    for count in (2, 4):
        assert table["repeated", count, "score of P0"] == pytest.approx(shared_score(count, LENGTH), abs=3e-3)
        last = shared_score(count, LENGTH, count - 1)
        assert table["repeated", count, "score of the last of them"] == pytest.approx(last, abs=3e-3)
        assert table["different", count, "score of P0"] == pytest.approx(shared_score(1, LENGTH), abs=3e-3)
        assert table["different", count, "score of the last of them"] == pytest.approx(0, abs=3e-3)
    assert "P0 is imitated by 2 copies of its token or more: the last one has half of P0's score" in wired.notes
    assert any(
        note.startswith("P0 loses half of its excess score if its token is repeated 4 times") for note in wired.notes
    )


def test_a_prefix_takes_the_sink_with_it(wired: Result) -> None:
    table = wired.tables["prefixes"].set_index(["prefix", "score_of"])["value"]
    assert sorted(set(table.index.get_level_values(0))) == [0, 1, 3]
    assert table[0, "the text's first token"] == table[0, "the new first token"]
    chosen = distinct(12, LENGTH).split()[1]
    for prefix in (1, 3):
        # A prefix of the very same token is a copy of it: one row in 64.
        shifted = shift_prompts(chosen, prefix, 64).shifted.ids
        for name, place in (("the text's first token", prefix), ("the new first token", 0)):
            assert table[prefix, name] == pytest.approx(predicted_scores(shifted, place).mean(), abs=2e-3)
    assert table[3, "the text's first token"] < 0.01 < 0.7 < table[3, "the new first token"]


def test_lengths_go_as_far_as_the_context_and_what_is_left_out_is_named(wired: Result) -> None:
    table = wired.tables["lengths"].set_index(["length", "score_of"])
    assert list(dict.fromkeys(table.index.get_level_values(0))) == [12, LENGTH, 48]
    assert table.loc[(12, "P0"), "value"] == pytest.approx(shared_score(1, 12), abs=2e-3)
    assert table.loc[(12, "position 8"), "value"] < 1e-2
    assert "length 8: left out, there is no query after position 8" in wired.notes
    assert "length 512: left out, the context is 256 tokens" in wired.notes
    few = Limits(LimitsConfig(lengths=(16, 200), tokens=420)).run(wired_model(), distinct(12, LENGTH))
    assert few.tables["lengths"].set_index("length")["n"].to_dict() == {16: 6, LENGTH: 6, 200: 2}


def test_the_figure_has_a_panel_for_each_sweep(wired: Result) -> None:
    figure: Any = wired.figures["limits"]
    titles = ["First token repeated", "Tokens put before the text", "Length"]
    assert [axis.get_title() for axis in figure.axes] == titles
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1", "2", "4", "8", "all"]


def test_learned_positions_that_make_the_sink_keep_it() -> None:
    result = Limits(QUICK).run(embedded_sink(), distinct(12, LENGTH))
    assert result.judgement is not None and result.judgement.verdict == "reproduced"
    assert result.metrics["excess_kept_with_learned_positions"].value == pytest.approx(1, abs=1e-2)
    assert "P0 is never imitated: no copy of its token has half of P0's score" in result.notes
    assert "P0 keeps more than half of its excess score with any number of copies of its token" in result.notes


@pytest.mark.parametrize("layers", [(0, 1, 2), (0, 1), (2,)])
def test_a_window_that_hides_p0_has_no_sink_at_it(layers: tuple[int, ...]) -> None:
    """All blocks windowed, or all but the one of the sink heads, or that one alone."""
    window = 14
    result = Limits(QUICK).run(windowed(window, layers), distinct(12, LENGTH))
    assert result.judgement is not None and result.judgement.verdict == "reproduced"
    metric = result.metrics["attention_to_p0_from_queries_that_cannot_see_it"]
    assert (metric.value, metric.low, metric.high) == (0, 0, 0)
    oldest = result.metrics.get("attention_of_windowed_sink_heads_to_the_oldest_key_in_view")
    free = result.metrics.get("attention_of_other_sink_heads_to_p0_from_the_same_queries")
    if 2 in layers:
        # No key is recognised any more, so attention is uniform: the sink has not moved to what is now the first key.
        assert free is None and oldest is not None and oldest.value == pytest.approx(1 / window, abs=2e-3)
        table = result.tables["lengths"].set_index(["length", "score_of"])["value"]
        assert table[LENGTH, "P0"] == pytest.approx(shared_score(1, window) * window / LENGTH, abs=5e-3)
    else:
        assert oldest is None and free is not None and free.value > 0.95
    # What is not about windows is measured on as many tokens as the window shows.
    left = uniform_excess(window) / shared_score(1, window)
    assert result.metrics["excess_left_of_one_repeated_token"].value == pytest.approx(left, abs=2e-3)
    assert any(note.startswith("a window of 14 would mask P0") for note in result.notes)


def windowed(window: int, layers: tuple[int, ...]) -> Any:
    """The wired model, some of whose blocks see no more than `window` keys."""
    if not has_hooked_transformer():
        pytest.skip("this TransformerLens has no HookedTransformer")
    model = wired_model(backend="hooked")
    model.cfg.use_local_attn, model.cfg.window_size = True, window
    model.cfg.attn_types = ["local" if layer in layers else "global" for layer in range(3)]
    for layer in layers:
        model.blocks[layer].attn.attn_type = "local"
    return model


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_blind_queries_against_a_loop(family_model: Any, backend: str) -> None:
    """Mistral with a window of 6 hides P0 from the sixth position on; a size of 4 is blind in name only."""
    model = family_model("mistral", backend)
    prompts = random_tokens(VOCAB, n=3, length=15)
    for size in (6, 4):
        found = record(model, prompts, blind_queries(size))
        for row, ids in enumerate(prompts.ids):
            patterns = model.run_with_cache(ids[None])[1]
            for layer in range(3):
                pattern = patterns[f"blocks.{layer}.attn.hook_pattern"][0]
                for head in range(4):
                    to_p0 = np.mean([float(pattern[head, query, 0]) for query in range(size, 15)])
                    oldest = np.mean([float(pattern[head, query, query - size + 1]) for query in range(size, 15)])
                    assert found[row, layer, head].tolist() == pytest.approx([to_p0, oldest], abs=1e-6)
        assert bool((found[..., 0] == 0).all()) == (size == 6)


def test_opened_replaces_the_second_to_the_last_of_so_many_tokens() -> None:
    prompts = from_ids([[1, 2, 3, 4, 5], [0, 6, 7, 8, 9]], [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    first = torch.tensor([[1], [6]])
    assert with_repeated_prefix(prompts, first, 1).ids.tolist() == prompts.ids.tolist()
    assert with_repeated_prefix(prompts, first, 3).ids.tolist() == [[1, 1, 1, 4, 5], [0, 6, 6, 6, 9]]
    assert with_repeated_prefix(prompts, first, 5).ids.tolist() == [[1] * 5, [0, 6, 6, 6, 6]]
    assert with_repeated_prefix(prompts, 10 + torch.arange(10).view(2, 5), 2).ids.tolist() == [
        [1, 11, 3, 4, 5],
        [0, 6, 17, 8, 9],
    ]


def test_different_tokens_are_different_and_not_the_first(tiny: Any) -> None:
    prompts = natural_text(tiny, "english", n=6, length=40)
    drawn = different_tokens(tiny, prompts)
    for row, first in zip(drawn.tolist(), prompts.ids[:, 0].tolist(), strict=True):
        assert len({first, *row}) == 41
        assert not {*row} & set(tiny.tokenizer.all_special_ids)
    # A vocabulary smaller than the row is used up before anything comes twice.
    long = different_tokens(wired_model(), random_tokens(64, n=2, length=100))
    assert long.shape == (2, 100) and all(len(set(row[:63])) == 63 for row in long.tolist())


def test_a_trained_rotary_model_on_texts_it_has_and_has_not_seen() -> None:
    model = load_model("p0-nano")
    prompts = natural_text(model, "stdlib", n=24, length=32, first_token="random")
    result = Limits(LimitsConfig(lengths=(16, 96, 2048), tokens=400)).run(model, prompts)
    assert result.judgement is not None and result.judgement.verdict == "reproduced"
    assert result.tables["texts"]["text"].tolist() == ["the same text", "english", "code", "random tokens"]
    assert set(result.tables["lengths"]["length"]) == {16, 32, 96, 2048}
    assert result.metrics["excess_left_of_different_tokens"].value > 0.5
    assert result.metrics["excess_on_english"].low > 0.2


def test_nothing_to_explain_is_not_applicable(family_model: Any) -> None:
    model = load_model("p0-nano", checkpoint=0)
    with pytest.raises(NotApplicable, match="no sink to explain"):
        Limits().run(model, natural_text(model, "stdlib", n=16, length=32))
    with pytest.raises(NotApplicable, match="no sink to explain"):
        Limits().run(decoy_model(), distinct(12, LENGTH))
    with pytest.raises(NotApplicable, match="6 tokens are in view at once"):
        Limits().run(family_model("mistral", "bridge"), random_tokens(VOCAB, n=4, length=20))
