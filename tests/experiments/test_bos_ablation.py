"""With and without BOS: rates and losses against a literal computation on the very same predicted tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from p0circuit.experiments import BosAblation, BosAblationConfig, NotApplicable
from p0circuit.models.constructed.build import wired_model
from p0circuit.prompts import PromptSet, random_tokens
from p0circuit.results import Result
from p0circuit.stats import bootstrap
from tests.literal import loss, run_with_cache, score
from tests.tiny import HEADS, LAYERS

# Among the scores of the untrained model on rows of 12, so that the rates are neither 0 nor 1.
EPS = 0.26


@pytest.fixture(scope="module")
def result(tiny: Any, text: PromptSet) -> Result:
    return BosAblation(BosAblationConfig(eps=EPS)).run(tiny, text)


@pytest.fixture(scope="module")
def literal(tiny: Any, text: PromptSet) -> dict[str, dict[str, np.ndarray]]:
    """Per condition and quantity one number for each row."""
    found: dict[str, dict[str, Any]] = {}
    for name, prompts in (("without BOS", text), ("with BOS", text.prepend(tiny.tokenizer.bos_token_id))):
        scores, losses = [], []
        for row, ids in enumerate(prompts.ids):
            logits, cache = run_with_cache(tiny, ids)
            patterns = [cache[f"blocks.{layer}.attn.hook_pattern"][0] for layer in range(LAYERS)]
            scores.append([score(pattern, 0) for pattern in patterns])
            # By the text's own tokens: the third to the last but one are predicted in both conditions.
            shift = 1 if name == "with BOS" else 0
            by_target = {t - shift + 1: value for t, value in enumerate(loss(logits[0], ids))}
            targets = range(2, len(ids) - 1)
            assert [int(ids[target + shift]) for target in targets] == text.ids[row, 2:-1].tolist()
            losses.append(np.mean([by_target[target] for target in targets]))
        above = np.array(scores) > EPS
        found[name] = {
            "scores": np.array(scores),
            "sink_rate": above.mean((1, 2)),
            "sink_rate_from_layer_2": above[:, 2:].mean((1, 2)),
            "loss": np.array(losses),
        }
    return found


def test_every_line_of_the_summary(result: Result, literal: dict[str, dict[str, np.ndarray]]) -> None:
    table = result.tables["summary"].set_index(["quantity", "condition"])
    assert len(table) == 9
    for quantity in ("sink_rate", "sink_rate_from_layer_2", "loss"):
        without, with_bos = literal["without BOS"][quantity], literal["with BOS"][quantity]
        samples = {"without BOS": without, "with BOS": with_bos, "difference": without - with_bos}
        for name, values in samples.items():
            expected = bootstrap(values)
            assert table.loc[(quantity, name)].tolist() == pytest.approx(
                [expected.value, expected.low, expected.high, 5], rel=1e-5, abs=1e-6
            )
        assert result.metrics[f"{quantity}_without_bos"].value == pytest.approx(without.mean(), rel=1e-5)
        assert result.metrics[f"{quantity}_difference"].value == pytest.approx((without - with_bos).mean(), abs=1e-6)
    assert 0 < literal["without BOS"]["sink_rate"].mean() < 1


def test_the_heads_of_both_conditions(result: Result, literal: dict[str, dict[str, np.ndarray]]) -> None:
    table = result.tables["heads"].set_index(["condition", "layer"])
    assert len(table) == 2 * LAYERS and len(table.columns) == HEADS
    for name, quantities in literal.items():
        np.testing.assert_allclose(table.loc[name], quantities["scores"].mean(0), atol=1e-5)


def test_an_untrained_model_has_no_sink_to_lose(tiny: Any) -> None:
    from p0circuit.prompts import natural_text

    result = BosAblation().run(tiny, natural_text(tiny, "english", n=4, length=64))
    for name in ("sink_rate_without_bos", "sink_rate_difference"):
        assert (result.metrics[name].low, result.metrics[name].high) == (0, 0)
    # It predicts no better than chance, with BOS or without.
    assert result.metrics["loss_without_bos"].value == pytest.approx(np.log(tiny.cfg.d_vocab), abs=0.1)


def test_what_has_no_bos_is_not_applicable() -> None:
    with pytest.raises(NotApplicable, match=r"no BOS token.*run sink-map instead"):
        BosAblation().run(wired_model(), random_tokens(64, n=3, length=8))


def test_too_short_prompts_are_not_applicable(tiny: Any, text: PromptSet) -> None:
    def first(length: int) -> PromptSet:
        return PromptSet(text.ids[:, :length], text.attention_mask[:, :length], text.description)

    with pytest.raises(NotApplicable, match="at least 4 tokens, got 3"):
        BosAblation().run(tiny, first(3))
    assert np.isfinite(BosAblation().run(tiny, first(4)).metrics["loss_without_bos"].value)


@pytest.mark.usefixtures("shown_messages")
def test_a_second_run_says_what_it_read(tiny: Any, text: PromptSet, capsys: pytest.CaptureFixture[str]) -> None:
    first = BosAblation().run(tiny, text)
    capsys.readouterr()
    second = BosAblation().run(tiny, text)
    assert "bos-ablation: 7 of 7 recordings read from the cache" in capsys.readouterr().err
    assert second.metrics == first.metrics


def test_the_figure_has_a_panel_per_quantity_and_names_the_model(result: Result) -> None:
    figure: Any = result.figures["bars"]
    assert figure.get_suptitle() == "tiny: what removing BOS changes"
    assert [axis.get_title() for axis in figure.axes] == ["Sink rate", "Sink rate, layers ≥ 2", "Loss"]
    assert [axis.get_ylabel() for axis in figure.axes] == ["share of heads", "share of heads", "nats per token"]
    for axis in figure.axes:
        assert [label.get_text() for label in axis.get_xticklabels()] == ["with\nBOS", "without\nBOS"]
