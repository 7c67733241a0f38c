"""The loss without the sink and the spread of a changed token, against runs edited by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from p0circuit.experiments.base import NotApplicable
from p0circuit.experiments.paper.c12_function import Function, FunctionConfig
from p0circuit.experiments.sink_under_study import StudiedSink
from p0circuit.experiments.surgery import random_offsets, row_of_another_token
from p0circuit.models import load_model
from p0circuit.models.constructed.build import decoy_model, wired_model
from p0circuit.prompts import natural_text, random_tokens
from tests.experiments.test_structure import distinct
from tests.families import VOCAB
from tests.literal import loss, norm
from tests.report.test_figures import assert_legible

T, HALF, DRAWS = 14, 7, 2
HEADS = ((0, 1), (2, 0), (2, 3))
CONFIG = FunctionConfig(draws=DRAWS)


def sink_of(model: Any) -> StudiedSink:
    prompts = random_tokens(VOCAB, 4, T, seed=3)
    return StudiedSink(model, HEADS, prompts, prompts)


def edited(model: Any, ids: Tensor, hooks: list[Any]) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the stream after every block."""
    streams: list[Tensor] = []

    def keep(stream: Tensor, hook: Any) -> None:
        streams.append(stream[0])

    ends = [(f"blocks.{block}.hook_resid_post", keep) for block in range(3)]
    with torch.no_grad():
        return model.run_with_hooks(ids[None], fwd_hooks=[*hooks, *ends])[0], streams


def hiding(place: int) -> list[Any]:
    """Later queries of the heads do not see the key at `place`."""

    def hide(scores: Tensor, hook: Any) -> Tensor:
        for layer, head in HEADS:
            if layer == hook.layer():
                scores[0, head, place + 1 :, place] = -torch.inf
        return scores

    return [(f"blocks.{layer}.attn.hook_attn_scores", hide) for layer in (0, 2)]


def moving(target: int) -> list[Any]:
    """What queries from `target` on gave to P0 goes to `target`."""

    def move(pattern: Tensor, hook: Any) -> Tensor:
        for layer, head in HEADS:
            if layer == hook.layer():
                pattern[0, head, target:, target] += pattern[0, head, target:, 0]
                pattern[0, head, target:, 0] = 0
        return pattern

    return [(f"blocks.{layer}.attn.hook_pattern", move) for layer in (0, 2)]


def test_losses_of_the_same_predictions_in_all_runs(family_model: Any) -> None:
    model = family_model("gpt2", "hooked")
    ids = sink_of(model).prompts.ids
    metrics = Function(CONFIG).measure_on(sink_of(model)).metrics

    def losses(row: int, hooks: list[Any]) -> float:
        return float(np.mean(loss(edited(model, ids[row], hooks)[0], ids[row])[HALF:]))

    clean = np.array([losses(row, []) for row in range(4)])
    p0 = np.array([losses(row, hiding(0)) for row in range(4)]) - clean
    places = [random_offsets(4, seed, 1, HALF) for seed in (4, 5)]
    assert all(1 <= int(place) < HALF for place in torch.cat(places))
    beside = np.mean([[losses(row, hiding(int(place[row]))) for row in range(4)] for place in places], axis=0) - clean
    moved = np.array([losses(row, moving(int(places[0][row]))) for row in range(4)]) - clean
    expected = {
        "loss_added_by_hiding_p0": p0,
        "loss_added_by_hiding_a_random_position": beside,
        "loss_added_by_hiding_p0_beyond_random": p0 - beside,
        "loss_added_by_moving_the_sink": moved,
    }
    for name, values in expected.items():
        assert abs(values).min() > 1e-6
        assert metrics[name].value == pytest.approx(values.mean(), abs=1e-5)
    interval = metrics["loss_added_by_hiding_p0_beyond_random"]
    # The samples are paired: the interval lies within the range of their differences.
    assert (p0 - beside).min() - 1e-5 <= interval.low <= interval.high <= (p0 - beside).max() + 1e-5


def test_zeroed_values_leave_attention_alone(family_model: Any) -> None:
    """GPT-2 has a value of its own for each head: it can be zeroed where it is made, for the queries of the half."""
    model = family_model("gpt2", "hooked")
    ids = sink_of(model).prompts.ids

    def zero(values: Tensor, hook: Any) -> Tensor:
        for layer, head in HEADS:
            if layer == hook.layer():
                values[0, 0, head] = 0
        return values

    hooks = [(f"blocks.{layer}.attn.hook_v", zero) for layer in (0, 2)]
    added = [
        np.mean(loss(edited(model, row, hooks)[0], row)[HALF:]) - np.mean(loss(edited(model, row, [])[0], row)[HALF:])
        for row in ids
    ]
    metrics = Function(CONFIG).measure_on(sink_of(model)).metrics
    assert metrics["loss_added_by_zeroing_p0_value"].value == pytest.approx(np.mean(added), abs=1e-5)


