"""Each metric against a literal transcription of its formula, in plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from p0circuit import sink


def causal_pattern(batch: int, heads: int, length: int, seed: int, padding: list[int]) -> torch.Tensor:
    """Random causal attention in which padding is neither query nor key."""
    scores = torch.randn(
        batch, heads, length, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    for row, pad in enumerate(padding):
        scores[row, :, :, :pad] = -math.inf
    return scores.softmax(-1).nan_to_num(0.0)


@given(
    seed=st.integers(0, 10_000),
    length=st.integers(2, 12),
    offset=st.integers(0, 3),
    pads=st.lists(st.integers(0, 5), min_size=1, max_size=3),
)
@settings(max_examples=40, deadline=None)
def test_sink_score_is_the_mean_over_queries_from_the_position_on(seed, length, offset, pads):
    pads = [min(pad, length - 1) for pad in pads]
    positions = torch.tensor([min(pad + offset, length - 1) for pad in pads])
    pattern = causal_pattern(len(pads), 2, length, seed, pads)
    mask = torch.arange(length) >= torch.tensor(pads)[:, None]
    scores = sink.sink_score(pattern, positions, mask)
    for row, position in enumerate(positions.tolist()):
        for head in range(2):
            literal = sum(float(pattern[row, head, query, position]) for query in range(position, length))
            assert scores[row, head].item() == pytest.approx(literal / (length - position), abs=1e-12)


def test_sink_rate_counts_pairs_of_sample_and_head():
    scores = torch.tensor([[[0.1, 0.31], [0.5, 0.3]], [[0.0, 0.0], [0.9, 0.9]]], dtype=torch.float64)
    assert sink.sink_rate(scores).tolist() == [0.5, 0.5]
    assert sink.sink_rate(scores, from_layer=1).tolist() == [0.5, 1.0]
    assert sink.sink_rate(scores, eps=0.05).tolist() == [1.0, 0.5]
    with pytest.raises(ValueError, match="from_layer=2"):
        sink.sink_rate(scores, from_layer=2)


@given(seed=st.integers(0, 10_000), length=st.integers(2, 9), pad=st.integers(0, 4))
@settings(max_examples=40, deadline=None)
def test_norm_ratio_is_p0_over_the_median_of_the_other_real_positions(seed, length, pad):
    pad = min(pad, length - 2)
    residual = torch.randn(2, length, 5, generator=torch.Generator().manual_seed(seed))
    p0, mask = torch.tensor([0, pad]), torch.arange(length) >= torch.tensor([0, pad])[:, None]
    ratios = sink.norm_ratio(residual, p0, mask)
    for row, first in enumerate(p0.tolist()):
        norms = sorted(math.sqrt(sum(x * x for x in residual[row, t].tolist())) for t in range(first + 1, length))
        middle = len(norms) // 2
        median = norms[middle] if len(norms) % 2 else (norms[middle - 1] + norms[middle]) / 2
        assert ratios[row].item() == pytest.approx(residual[row, first].norm().item() / median, rel=1e-5)


def test_value_norm_ratio_works_per_key_value_head():
    values = torch.ones(1, 5, 2, 4)
    values[:, 0, 0] *= 0.1
    values[:, 0, 1] *= 3.0
    assert torch.allclose(sink.value_norm_ratio(values, torch.tensor([0])), torch.tensor([[0.1, 3.0]]))


def test_direction_consistency_is_the_mean_cosine_to_the_mean_direction():
    vectors = torch.randn(7, 2, 6, generator=torch.Generator().manual_seed(1))
    cosines = sink.direction_cosines(vectors)
    for layer in range(2):
        units = [vector / vector.norm() for vector in vectors[:, layer]]
        mean = sum(units) / len(units)
        literal = [float(unit @ mean / mean.norm()) for unit in units]
        assert torch.allclose(cosines[:, layer], torch.tensor(literal), atol=1e-6)
    same = torch.randn(6).expand(4, 6) * torch.tensor([1.0, 5.0, 0.2, 9.0])[:, None]
    assert torch.allclose(sink.direction_cosines(same), torch.ones(4))


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_key_query_cosine_pairs_each_query_head_with_the_key_of_its_group(n_kv_heads):
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(2, 6, 4, 8, generator=generator)
    keys = torch.randn(2, 6, n_kv_heads, 8, generator=generator)
    position = torch.tensor([0, 2])
    got = sink.key_query_cosine(queries, keys, position)
    for row in range(2):
        for head in range(4):
            key = keys[row, position[row], head // (4 // n_kv_heads)]
            after = range(int(position[row]) + 1, 6)
            literal = [float(queries[row, t, head] @ key / queries[row, t, head].norm() / key.norm()) for t in after]
            assert got[row, head].item() == pytest.approx(sum(literal) / len(literal), abs=1e-6)


def test_what_uniform_attention_scores() -> None:
    for length in (1, 8, 30):
        pattern = torch.ones(length, length).tril()
        pattern = (pattern / pattern.sum(-1, keepdim=True))[None, None]
        score = float(sink.sink_score(pattern, torch.zeros(1, dtype=torch.long)))
        assert sink.uniform_score(length) == pytest.approx(score, rel=1e-6)
    assert sink.uniform_score(8) == pytest.approx(0.34, abs=0.005)
    # The least length at which a head that attends to all alike is no sink head.
    shortest = sink.shortest_for()
    assert sink.uniform_score(shortest) <= sink.SINK_THRESHOLD < sink.uniform_score(shortest - 1)
