"""Mask surgery: against construction on the wired models, and against attention edited by hand on another."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from p0circuit.experiments.base import NotApplicable
from p0circuit.experiments.paper.c05_structure import Structure, StructureConfig
from p0circuit.experiments.sink_under_study import StudiedSink
from p0circuit.models import load_model
from p0circuit.models.constructed.build import decoy_model, wired_model
from p0circuit.models.constructed.truth import wired_truth
from p0circuit.prompts import PromptSet, from_ids, natural_text, random_tokens
from tests.families import VOCAB
from tests.literal import score
from tests.report.test_figures import assert_legible

T, HEADS = 14, ((2, 0), (2, 3))
FEW = StructureConfig(positions=(4, 6), samples_beside=4)


def distinct(n: int, length: int) -> PromptSet:
    """Rows without repeats, on which the wired model's scores are known exactly."""
    rows = [torch.randperm(64, generator=torch.Generator().manual_seed(row))[:length] for row in range(n)]
    return from_ids(torch.stack(rows), vocab_size=64)


def alone(pattern: Tensor, t: int) -> None:
    pattern[:, :, t] = 0
    pattern[:, :, t, t] = 1


def predicted(strength: float, t: int, length: int) -> tuple[float, float]:
    """Excess scores of t and of P0 in a wired sink head, if both are recognised: each has a score of `strength`."""
    peak = math.exp(strength)
    one = [peak / (peak + query) for query in range(t)]
    two = [peak / (2 * peak + query - 1) for query in range(t, length)]
    others = [(one + two)[query] / peak for query in range(8, length)]
    beside = sum(others) / len(others)
    return sum(two) / len(two) - beside, (sum(one) + sum(two)) / length - beside


@pytest.mark.parametrize(("positions", "chosen"), [("rotary", (4, 16, 32)), ("learned", (6,))])
def test_the_wired_sink_is_structure_by_construction(positions: Any, chosen: tuple[int, ...]) -> None:
    config = StructureConfig(positions=chosen, samples_beside=8)
    result = Structure(config).run(wired_model(positions), distinct(16, 48))
    assert result.judgement is not None and result.judgement.verdict == "reproduced"
    pairs = [
        np.mean([predicted(strength, t, 48) for strength in wired_truth().sink_strengths], axis=0)
        for t in config.positions
    ]
    at_t, at_p0 = np.sum(pairs, axis=0)
    for name in ("when_alone", "with_norm_of_p0", "with_statistics_of_p0"):
        assert result.metrics[f"t_over_p0_{name}"].value == pytest.approx(at_t / at_p0, abs=0.02)
    table = result.tables["surgery"].set_index(["measured", "surgery", "t"])["value"]
    for t, (own, first) in zip(config.positions, pairs, strict=True):
        assert table["t over P0", "attends to itself", t] == pytest.approx(own / first, abs=0.02)
    for name in ("control_attending_as_another", "without_surgery"):
        assert abs(result.metrics[f"t_over_p0_{name}"].value) < 0.02
    for name in ("by_mixing", "by_norm_of_t", "by_statistics_of_t"):
        assert result.metrics[f"taken_from_p0_{name}"].low > 0.9
    assert abs(result.metrics["taken_from_p0_control_mixing_elsewhere"].value) < 1e-3
    scan = result.tables["scan"].set_index(["measured", "blocks", "block"])["value"]
    # Recognition is in block 0: that block decides by itself, and block 1 has no say.
    for measured, decided in (("t over P0", 0.5), ("taken from P0", 0.9)):
        assert scan[measured, "this block alone", 0] > decided
        assert scan[measured, "blocks up to it", 1] > decided
        assert abs(scan[measured, "this block alone", 1]) < 0.02
    for figure in result.figures.values():
        assert_legible(figure)


def sink_of(model: Any) -> StudiedSink:
    others, prompts = random_tokens(VOCAB, 8, T, seed=3).split()
    return StudiedSink(model, HEADS, prompts, others, ("made by hand",))