def test_how_far_a_changed_token_reaches(family_model: Any) -> None:
    model = family_model("gpt2", "hooked")
    ids = sink_of(model).prompts.ids
    tables = Function(CONFIG).measure_on(sink_of(model)).tables
    other, place = ids[row_of_another_token(ids[:, HALF]), HALF], random_offsets(4, 4, 1, HALF)
    spread: dict[str, list[Any]] = {"with the sink": [], "P0 hidden": [], "random hidden": []}
    for row in range(4):
        changed = ids[row].clone()
        changed[HALF] = other[row]
        assert (changed != ids[row]).sum() == 1
        for name, hooks in zip(spread, ([], hiding(0), hiding(int(place[row]))), strict=True):
            before, after = (edited(model, each, hooks)[1] for each in (ids[row], changed))
            spread[name].append(
                [[norm(after[b][q] - before[b][q]) / norm(before[b][q]) for q in range(HALF + 1, T)] for b in range(3)]
            )
    by_block = tables["spread_by_block"].set_index(["measured", "run", "after_block"])["value"]
    by_distance = tables["spread_by_distance"].set_index(["measured", "run", "distance"])["value"]
    clean = np.array(spread["with the sink"])
    for name, values in spread.items():
        mean = np.mean(values, axis=(0, 2))
        for block in range(3):
            assert by_block["relative change", name, str(block)] == pytest.approx(mean[block], rel=1e-4)
            ratio = mean[block] / clean.mean((0, 2))[block]
            assert by_block["over with the sink", name, str(block)] == pytest.approx(ratio, rel=1e-4)
        for label, steps in {"1": [0], "2-3": [1, 2], "4-6": [3, 4, 5]}.items():
            expected = np.array(values)[:, -1, steps].mean()
            assert by_distance["relative change", name, label] == pytest.approx(expected, rel=1e-4)


def test_before_the_first_sink_head_nothing_is_different(family_model: Any) -> None:
    late = replace(sink_of(family_model("llama-grouped", "bridge")), heads=((2, 0),))
    table = Function(CONFIG).measure_on(late).tables["spread_by_block"]
    ratios = table[(table["measured"] == "over with the sink") & (table["run"] == "P0 hidden")]
    assert ratios["value"].tolist()[:2] == [1, 1] and ratios["value"].iloc[2] != 1


@pytest.mark.parametrize("case", [("neox", "hooked"), ("olmoe", "bridge"), ("bloom", "bridge"), ("mistral", "hooked")])
def test_other_architectures_are_measured_too(case: tuple[str, str], family_model: Any) -> None:
    result = Function(FunctionConfig(draws=1)).measure_on(sink_of(family_model(*case)))
    assert all(np.isfinite(interval.value) for interval in result.metrics.values())


def test_the_sink_of_the_wired_model_is_of_no_use() -> None:
    """Its values are drained and its logits say the token again: by construction nothing gains from the sink."""
    result = Function().run(wired_model(), distinct(12, 32))
    assert result.judgement is not None and result.judgement.verdict == "not reproduced"
    assert abs(result.metrics["loss_added_by_zeroing_p0_value"].value) < 1e-3
    assert any("random tokens" in note for note in result.notes)
    for figure in result.figures.values():
        assert_legible(figure)


def test_where_there_is_no_sink_nothing_is_claimed() -> None:
    untrained = load_model("p0-nano", checkpoint=0)
    text = natural_text(untrained, "english", n=8, length=32)
    for model, prompts in ((untrained, text), (decoy_model(), random_tokens(64, 8, 32))):
        with pytest.raises(NotApplicable, match="no sink to explain"):
            Function().run(model, prompts)


def test_padded_and_short_rows_are_declined(family_model: Any) -> None:
    found = sink_of(family_model("gpt2", "hooked"))
    padded = replace(found, prompts=found.prompts.pad_left(seed=1))
    with pytest.raises(NotApplicable, match="without padding"):
        Function().measure_on(padded)
    with pytest.raises(NotApplicable, match="at least 8 tokens, got 7"):
        Function().measure_on(replace(found, prompts=random_tokens(VOCAB, 4, 7)))
