"""The key side: each part of a score against plain loops, and the wired heads, whose query is a constant."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from p0circuit.experiments import NotApplicable
from p0circuit.experiments.paper.c10_key_side import PARTS, KeySide, _parts_at, mean_query
from p0circuit.interventions.closed_form import ScoreForm, key_hook, query_hook
from p0circuit.models import describe, load_model
from p0circuit.models.constructed.build import wired_model
from p0circuit.models.constructed.truth import wired_truth
from p0circuit.prompts import from_ids, random_tokens
from p0circuit.recording.record import record
from tests.literal import median, norm, run_with_cache

LAYER, HEADS = 1, (0, 3)


def literal(model: Any, ids: Tensor, mean: Tensor, offset: int) -> list[list[float]]:
    """`PARTS` of one row without padding, in plain loops."""
    _, cache = run_with_cache(model, ids)
    query, key = (cache[name(model, LAYER)][0].double() for name in (query_hook, key_hook))
    scores = cache[f"blocks.{LAYER}.attn.hook_attn_scores"][0].double()
    form, length, window = ScoreForm.of(model, LAYER), len(ids), describe(model).window[LAYER]
    rows = []
    for place, head in enumerate(HEADS):
        keys = key[:, head * key.shape[1] // query.shape[1]]
        k0 = keys[offset]
        ratio = norm(k0) / median([norm(keys[j]) for j in range(length) if j != offset])
        sums = {part: 0.0 for part in PARTS}
        counted = 0
        for t in range(offset, length):
            seen = [j for j in range(t + 1) if window is None or j > t - window]
            own = {j: form.scale * float(query[t, head] @ keys[j]) for j in seen}
            bias = {
                j: float(scores[head, t, j]) - own[j] if describe(model).positions == "alibi" else 0.0 for j in seen
            }
            full = {j: own[j] + bias[j] for j in seen}
            alone = {j: form.scale * float(mean[place].double() @ keys[j]) + bias[j] for j in seen}
            for part, some in (("score", full), ("score_with_mean_query", alone)):
                capped = {j: s if form.cap is None else form.cap * math.tanh(s / form.cap) for j, s in some.items()}
                total = sum(math.exp(s) for s in capped.values())
                sums[part] += (math.exp(capped[offset]) / total if offset in seen else 0.0) / (length - offset)
            if t == offset or offset not in seen:
                continue
            counted += 1
            others = [j for j in seen if j not in (0, offset)]
            gap = full[offset] - sum(full[j] for j in others) / len(others)
            part = alone[offset] - sum(alone[j] for j in others) / len(others)
            cosine = {j: float(query[t, head] @ keys[j]) / norm(query[t, head]) / norm(keys[j]) for j in seen}
            sums["gap"] += gap
            sums["independent"] += part
            sums["gap_squared"] += gap**2
            sums["gap_times_independent"] += gap * part
            sums["gap_at_median_key_norm"] += gap + own[offset] / ratio - own[offset]
            sums["cosine"] += cosine[offset]
            sums["cosine_of_others"] += sum(cosine[j] for j in others) / len(others)
        averaged = {part: sums[part] / counted for part in PARTS if not part.startswith("score")}
        rows.append([(sums | averaged | {"key_norm_ratio": ratio})[part] for part in PARTS])
    return rows


# Grouped keys, a distance term, a window and a soft cap.
@pytest.mark.parametrize(
    "case", [("qwen2", "hooked"), ("bloom", "bridge"), ("mistral", "hooked"), ("gemma2", "bridge"), ("gpt2", "bridge")]
)
@pytest.mark.parametrize("offset", [0, 3])
def test_every_part_against_plain_loops(
    family_model: Callable[[str, str], Any], case: tuple[str, str], offset: int
) -> None:
    model = family_model(*case)
    prompts = random_tokens(96, n=2, length=9)
    mean = torch.randn(len(HEADS), describe(model).d_head)
    quantity = _parts_at(model, LAYER, HEADS, mean, offset)
    found = record(model, prompts, quantity, cache=None)
    expected = torch.tensor([literal(model, ids, mean, offset) for ids in prompts.ids])
    torch.testing.assert_close(found.double(), expected.double(), rtol=2e-4, atol=2e-4)


def test_padding_is_neither_query_nor_key(family_model: Callable[[str, str], Any]) -> None:
    model = family_model("qwen2", "bridge")
    prompts = random_tokens(96, n=2, length=9)
    padded = prompts.pad_left([6, 8])
    mean = torch.randn(len(HEADS), describe(model).d_head)
    quantity = _parts_at(model, LAYER, HEADS, mean, 0)
    found = record(model, padded, quantity, cache=None)
    for row, length in enumerate((6, 8)):
        alone = from_ids(prompts.ids[row : row + 1, :length])
        torch.testing.assert_close(found[row], record(model, alone, quantity, cache=None)[0], rtol=1e-4, atol=1e-4)


def test_the_mean_query_leaves_out_p0_and_padding() -> None:
    from p0circuit.recording.quantities import Batch

    query = torch.arange(5.0)[None, :, None, None].expand(2, 5, 3, 2)
    mask = torch.tensor([[True] * 5, [False, False, True, True, True]])
    batch = Batch(torch.zeros(2, 5, dtype=torch.long), mask, torch.tensor([0, 2]))
    assert mean_query(query, batch)[:, 0, 0].tolist() == [2.5, 3.5]


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_the_wired_query_is_a_constant_so_the_key_side_is_everything(positions: Any) -> None:
    result = KeySide().run(wired_model(positions), random_tokens(64, n=16, length=32))
    assert result.judgement is not None and result.judgement.verdict == "reproduced"
    metrics, strengths = result.metrics, wired_truth().sink_strengths
    for name in ("query_independent_share", "query_independent_share_of_the_mean_gap", "excess_kept_with_mean_query"):
        assert metrics[name].value == pytest.approx(1, abs=1e-4)
    # Scores are strength times a cosine between 0.996 and 1 at P0, and 0 elsewhere.
    assert 0.996 <= metrics["gap"].value / (sum(strengths) / 3) <= 1
    assert metrics["gap_of_position_8_over_that_of_p0"].value == pytest.approx(0, abs=1e-3)
    assert metrics["value_norm_over_median"].high < 0.1
    assert metrics["key_direction_consistency"].low > 0.999
    heads = result.tables["heads"]
    gaps = heads[heads["quantity"] == "gap"].set_index("head")["value"]
    assert gaps.to_dict() == pytest.approx({0: 9, 2: 8, 3: 7}, rel=4e-3)


@pytest.mark.parametrize(("name", "checkpoint"), [("wired-decoy", None), ("p0-nano", 0)])
def test_without_a_sink_there_is_nothing_to_take_apart(name: str, checkpoint: int | None) -> None:
    with pytest.raises(NotApplicable, match="no sink to explain"):
        KeySide().run(load_model(name, checkpoint=checkpoint), random_tokens(64, n=8, length=32))


def test_the_figure_shows_the_metrics() -> None:
    result = KeySide().run(wired_model(), random_tokens(64, n=8, length=16))
    figure: Any = result.figures["scores"]
    assert figure.get_suptitle() == "wired: the sink heads' scores of P0"
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights[0] == pytest.approx(result.metrics["gap"].value)
