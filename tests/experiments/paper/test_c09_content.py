"""Content against direction: by construction on the wired models, by hand on another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from p0circuit.experiments.base import NotApplicable
from p0circuit.experiments.paper.c09_content import Content, ContentConfig
from p0circuit.experiments.sink_under_study import StudiedSink
from p0circuit.models import load_model
from p0circuit.models.constructed.build import decoy_model, wired_model
from p0circuit.prompts import from_ids, natural_text, random_tokens
from tests.experiments.test_structure import HEADS, T, distinct
from tests.families import VOCAB
from tests.literal import norm, run_with_cache, score
from tests.report.test_figures import assert_legible

LENDERS = (4, 10)
CONFIG = ContentConfig(ordinary=LENDERS, scan_samples=4)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_the_wired_sink_does_not_care_for_content(positions: Any) -> None:
    result = Content().run(wired_model(positions), distinct(16, 48))
    assert result.judgement is not None and result.judgement.verdict == "reproduced"
    assert result.metrics["left_with_content_replaced"].value == pytest.approx(1, abs=1e-4)
    # Nothing but the P0 direction is read, so an ordinary position's content will do as well.
    assert result.metrics["left_with_content_of_an_ordinary_position"].value == pytest.approx(1, abs=1e-3)
    assert result.metrics["left_with_direction_replaced"].high < 0.06
    assert result.metrics["left_with_direction_removed"].high < 0.06
    # 60 of P0's norm is the direction; token, ruler, echo and mark, and what decoys write, are below 5 together.
    assert result.metrics["orthogonal_share_of_squared_norm"].high < 5**2 / 60**2
    assert not any("irrelevant" in note or "does not end" in note for note in result.notes)
    for figure in result.figures.values():
        assert_legible(figure)


def sink_of(model: Any) -> StudiedSink:
    others, prompts = random_tokens(VOCAB, 8, T, seed=3).split()
    assert len(set(prompts.ids[:, 0].tolist())) == 4
    return StudiedSink(model, HEADS, prompts, others)


def test_surgery_against_a_stream_edited_by_hand(family_model: Any) -> None:
    """Row by row, with the P0 direction from whole rows and TransformerLens's own hooks."""
    model = family_model("llama-grouped", "hooked")
    result = Content(CONFIG).measure_on(sink_of(model))
    ids = sink_of(model).prompts.ids

    def streams(rows: Tensor, block: int) -> list[Tensor]:
        return [run_with_cache(model, row)[1][f"blocks.{block}.hook_resid_post"][0] for row in rows]

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
    blocks = result.tables["blocks"].set_index(["surgery", "after_block"])
    for block in (0, 1):
        units = [stream[0] / norm(stream[0]) for stream in streams(sink_of(model).chosen_on.ids, block)]
        mean = sum(units[1:], units[0])
        direction = mean / norm(mean)
        own = streams(ids, block)
        left = dict.fromkeys(("content of another token", "content of an ordinary position"), 0.0)
        left |= {"control: direction replaced": 0.0, "direction removed": 0.0}
        shares, cosines = [], []
        for row in range(4):
            p0, token = own[row][0], own[(row + 1) % 4][0]
            ordinary = own[(row + 1) % 4][LENDERS[row % 2]]
            size, donor = float(p0 @ direction), float(ordinary @ direction)
            shares.append(1 - size**2 / norm(p0) ** 2)
            replaced = p0 + (donor - size) * direction
            cosines.append(float(replaced @ direction) / norm(replaced))
            changed = [
                token + (size - float(token @ direction)) * direction,
                ordinary + (size - donor) * direction,
                replaced,
                p0 - size * direction,
            ]
            for name, vector in zip(left, changed, strict=True):
                left[name] += excess(row, block, vector)
        for name, value in left.items():
            assert blocks["value"][name, block] == pytest.approx(value / clean, rel=1e-3, abs=1e-4)
            assert blocks["orthogonal_share"][name, block] == pytest.approx(np.mean(shares), rel=1e-4)
    found = [interval.value for interval in result.metrics.values()]
    expected = [*(value / clean for value in left.values()), np.mean(shares), np.mean(cosines)]
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("case", [("neox", "hooked"), ("mixtral", "bridge"), ("gemma2", "bridge")])
def test_other_architectures_are_measured_too(case: tuple[str, str], family_model: Any) -> None:
    result = Content(CONFIG).measure_on(sink_of(family_model(*case)))
    assert all(np.isfinite(interval.value) for interval in result.metrics.values())


def test_where_there_is_no_sink_nothing_is_claimed() -> None:
    untrained = load_model("p0-nano", checkpoint=0)
    text = natural_text(untrained, "english", n=8, length=32)
    for model, prompts in ((untrained, text), (decoy_model(), random_tokens(64, 8, 32))):
        with pytest.raises(NotApplicable, match="no sink to explain"):
            Content().run(model, prompts)


def test_one_token_at_p0_in_all_samples_leaves_nothing_to_replace(family_model: Any) -> None:
    sink = sink_of(family_model("llama-grouped", "hooked"))
    ids = sink.prompts.ids.clone()
    ids[:, 0] = 7
    with pytest.raises(NotApplicable, match="all 4 rows have the token 7"):
        Content(CONFIG).measure_on(replace(sink, prompts=from_ids(ids)))
