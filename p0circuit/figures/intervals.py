"""Figures of values with intervals: bars, points, and columns on separate scales."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from p0circuit.stats import Interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
from p0circuit.figures.style import BLUE, COLOURS, COLUMN, GREY, add_title, new_figure, styled


@styled
def bars(panels: Mapping[str, Mapping[str, Interval]], title: str, y_labels: Sequence[str]) -> Figure:
    """Draw bars with 95 % intervals, one panel per quantity and one bar per condition, with the value above the bar.

    Args:
        panels: intervals by condition, by title of the panel.
        title: title of the figure.
        y_labels: label of the y axis of each panel.
    """
    figure, axes = new_figure(max(COLUMN, 2.0 * len(panels)), 2.6, 1, len(panels))
    for axis, (name, intervals), y_label in zip(axes[0], panels.items(), y_labels, strict=True):
        for x, (interval, colour) in enumerate(zip(intervals.values(), COLOURS, strict=False)):
            errors = [[interval.value - interval.low], [interval.high - interval.value]]
            axis.bar(x, interval.value, color=colour, width=0.65)
            axis.errorbar(x, interval.value, yerr=np.clip(errors, 0, None), color="black", capsize=3, linewidth=1)
            axis.annotate(
                f"{interval.value:.3g}",
                (x, max(interval.high, interval.value)),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
        axis.set_xticks(range(len(intervals)), [label.replace(" ", "\n", 1) for label in intervals])
        axis.set(title=name, ylabel=y_label)
        axis.margins(y=0.15)
        if not any(interval.high for interval in intervals.values()):
            axis.set_ylim(0, 1)
        axis.grid(axis="x", visible=False)
    add_title(figure, title)
    return figure


def _draw_interval(axis: Axes, y: int, interval: Interval, colour: str, text: str, gap: float) -> None:
    """Draw a horizontal line with a dot, and its value `gap` points to the right of the panel."""
    axis.plot([interval.low, interval.high], [y, y], color=colour, linewidth=2.4, solid_capstyle="butt")
    axis.plot(interval.value, y, color=colour, marker="o", markersize=5)
    axis.annotate(
        text,
        (1, y),
        xycoords=("axes fraction", "data"),
        xytext=(gap, 0),
        textcoords="offset points",
        va="center",
        fontsize=7,
    )


@styled
def intervals(
    panels: Mapping[str, Mapping[str, Interval]],
    title: str,
    x_labels: Sequence[str],
    controls: Collection[str] = (),
    reference: float | None = None,
) -> Figure:
    """Draw dots with 95 % intervals, one panel per quantity and one line per condition, with the value at the right.

    Panels are stacked and share one scale. Use it where labels are too long to be set under bars.

    Args:
        panels: intervals by condition, by title of the panel.
        title: title of the figure.
        x_labels: label of the x axis of each panel.
        controls: conditions that are drawn in grey.
        reference: value of a dashed vertical line.
    """
    heights = [len(lines) for lines in panels.values()]
    figure, axes = new_figure(
        COLUMN + 1.2, 0.23 * sum(heights) + 0.75 * len(panels) + 0.3, len(panels), height_ratios=heights, sharex=True
    )
    for axis, (name, lines), x_label in zip(axes[:, 0], panels.items(), x_labels, strict=True):
        if reference is not None:
            axis.axvline(reference, color=GREY, linewidth=0.8, linestyle="--")
        for y, (label, interval) in enumerate(lines.items()):
            colour = GREY if label in controls else BLUE
            _draw_interval(axis, y, interval, colour, f"{interval.value:.3g}", gap=4)
        axis.set_yticks(range(len(lines)), list(lines))
        axis.set_ylim(len(lines) - 0.4, -0.6)
        axis.set(title=name, xlabel=x_label)
        axis.tick_params(labelbottom=True)
        axis.margins(x=0.08)
        axis.grid(axis="y", visible=False)
    add_title(figure, title)
    return figure


@styled
def side_by_side(
    panels: Mapping[str, Mapping[str, Interval]], title: str, x_labels: Sequence[str], base: str
) -> Figure:
    """Draw the same conditions in several columns, one quantity and scale per column, with the value at the right.

    A condition in which a quantity was not measured has no dot there.

    Args:
        panels: intervals by condition, by title of the column.
        title: title of the figure.
        x_labels: label of the x axis of each column.
        base: condition that the others are compared with; drawn in grey with a dashed vertical line.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    figure, axes = new_figure(1.7 * len(panels) + 1.8, 0.27 * len(names) + 1.1, 1, len(panels), sharey=True)
    for axis, (quantity, lines), x_label in zip(axes[0], panels.items(), x_labels, strict=True):
        if base in lines:
            axis.axvline(lines[base].value, color=GREY, linewidth=0.8, linestyle="--")
        for name, interval in lines.items():
            y, colour = names.index(name), GREY if name == base else BLUE
            text = f"{interval.value:.3f}" if abs(interval.value) < 1 else f"{interval.value:.3g}"
            _draw_interval(axis, y, interval, colour, text, gap=2)
        axis.set(title=quantity, xlabel=x_label)
        axis.margins(x=0.12)
        axis.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].set_ylim(len(names) - 0.4, -0.6)
    add_title(figure, title)
    return figure


def intervals_by(table: pd.DataFrame, column: str, value: str = "value") -> dict[str, Interval]:
    """Read the intervals of a table, one for every row, by the entries of a column.

    Args:
        table: data frame with the columns low, high and n.
        column: the column whose entries name the intervals; each occurs once.
        value: the column of the values.
    """
    columns = (table[each].tolist() for each in (column, value, "low", "high", "n"))
    return {str(name): Interval(mid, low, high, int(n)) for name, mid, low, high, n in zip(*columns, strict=True)}
