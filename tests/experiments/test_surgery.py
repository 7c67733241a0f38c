"""What the surgical experiments share: which sink they look at, what is left of it, and what they put in its place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from p0circuit.experiments.base import NotApplicable
from p0circuit.experiments.sink_under_study import (
    StudiedSink,
    excess_by_head,
    heads_above,
    mean_over_heads,
    share_left,
    studied_sink,
)
from p0circuit.experiments.surgery import ordinary_streams, random_offsets, row_of_another_token
from p0circuit.models.constructed.build import decoy_model, wired_model
from p0circuit.models.constructed.truth import wired_truth
from p0circuit.prompts import random_tokens
from tests.literal import run_with_cache, score


def test_the_sink_of_the_wired_model_is_found_and_the_halves_are_disjoint() -> None:
    prompts = random_tokens(64, n=16, length=32, seed=4)
    sink = studied_sink(wired_model(), prompts, above_block=1)
    assert sink.heads == wired_truth().sink_heads
    rows = [tuple(row) for part in (sink.prompts, sink.chosen_on) for row in part.ids.tolist()]
    assert sorted(rows) == sorted(map(tuple, prompts.ids.tolist()))
    assert len(sink.notes) == 1 and "attn.2.0, attn.2.2, attn.2.3" in sink.notes[0]


def test_there_is_no_sink_in_the_decoy() -> None:
    with pytest.raises(NotApplicable, match="no sink to explain"):
        studied_sink(decoy_model(), random_tokens(64, n=16, length=32), above_block=1)


def test_sink_heads_in_the_blocks_of_the_surgery_are_left_out() -> None:
    with pytest.raises(NotApplicable, match=r"attn\.2\.0, attn\.2\.2, attn\.2\.3.* are in blocks 0 to 2"):
        studied_sink(wired_model(), random_tokens(64, n=16, length=32), above_block=2)
    assert heads_above([(0, 1), (1, 0), (2, 3)], 0) == ((1, 0), (2, 3))


def test_excess_scores_are_those_of_the_patterns(tiny: Any, text: Any) -> None:
    """A literal count over every row: the score of a position minus that of position 8."""
    excess = excess_by_head(tiny, text, offsets=(0, 5))
    for row, ids in enumerate(text.ids):
        cache = run_with_cache(tiny, ids)[1]
        for layer in range(3):
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0]
            for offset in (0, 5):
                expected = [at - beside for at, beside in zip(score(pattern, offset), score(pattern, 8), strict=True)]
                assert excess[offset][row, layer].tolist() == pytest.approx(expected, abs=1e-6)
    heads = [(0, 1), (2, 3)]
    expected = (excess[0][:, 0, 1] + excess[0][:, 2, 3]) / 2
    assert mean_over_heads(excess[0], heads).tolist() == pytest.approx(expected.tolist())
    left = share_left(excess[5], excess[0], heads)
    ratio = sum(mean_over_heads(excess[5], heads)) / sum(mean_over_heads(excess[0], heads))
    assert left.value == pytest.approx(ratio) and left.n == text.n


def test_ordinary_streams_take_turns_and_come_from_the_next_row(tiny: Any, text: Any) -> None:
    found = ordinary_streams(tiny, text, (3, 7))
    assert found.shape == (5, 4, 32)
    for row in range(5):
        cache = run_with_cache(tiny, text.ids[(row + 1) % 5])[1]
        for layer in range(3):
            expected = cache[f"blocks.{layer}.hook_resid_pre"][0, (3, 7)[row % 2]]
            torch.testing.assert_close(found[row, layer], expected, rtol=0, atol=1e-5)


def test_the_row_of_another_token_is_the_nearest_in_the_ring() -> None:
    assert row_of_another_token(torch.tensor([5, 5, 7, 5, 7, 7])).tolist() == [2, 2, 3, 4, 0, 0]
    with pytest.raises(NotApplicable, match="all 3 rows have the token 4"):
        row_of_another_token(torch.tensor([4, 4, 4]))


def test_random_offsets_are_in_range_and_drawn_by_the_seed() -> None:
    drawn = random_offsets(400, 3, 1, 6, but=[4])
    assert set(drawn.tolist()) == {1, 2, 3, 5}
    assert torch.equal(drawn, random_offsets(400, 3, 1, 6, but=[4]))
    assert not torch.equal(drawn, random_offsets(400, 4, 1, 6, but=[4]))


@pytest.mark.parametrize(("last", "expected"), [(3, [0, 1, 2]), (8, [*range(8)]), (31, [0, 1, 2, 3, 4, 13, 21, 30])])
def test_deep_models_are_scanned_in_a_few_blocks(last: int, expected: list[int]) -> None:
    prompts = random_tokens(64, n=2, length=12)
    assert StudiedSink(wired_model(), ((2, 0), (last, 0)), prompts, prompts).blocks_to_scan(8) == expected
