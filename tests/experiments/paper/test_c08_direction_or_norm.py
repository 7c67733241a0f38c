"""Norm and direction of P0's stream: by construction on the wired models, and by hand on another."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from p0circuit.experiments.base import NotApplicable
from p0circuit.experiments.paper.c08_direction_or_norm import DirectionOrNorm, DirectionOrNormConfig
from p0circuit.experiments.sink_under_study import StudiedSink
from p0circuit.models import load_model
from p0circuit.models.constructed.build import decoy_model, wired_model
from p0circuit.models.constructed.truth import wired_truth
from p0circuit.prompts import natural_text, random_tokens
from p0circuit.sink import uniform_excess
from tests.experiments.test_structure import HEADS, T, distinct
from tests.families import VOCAB
from tests.literal import median, norm, run_with_cache, score
from tests.report.test_figures import assert_legible

LENDERS = (4, 10)
CONFIG = DirectionOrNormConfig(ordinary=LENDERS, doses=("1/2", "3"), scan_samples=4)


def clean_excess(length: int) -> float:
    """The wired sink heads' excess score: a query gives `e^s / (e^s + others)` to P0, and `1 / (e^s + others)` to 8."""
    found = []
    for strength in wired_truth().sink_strengths:
        to_p0 = [math.exp(strength) / (math.exp(strength) + query) for query in range(length)]
        to_8 = [1 / (math.exp(strength) + query) for query in range(8, length)]
        found.append(sum(to_p0) / length - sum(to_8) / len(to_8))
    return sum(found) / len(found)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_the_wired_sink_is_direction_by_construction(positions: Any) -> None:
    result = DirectionOrNorm().run(wired_model(positions), distinct(16, 48))
    assert result.judgement is not None and result.judgement.verdict == "reproduced"
    metrics = result.metrics
    assert metrics["left_with_norm_cut"].value == pytest.approx(1, abs=1e-4)
    # Without the direction attention is uniform: what is left of the excess is that of being visible to all.
    left = uniform_excess(48) / clean_excess(48)
    assert metrics["left_with_direction_replaced"].value == pytest.approx(left, abs=2e-3)
    for name in ("norm_cut", "direction_replaced"):
        assert metrics[f"left_with_{name}_elsewhere"].value == pytest.approx(1, abs=5e-3)
    assert metrics["norm_over_median_of_others"].low > 15
    doses = result.tables["doses"].set_index("dose")["value"]
    assert doses.tolist() == pytest.approx([1] * 6, abs=1e-3)
    # After block 0 the norm is what the detector's mark is measured against, but the mark survives in P0's direction.
    blocks = result.tables["blocks"].set_index(["surgery", "after_block"])["value"]
    assert blocks["norm cut to the others' median", 0] == pytest.approx(1, abs=0.01)
    assert blocks["direction of an ordinary position", 0] < 0.06
    for figure in result.figures.values():
        assert_legible(figure)


def sink_of(model: Any) -> StudiedSink:
    others, prompts = random_tokens(VOCAB, 8, T, seed=3).split()
    return StudiedSink(model, HEADS, prompts, others)


def test_surgery_against_a_stream_edited_by_hand(family_model: Any) -> None:
    """Row by row, with norms and medians in plain Python and TransformerLens's own hooks."""
    model = family_model("llama-grouped", "hooked")
    result = DirectionOrNorm(CONFIG).measure_on(sink_of(model))
    ids = sink_of(model).prompts.ids
    streams = [[run_with_cache(model, row)[1][f"blocks.{block}.hook_resid_post"][0] for block in (0, 1)] for row in ids]

    def excess(row: int, block: int = 0, vector: Tensor | None = None) -> float:
        seen: dict[str, Tensor] = {}

        def keep(pattern: Tensor, hook: Any) -> None:
            seen["pattern"] = pattern[0]

        def put(stream: Tensor, hook: Any) -> Tensor:
            stream[0, 0] = vector
            return stream

        hooks: list[Any] = [("blocks.2.attn.hook_pattern", keep)]
        hooks += [(f"blocks.{block}.hook_resid_post", put)] if vector is not None else []
        with torch.no_grad():
            model.run_with_hooks(ids[row][None], fwd_hooks=hooks)
        at, beside = score(seen["pattern"], 0), score(seen["pattern"], 8)
        return sum(at[head] - beside[head] for _, head in HEADS) / len(HEADS)

    clean = sum(excess(row) for row in range(4))
    blocks = result.tables["blocks"].set_index(["surgery", "after_block"])["value"]
    for block in (0, 1):
        cut = turned = 0.0
        for row in range(4):
            stream = streams[row][block]
            size = median([norm(vector) for vector in stream[1:]])
            cut += excess(row, block, stream[0] / norm(stream[0]) * size)
            donor = streams[(row + 1) % 4][block][LENDERS[row % 2]]
            turned += excess(row, block, donor / norm(donor) * norm(stream[0]))
        assert blocks["norm cut to the others' median", block] == pytest.approx(cut / clean, rel=1e-4, abs=1e-5)
        assert blocks["direction of an ordinary position", block] == pytest.approx(turned / clean, rel=1e-4, abs=1e-5)
    assert result.metrics["left_with_norm_cut"].value == pytest.approx(cut / clean, rel=1e-4, abs=1e-5)
    assert result.metrics["left_with_direction_replaced"].value == pytest.approx(turned / clean, rel=1e-4, abs=1e-5)
    for dose, factor in (("1/2", 0.5), ("3", 3.0)):
        scaled = sum(excess(row, 1, streams[row][1][0] * factor) for row in range(4))
        found = result.tables["doses"].set_index("dose").loc[dose]
        assert found["factor"] == factor
        assert found["value"] == pytest.approx(scaled / clean, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("case", [("neox", "hooked"), ("mixtral", "bridge"), ("gemma2", "bridge")])
def test_other_architectures_are_measured_too(case: tuple[str, str], family_model: Any) -> None:
    result = DirectionOrNorm(CONFIG).measure_on(sink_of(family_model(*case)))
    assert all(np.isfinite(interval.value) for interval in result.metrics.values())


def test_where_there_is_no_sink_nothing_is_claimed() -> None:
    untrained = load_model("p0-nano", checkpoint=0)
    text = natural_text(untrained, "english", n=8, length=32)
    for model, prompts in ((untrained, text), (decoy_model(), random_tokens(64, 8, 32))):
        with pytest.raises(NotApplicable, match="no sink to explain"):
            DirectionOrNorm().run(model, prompts)


def test_rows_without_an_ordinary_position(family_model: Any) -> None:
    with pytest.raises(NotApplicable, match="no position 20"):
        DirectionOrNorm(DirectionOrNormConfig(ordinary=(20,))).measure_on(
            sink_of(family_model("llama-grouped", "hooked"))
        )
