"""Figures of lines with intervals, over positions, layers and doses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
from p0circuit.figures.style import COLOURS, COLUMN, GREY, Series, add_title, new_figure, plain_log_scale, styled


@styled
def trajectories(
    panels: Mapping[str, Sequence[Series]],
    positions: Sequence[str],
    title: str,
    x_label: str,
    y_labels: Sequence[str],
    log: Sequence[bool] | bool = False,
    reference: float | None = None,
) -> Figure:
    """Draw lines with their intervals over a common x axis, usually the layers, one panel per group.

    Args:
        panels: lines by title of the panel.
        positions: labels along the x axis.
        title: title of the figure.
        x_label: label of the x axis.
        y_labels: label of the y axis of each panel.
        log: whether the y axis is logarithmic, for all panels or for each.
        reference: value of a dashed horizontal line.
    """
    logs = [log] * len(panels) if isinstance(log, bool) else list(log)
    most = max(map(len, panels.values()))
    # A legend of more than two lines would cover some of them, so it goes below the panel.
    below = most > 2
    figure, axes = new_figure(COLUMN * len(panels), 2.7 + 0.17 * most * below, 1, len(panels))
    x = np.arange(len(positions))
    for axis, (name, lines), y_label, logarithmic in zip(axes[0], panels.items(), y_labels, logs, strict=True):
        for line, colour in zip(lines, COLOURS, strict=False):
            axis.plot(x, line.values, color=colour, label=line.label, **line.style)
            if line.low is not None and line.high is not None:
                axis.fill_between(x, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
        if reference is not None:
            axis.axhline(reference, color=GREY, linewidth=0.8, linestyle="--")
        if logarithmic:
            plain_log_scale(axis, [value for line in lines for value in line.values])
        step = max(1, len(positions) // 10)
        axis.set_xticks(x[::step], [str(p) for p in positions][::step])
        axis.set(title=name, xlabel=x_label, ylabel=y_label)
        if below:
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
        elif len(lines) > 1:
            axis.legend()
    add_title(figure, title)
    return figure


@styled
def sweeps(
    panels: Mapping[str, tuple[Sequence[Series], Sequence[str]]], title: str, x_labels: Sequence[str], y_label: str
) -> Figure:
    """Draw lines with their intervals, each panel over the settings of its own sweep, all on a common y axis.

    Args:
        panels: lines and labels of the settings, by title of the panel; a line is NaN where it has no value.
        title: title of the figure.
        x_labels: label of the x axis of each panel.
        y_label: label of the common y axis.
    """
    figure, axes = new_figure(2.7 * len(panels) + 0.3, 3.0, 1, len(panels), sharey=True)
    for axis, (name, (lines, settings)), x_label in zip(axes[0], panels.items(), x_labels, strict=True):
        x = np.arange(len(settings))
        for line, colour in zip(lines, COLOURS, strict=False):
            axis.plot(x, line.values, color=colour, label=line.label, **line.style)
            if line.low is not None and line.high is not None:
                axis.fill_between(x, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
        axis.set_xticks(x, settings)
        axis.set(title=name, xlabel=x_label)
        # Below the panel, where it covers no line.
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
    axes[0, 0].set_ylabel(y_label)
    add_title(figure, title)
    return figure


def series_by(table: pd.DataFrame, column: str) -> list[Series]:
    """Make one line for every entry of a column.

    Args:
        table: data frame with the columns value, low and high; the rows of a line in the order of its x axis.
        column: the column that names the lines.
    """
    return [
        Series(str(name), *(part[end].tolist() for end in ("value", "low", "high")))
        for name, part in table.groupby(column, sort=False)
    ]
