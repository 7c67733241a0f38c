"""Colours, sizes and helpers that all figures share."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Parameters = ParamSpec("Parameters")
Figures = TypeVar("Figures")

# Okabe and Ito's colours, which can be told apart with any kind of colour vision.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#7F7F7F",
)
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY)
COLUMN = 3.4
"""Width of one column of a two-column paper, in inches."""

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True)
class Series:
    """One line of a figure: values with the ends of their intervals, over an x axis that all lines share.

    Attributes:
        label: name of the line in the legend.
        values: one value per point of the x axis.
        low: lower ends of the intervals; None for no band.
        high: upper ends of the intervals; None for no band.
        dashed: drawn dashed and on top, for a prediction over measured values.
    """

    label: str
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dashed: bool = field(default=False, kw_only=True)

    @property
    def style(self) -> dict[str, Any]:
        """Options of `Axes.plot` for this line."""
        return {"linestyle": "--", "zorder": 3} if self.dashed else {"marker": "o", "markersize": 3}


def new_figure(
    width: float,
    height: float,
    rows: int = 1,
    columns: int = 1,
    *,
    height_ratios: Sequence[float] | None = None,
    sharex: bool = False,
    sharey: bool = False,
) -> tuple[Figure, np.ndarray]:
    """Make an empty figure in the style of the project, without a window.

    Args:
        width: in inches.
        height: in inches.
        rows: rows of panels.
        columns: columns of panels.
        height_ratios: relative height of each row.
        sharex: whether all panels share one x axis.
        sharey: whether all panels share one y axis.

    Returns:
        The figure and its axes, an array [row, column].
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False, height_ratios=height_ratios, sharex=sharex, sharey=sharey)
        return figure, axes


def styled(draw: Callable[Parameters, Figures]) -> Callable[Parameters, Figures]:
    """Apply the style of the project while a drawing function runs.

    Args:
        draw: a function that draws and returns a figure.
    """

    @functools.wraps(draw)
    def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Figures:
        import matplotlib as mpl

        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return wrapper


def plain_log_scale(axis: Axes, values: Sequence[float]) -> None:
    """Make the y axis logarithmic, with plain numbers at its ticks: 0.5, 1, 2, 5 instead of powers of ten.

    Args:
        axis: the panel, which is changed in place.
        values: all values on the axis; they choose the ticks.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    # Zeros are left out; otherwise the line would fall to the bottom of the panel.
    axis.set_yscale("log", nonpositive="mask")
    positive = [value for value in values if np.isfinite(value) and value > 0] or [1]
    spread = max(positive) / min(positive)
    steps = (1, 1.5, 2, 3, 5, 7) if spread < 10 else (1, 2, 5) if spread < 1e4 else (1,)
    axis.yaxis.set_major_locator(MaxNLocator(4) if spread < 1.6 else LogLocator(subs=steps))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def decades(axis: Axes, values: Sequence[float]) -> None:
    """Make the x axis logarithmic, with a number at each decade; at 1, 2 and 5 if it spans less than one decade.

    Args:
        axis: the panel, which is changed in place.
        values: all values on the axis; they choose the ticks.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1,) if max(values) >= 10 * min(values) else (1, 2, 5)))
    # The labels of minor ticks would overlap.
    axis.xaxis.set_minor_formatter(NullFormatter())


def add_title(figure: Figure, title: str) -> None:
    """Add the title of the whole figure, broken into lines that fit its width.

    Args:
        figure: the figure, which is changed in place.
        title: the title.
    """
    characters = int(figure.get_figwidth() / 0.077)
    figure.suptitle("\n".join(textwrap.wrap(title, characters)), fontsize=9.5)


def whole_ticks(axis: Axis, count: int, inches: float) -> None:
    """Set ticks at 0, 1, 2 and so on, or at every second, fourth or eighth number where there is no room for all.

    Args:
        axis: the x or y axis of a panel, which is changed in place.
        count: number of values on the axis.
        inches: length of the axis.
    """
    from matplotlib.ticker import FixedLocator

    step = 1
    while count / step > inches / 0.22:
        step *= 2
    axis.set_major_locator(FixedLocator(list(range(0, count, step))))


def rows_not_measured(table: pd.DataFrame, over: str) -> pd.Series:
    """Select the rows of a run's table in which every column but the x axis is empty: missing or broken checkpoints.

    Args:
        table: one row per checkpoint.
        over: column of the x axis.

    Returns:
        True for each such row.
    """
    return table.drop(columns=over).isna().all(axis=1)


def legend_below(figure: Figure, axis: Axes) -> None:
    """Add one legend below the whole figure.

    Args:
        figure: the figure, which is changed in place.
        axis: the panel whose lines the legend names.
    """
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)))
