"""The figures as a reader meets them: every text there, inside the figure, and clear of every other."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from p0circuit.figures.intervals import bars
from p0circuit.figures.lines import trajectories
from p0circuit.figures.maps import heat_maps
from p0circuit.figures.style import COLUMN, Series, new_figure
from p0circuit.figures.training import TrainingCurve, training_curves
from p0circuit.stats import Interval

PAGE = 2 * COLUMN + 0.3
CONDITIONS = ("without BOS", "with BOS", "random first", "random tokens", "repeated token")
LONG = "EleutherAI/pythia-160m-deduped@step143000: attention to position zero, mean over queries"


def texts(figure: Figure) -> dict[str, Any]:
    """The bounding box of every text that is drawn, in inches; cells and ticks are numbered."""
    figure.canvas.draw()
    shown: list[Text] = []
    hidden: set[Text] = set()
    for axis in figure.axes:
        for line in (axis.xaxis, axis.yaxis):
            low, high = sorted(line.get_view_interval())
            slack = 1e-9 * (high - low)
            for tick in [*line.get_major_ticks(), *line.get_minor_ticks()]:
                hidden.add(tick.label2)
                if not low - slack <= tick.get_loc() <= high + slack:
                    hidden.add(tick.label1)
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and text not in hidden:
            shown.append(text)
    scale = figure.dpi_scale_trans.inverted()
    return {
        f"{number} {text.get_text()!r}": text.get_window_extent().transformed(scale)
        for number, text in enumerate(shown)
    }


def assert_legible(figure: Figure) -> dict[str, Any]:
    found = texts(figure)
    width, height = figure.get_size_inches()
    for name, box in found.items():
        assert box.x0 > -0.01 and box.y0 > -0.01 and box.x1 < width + 0.01 and box.y1 < height + 0.01, name
    for (first, one), (second, other) in itertools.combinations(found.items(), 2):
        across = min(one.x1, other.x1) - max(one.x0, other.x0)
        along = min(one.y1, other.y1) - max(one.y0, other.y0)
        # A hundredth of an inch is the space that fonts leave around their letters.
        assert across < 0.01 or along < 0.01, f"{first} and {second} overlap"
    return found


def legible_words(figure: Figure) -> set[str]:
    return {name.split(" ", 1)[1].strip("'") for name in assert_legible(figure)}


def test_the_check_sees_overlaps_and_cuts() -> None:
    figure, axes = new_figure(3, 2)
    axes[0, 0].set_xticks([0, 0.001, 1], ["first", "second", "third"])
    with pytest.raises(AssertionError, match=r"'first' and .*'second' overlap"):
        assert_legible(figure)
    figure, axes = new_figure(3, 2)
    figure.suptitle("a title that is much wider than the figure it stands over", fontsize=12)
    with pytest.raises(AssertionError, match="a title"):
        assert_legible(figure)


@pytest.mark.parametrize(
    ("layers", "heads", "count"), [(1, 1, 1), (3, 5, 4), (6, 4, 5), (9, 8, 1), (12, 12, 5), (48, 32, 4)]
)
def test_heat_maps(layers: int, heads: int, count: int) -> None:
    title = LONG if count == 4 else "tiny: scores"
    values = np.linspace(0, 1, layers * heads).reshape(layers, heads)
    figure = heat_maps(dict.fromkeys(CONDITIONS[:count], values), title, "sink score")
    shown = legible_words(figure)
    assert {"layer", "head", "sink score", "0", *CONDITIONS[:count]} <= shown
    assert "".join(figure.get_suptitle().split()) == "".join(title.split())
    width, height = figure.get_size_inches()
    assert width <= PAGE and height <= 6
    panel = figure.axes[0]
    assert panel.images[0].get_clim() == (0, 1)
    np.testing.assert_array_equal(panel.images[0].get_array(), values)
    assert panel.get_ylim()[0] < panel.get_ylim()[1], "the first layer is at the bottom"
    if layers * heads <= 24:
        cells = {text.get_position(): text.get_text() for text in panel.texts}
        expected = {(head, layer): values[layer, head] for layer, head in np.ndindex(layers, heads)}
        assert cells.keys() == expected.keys()
        assert all(float(cells[place]) == pytest.approx(value, abs=0.005) for place, value in expected.items())


@pytest.mark.parametrize(
    ("low", "high", "ticks", "layers"),
    [
        (0.97, 1.08, 3, 4),
        (0.84, 2.9, 3, 7),
        (0.75, 7.0, 4, 13),
        (1.0, 217.0, 6, 25),
        (0.02, 900.0, 4, 49),
        (1.0, 3e5, 4, 2),
        (1.0, 1.0, 1, 5),
        (3.0, 3.0, 1, 1),
    ],
)
def test_trajectories_on_a_log_scale_have_plain_numbers(low: float, high: float, ticks: int, layers: int) -> None:
    values = np.geomspace(low, high, layers)
    lines = [
        Series("P0", list(values), list(values * 0.95), list(values * 1.05)),
        Series("other positions", list(values[::-1])),
    ]
    places = ["emb", *map(str, range(layers - 1))]
    figure = trajectories(
        {"Norm": lines, "Direction": lines[:1]}, places, LONG, "after block", ["norm", "cosine"], log=[True, False]
    )
    shown = legible_words(figure)
    assert {"Norm", "Direction", "norm", "cosine", "after block", "emb", "P0", "other positions"} <= shown
    assert not any("10^" in word or "mathdefault" in word or "times" in word for word in shown)
    assert tuple(figure.get_size_inches()) == (2 * COLUMN, 2.7)
    norm = figure.axes[0]
    bottom, top = norm.get_ylim()
    within = [label for label in norm.get_yticklabels() if bottom <= label.get_position()[1] <= top]
    assert len(within) >= ticks
    for label in within:
        assert float(label.get_text()) == pytest.approx(label.get_position()[1], rel=1e-5)
    np.testing.assert_allclose(norm.lines[0].get_ydata(), values)
    assert len(norm.collections) == 1, "the interval of the one line that has one"


def test_zero_leaves_a_gap_on_a_log_scale() -> None:
    figure = trajectories({"Norm": [Series("P0", [2.0, 0.0, 4.0])]}, ["0", "1", "2"], "t", "block", ["norm"], log=True)
    assert_legible(figure)
    assert figure.axes[0].get_ylim()[0] > 1


def test_a_reference_line_and_a_single_panel() -> None:
    figure = trajectories({"Rate": [Series("a", [0.1, 0.4])]}, ["0", "1"], "title", "step", ["share"], reference=0.3)
    assert_legible(figure)
    assert figure.axes[0].lines[1].get_ydata()[0] == 0.3
    assert figure.axes[0].get_legend() is None
    assert figure.get_size_inches()[0] == COLUMN


@pytest.mark.parametrize("scale", [0.0, 0.004, 0.0957, 2.5, 140.0])
@pytest.mark.parametrize("panels", [1, 3])
def test_bars_carry_their_values(scale: float, panels: int) -> None:
    intervals = {
        "with BOS": Interval(scale, scale * 0.9, scale * 1.1, 9),
        "without BOS": Interval(scale / 3, scale * 0.3, scale * 0.4, 9),
    }
    names = ["Sink rate", "Sink rate, layers ≥ 2", "Loss"][:panels]
    labels = ["share of heads", "share of heads", "nats per token"][:panels]
    figure = bars(dict.fromkeys(names, intervals), "tiny: what removing BOS changes", labels)
    assert {*names, *labels, "with\\nBOS", "without\\nBOS", f"{scale:.3g}", f"{scale / 3:.3g}"} <= legible_words(figure)
    assert figure.get_size_inches()[0] <= PAGE
    for axis in figure.axes:
        assert [bar.get_height() for bar in axis.patches] == [scale, scale / 3]
        # The values stand above the bars, inside the axes.
        assert axis.get_ylim()[1] > 1.1 * scale and axis.get_ylim()[0] <= 0


def test_a_figure_belongs_to_no_window_and_leaves_no_style_behind() -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    figure = heat_maps({"a": np.zeros((2, 2))}, "t", "v")
    assert dict(mpl.rcParams) == before
    assert figure.canvas.manager is None


def test_training_runs_have_a_number_at_each_decade_alone() -> None:
    table = pd.DataFrame({"step": [0, 12, 400], "tokens": [0, 12_000, 400_000], "excess": [0.0, 0.1, 0.5]})
    axis = training_curves({"Sink": ("excess", "score")}, [TrainingCurve("a", "a", table)], "made up").axes[0]
    low, high = axis.get_xlim()
    assert [tick for tick in axis.get_xticks() if low <= tick <= high] == [10_000, 100_000]
    assert not any(label.get_text() for label in axis.get_xticklabels(minor=True))


def test_runs_of_a_variant_are_one_line_with_the_range_of_its_seeds() -> None:
    def curve(seed: int, excess: list[float]) -> TrainingCurve:
        table = pd.DataFrame({"tokens": [0, 12_000, 400_000], "share": [0.0, 0.03, 1.0], "excess": excess})
        return TrainingCurve(f"a-{seed}", "a", table, formation=2)

    runs = [curve(0, [0.0, 0.1, 0.5]), curve(1, [0.0, 0.3, math.nan])]
    axis = training_curves({"Sink": ("excess", "score")}, runs, "made up", "share", 0.2).axes[0]
    mean, *circles, limit = axis.lines
    assert list(mean.get_ydata()) == [0.0, pytest.approx(0.2), 0.5] and mean.get_label() == "a (n = 2)"
    (band,) = axis.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (0.0, 0.5) and len(circles) == 2
    assert list(limit.get_xdata()) == [0.2, 0.2] and axis.get_xlabel() == "share of the run's tokens"
    other = replace(runs[1], table=runs[1].table.assign(share=[0.0, 0.04, 1.0]))
    apart = training_curves({"Sink": ("excess", "score")}, [runs[0], other], "made up", "share").axes[0]
    assert len(apart.lines) == 4 and not apart.collections