def test_surgery_against_attention_edited_by_hand(family_model: Any) -> None:
    """Row by row: the pattern of blocks 0 and 1 at t, or at P0, replaced in TransformerLens's own hooks."""
    model = family_model("llama-grouped", "hooked")
    metrics = Structure(FEW).measure_on(sink_of(model)).metrics

    def excess(ids: Tensor, offset: int, edit: Any = None) -> float:
        seen: dict[str, Tensor] = {}

        def keep(pattern: Tensor, hook: Any) -> None:
            seen["pattern"] = pattern[0]

        def change(pattern: Tensor, hook: Any) -> Tensor:
            edit(pattern)
            return pattern

        hooks: list[Any] = [(f"blocks.{layer}.attn.hook_pattern", change) for layer in (0, 1) if edit]
        with torch.no_grad():
            model.run_with_hooks(ids[None], fwd_hooks=[*hooks, ("blocks.2.attn.hook_pattern", keep)])
        at, beside = score(seen["pattern"], offset), score(seen["pattern"], 8)
        return sum(at[head] - beside[head] for _, head in HEADS) / len(HEADS)

    def mixed(t: int) -> Any:
        def edit(pattern: Tensor) -> None:
            pattern[:, :, 0] = pattern[:, :, t].clone()

        return edit

    runs = [(ids, t) for ids in sink_of(model).prompts.ids for t in FEW.positions]
    at_t = [excess(ids, t, lambda pattern, t=t: alone(pattern, t)) for ids, t in runs]
    beside = [excess(ids, 0, lambda pattern, t=t: alone(pattern, t)) for ids, t in runs]
    left = [excess(ids, 0, mixed(t)) for ids, t in runs]
    clean = [excess(ids, 0) for ids, _ in runs]
    assert metrics["t_over_p0_when_alone"].value == pytest.approx(sum(at_t) / sum(beside), rel=1e-4)
    assert metrics["p0_excess_beside_t_alone"].value == pytest.approx(np.mean(beside), rel=1e-4)
    assert metrics["taken_from_p0_by_mixing"].value == pytest.approx(1 - sum(left) / sum(clean), rel=1e-4, abs=1e-5)
    assert metrics["p0_excess"].value == pytest.approx(np.mean(clean), rel=1e-4)
    at_t = [excess(ids, t) for ids, t in runs]
    assert metrics["t_over_p0_without_surgery"].value == pytest.approx(sum(at_t) / sum(clean), rel=1e-4)


@pytest.mark.parametrize("case", [("neox", "hooked"), ("olmoe", "bridge"), ("bloom", "bridge")])
def test_other_architectures_are_measured_too(case: tuple[str, str], family_model: Any) -> None:
    result = Structure(StructureConfig(positions=(4,), samples_beside=2)).measure_on(sink_of(family_model(*case)))
    assert result.notes[0] == "made by hand"
    assert set(result.tables["scan"]["block"]) == {0, 1}
    assert all(np.isfinite(interval.value) for interval in result.metrics.values())


def test_where_there_is_no_sink_nothing_is_claimed() -> None:
    untrained = load_model("p0-nano", checkpoint=0)
    text = natural_text(untrained, "english", n=8, length=32)
    for model, prompts in ((untrained, text), (decoy_model(), random_tokens(64, 8, 32))):
        with pytest.raises(NotApplicable, match="no sink to explain"):
            Structure().run(model, prompts)


def test_positions_that_do_not_fit(family_model: Any) -> None:
    model = family_model("llama-grouped", "hooked")
    result = Structure(StructureConfig(positions=(4, 40), samples_beside=2)).measure_on(sink_of(model))
    assert result.notes[-1] == f"rows of {T} tokens are too short for t = 40"
    with pytest.raises(NotApplicable, match="too short for t"):
        Structure(StructureConfig(positions=(13, 40))).measure_on(sink_of(model))
    with pytest.raises(ValueError, match="t cannot be 8"):
        Structure(StructureConfig(positions=(4, 8))).measure_on(sink_of(model))
