"""Published figures: read as printed, found by name, compared where they can be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from p0circuit.report.published import PublishedFigure, compare, comparisons_for, published_for, read_published
from p0circuit.results import Result
from p0circuit.stats import Interval

FIGURE = PublishedFigure("some/Model-1B", "sink_rate", 42.0, "%", 64, 0.3, "Somebody et al.", "Table 2", "made up")


def measured(value: float) -> Interval:
    return Interval(value, value - 0.01, value + 0.01, 100)


def result(length: int = 64, eps: float = 0.3) -> Result:
    provenance = {"length": length, "config": {"eps": eps}}
    return Result("sink-map", "title", {"sink_rate": measured(0.4)}, {"t": pd.DataFrame()}, {}, provenance)


@pytest.mark.parametrize(("value", "within"), [(0.42, True), (0.37, True), (0.47, True), (0.369, False), (0.5, False)])
def test_within_the_tolerance_or_not(value: float, within: bool) -> None:
    found = compare(measured(value), FIGURE)
    assert found.within is within
    assert f"{value - 0.42:+.3f}, {'' if within else 'not '}within the tolerance of 0.05" in str(found)


def test_a_tolerance_of_ones_own_and_a_value_without_a_unit() -> None:
    figure = replace(FIGURE, value=3.0, unit="")
    assert compare(measured(3.5), figure, tolerance=1.0).within
    assert not compare(measured(3.5), figure, tolerance=0.4).within


@pytest.mark.parametrize("name", ["some/Model-1B", "model-1b", "another/MODEL-1B"])
def test_found_by_hub_id_or_its_last_part(name: str) -> None:
    assert published_for(name, [FIGURE]) == [FIGURE]


@pytest.mark.parametrize("name", ["model-1b-chat", "some", "p0-nano", ""])
def test_another_name_finds_nothing(name: str) -> None:
    assert published_for(name, [FIGURE]) == []


def test_beside_ours_only_what_was_measured_in_the_same_way() -> None:
    (found,) = comparisons_for("Model-1B", [result()], [FIGURE])
    assert found.within and found.measured == measured(0.4)
    for other in (result(length=32), result(eps=0.2)):
        (found,) = comparisons_for("Model-1B", [other], [FIGURE])
        assert found.within is None and "not compared" in found.reason
    (found,) = comparisons_for("Model-1B", [result()], [replace(FIGURE, metric="sink_rate_random_tokens")])
    assert found.within is None and found.measured is None and "not measured" in str(found)


def test_the_shipped_figures() -> None:
    figures = read_published()
    assert {figure.source.split(",")[0] for figure in figures} == {"Gu et al.", "Peng et al."}
    assert len({(figure.model, figure.metric, figure.source) for figure in figures}) == len(figures)
    assert all(figure.unit == "%" and 0 <= figure.share <= 1 and figure.definition for figure in figures)
    assert all((figure.length, figure.eps) == (64, 0.3) for figure in figures)
    by_metric = {figure.metric: figure.value for figure in published_for("mistral-7b-v0.1")}
    assert by_metric == {"sink_rate": 97.49, "sink_rate_from_layer_2": 2, "sink_rate_from_layer_2_with_bos": 87}


def test_a_row_that_cannot_be_read_is_shown(tmp_path: Path) -> None:
    head = "model,metric,value,unit,length,eps,source,table,definition\n"
    (tmp_path / "a.csv").write_text(head + "m,sink_rate,about 5,%,64,0.3,s,,d\n")
    with pytest.raises(ValueError, match=r"a\.csv.*about 5"):
        read_published(tmp_path)
