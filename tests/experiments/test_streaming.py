"""What the first token is worth in a stream: against decoding token by token, and on models with and without a sink."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from p0circuit.experiments import NotApplicable, Streaming, StreamingConfig
from p0circuit.experiments.deployment.c17_streaming import Costs, costs_of, decoded, first_prediction
from p0circuit.models import load_model
from p0circuit.models.constructed.build import decoy_model
from p0circuit.prompts import natural_text, random_tokens
from p0circuit.results import Result
from tests.families import VOCAB, build
from tests.interventions.test_sliding_window import decode
from tests.literal import loss
from tests.report.test_figures import assert_legible

WINDOW = 4
SHORT = StreamingConfig(other_samples=8, long_windows=4, long_tokens=1024)
TINY = StreamingConfig(other_samples=4, long_windows=2, long_tokens=128)


@pytest.fixture(scope="module")
def nano() -> Result:
    model = load_model("p0-nano")
    return Streaming(SHORT).run(model, natural_text(model, "stdlib", n=48, length=64))


def test_losses_and_costs_against_token_by_token(family_model: Any) -> None:
    model, hf = family_model("llama-grouped", "bridge"), build("llama-grouped").double()
    prompts = random_tokens(VOCAB, 2, 20, seed=6)
    result = Streaming(StreamingConfig(window=WINDOW)).measure(model, prompts)
    start = first_prediction(WINDOW)
    assert start == WINDOW + 9

    def late(kept: tuple[int, ...], window: int = WINDOW) -> np.ndarray:
        return np.array([np.mean(loss(decode(hf, ids, kept, window), ids)[start:]) for ids in prompts.ids])

    four, full = late((0, 1, 2, 3)), late((), 20)
    dropped = [late(tuple(place for place in range(4) if place != gone)) - four for gone in range(4)]
    another = np.mean(dropped[1:], axis=0)
    expected = {
        "loss_added_by_dropping_p0": dropped[0].mean(),
        "loss_added_by_dropping_another": another.mean(),
        "dropping_p0_beyond_5_times_another": dropped[0].mean() - 5 * abs(another.mean()),
        "loss_added_with_the_window_alone": (late(()) - full).mean(),
        "loss_added_with_first_2_kept": (late((0, 1)) - full).mean(),
        "loss_added_with_position_8_kept": (late((8,)) - full).mean(),
    }
    for name, value in expected.items():
        assert abs(value) > 1e-4
        assert result.metrics[name].value == pytest.approx(value, abs=2e-5)
    assert result.tables["dropped"]["value"].tolist() == pytest.approx([cost.mean() for cost in dropped], abs=2e-5)
    table = result.tables["positions"].set_index(["kept", "tokens"])["value"]
    assert sorted(set(table.index.get_level_values("tokens"))) == [3, 6, 9, 11, 13, 15, 17, 19]
    first = np.mean([loss(decode(hf, ids, (0,), WINDOW), ids)[6:9] for ids in prompts.ids])
    assert table["P0 kept", 9] == pytest.approx(first, abs=2e-5)


def test_a_gain_does_not_pass_for_a_ratio() -> None:
    rng = np.random.default_rng(0)
    cost = 1 + 0.1 * rng.standard_normal(200)
    noise = 0.1 * rng.standard_normal(200)

    def of(p0: float, *others: float) -> Costs:
        return Costs(np.stack([p0 * cost, *(other * cost for other in others)]))

    clear = of(1.0, 0.1, 0.0, 0.2)
    assert clear.beyond.value == pytest.approx(cost.mean() * 0.5) and clear.beyond.low > 0
    assert clear.ratio is not None and clear.ratio.value == pytest.approx(10)
    assert of(1.0, 0.3, 0.3, 0.3).beyond.high < 0
    gain = of(1.0, -0.3, -0.3, -0.3)
    assert gain.ratio is None and gain.beyond.value == pytest.approx(cost.mean() * -0.5)
    nothing = Costs(np.stack([0.01 * noise, noise, -noise, noise]))
    assert nothing.ratio is None and nothing.beyond.low < 0


def test_p0_is_worth_more_than_its_neighbours_where_there_is_a_sink(nano: Result) -> None:
    assert nano.judgement is not None and nano.judgement.verdict == "reproduced"
    metrics = nano.metrics
    assert metrics["dropping_p0_over_dropping_another"].value > 5
    assert metrics["dropping_p0_beyond_5_times_another_with_bos"].n == 8
    window, kept, other = (
        metrics[f"loss_added_with_{name}"].value for name in ("the_window_alone", "p0_kept", "position_8_kept")
    )
    # One kept token does most of the work, if it is the first.
    assert window - kept > 4 * (window - other) > 0
    assert nano.notes[0].startswith("without BOS; sink heads: ")


def test_a_long_stream_is_beyond_what_full_attention_was_trained_on(nano: Result) -> None:
    table = nano.tables["long_positions"].set_index(["kept", "tokens"])["value"]
    assert sorted(set(table.index.get_level_values("tokens"))) == [*range(32, 255, 32), 255]
    # Trained on 128 tokens.
    assert table["full attention", 255] > table["first 4 kept", 255] + 1
    assert abs(table["first 4 kept", 255] - table["first 4 kept", 128]) < 0.5
    assert nano.metrics["long_stream_loss_with_full_attention_beyond_first_4_kept"].low > 0
    assert any(note.endswith("the stream is longer than the model can use") for note in nano.notes)


def test_figures_are_legible(nano: Result) -> None:
    for figure in nano.figures.values():
        assert_legible(figure)  # pyright: ignore[reportArgumentType]


def test_without_a_sink_the_first_token_is_one_of_many() -> None:
    untrained = load_model("p0-nano", checkpoint=0)
    text = natural_text(untrained, "english", n=12, length=32)
    for model, prompts in ((untrained, text), (decoy_model(), random_tokens(64, 12, 32))):
        result = Streaming(TINY).run(model, prompts)
        assert result.judgement is not None and result.judgement.verdict == "not reproduced"
        assert result.notes[0].endswith("so this measurement is a control")


def test_learned_positions_stay_what_they_were(family_model: Any) -> None:
    """The context is 64 tokens: a stream of two windows of 40 does not fit."""
    result = Streaming(SHORT).measure(family_model("gpt2", "bridge"), random_tokens(VOCAB, 3, 40))
    assert "the positions of this model are learned: they are not counted inside the cache" in result.notes
    assert "no long stream: its context is 64 tokens" in result.notes
    assert "long_positions" not in result.tables and not any(name.startswith("long") for name in result.metrics)


def test_the_long_stream_stands_behind_bos_like_the_prompts() -> None:
    from p0circuit.experiments.conditions import text_like

    model = load_model("p0-nano")
    prompts = natural_text(model, "english", n=4, length=16)
    assert set(text_like(model, prompts.prepend(0), 24, 3).ids[:, 0].tolist()) == {0}
    plain = text_like(model, prompts, 24, 3)
    assert plain.ids.shape == (3, 24) and 0 not in plain.ids
    drawn = text_like(decoy_model(), random_tokens(64, 4, 16), 24, 3)
    assert drawn.ids.shape == (3, 24)


def test_what_cannot_be_followed_is_not_applicable(family_model: Any) -> None:
    prompts = random_tokens(VOCAB, 3, 20)
    with pytest.raises(NotApplicable, match="need at least 16 tokens"):
        Streaming(StreamingConfig(window=5)).measure(family_model("llama", "bridge"), random_tokens(VOCAB, 3, 15))
    with pytest.raises(NotApplicable, match="windows of its own"):
        Streaming().measure(family_model("mistral", "bridge"), prompts)
    with pytest.raises(NotApplicable, match="ALiBi"):
        decoded(family_model("bloom", "bridge"), prompts, 5, [(0,)])
    with pytest.raises(NotApplicable, match="padded"):
        Streaming().measure(family_model("llama", "bridge"), prompts.pad_left(seed=1))


def test_costs_are_those_of_the_late_predictions() -> None:
    rows = np.zeros((2, 30))
    losses = {(0, 1, 2, 3): rows} | {
        tuple(place for place in range(4) if place != gone): rows + (np.arange(30) >= 20) * gone for gone in range(4)
    }
    costs = costs_of(losses, window=11)
    np.testing.assert_allclose(costs.each, [[0, 0], [1, 1], [2, 2], [3, 3]])
    assert costs.p0.value == 0 and costs.another.value == 2
