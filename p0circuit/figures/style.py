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
Drawn = TypeVar("Drawn")

# Okabe and Ito's colours, told apart with any kind of colour vision.
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
    """One line of a figure: values with the ends of their intervals, over a common axis.

    What is predicted may be dashed, so that what is measured shows through where the two agree.
    """

    label: str
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dashed: bool = field(default=False, kw_only=True)

    @property
    def style(self) -> dict[str, Any]:
        """How the line is drawn."""
        return {"linestyle": "--", "zorder": 3} if self.dashed else {"marker": "o", "markersize": 3}


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, np.ndarray]:
    """A figure in the project's style (inches) that belongs to no window; returns it and its axes [rows, columns]."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        return figure, figure.subplots(rows, columns, squeeze=False, **options)


def styled(draw: Callable[Parameters, Drawn]) -> Callable[Parameters, Drawn]:
    """Run a drawing function under the project's style."""

    @functools.wraps(draw)
    def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Drawn:
        import matplotlib as mpl

        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return wrapper


def plain_log_scale(axis: Axes, values: Sequence[float]) -> None:
    """A logarithmic y axis with plain numbers at its ticks: 0.5, 1, 2, 5 rather than powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    # What is zero is left out rather than drawn as a fall to the bottom.
    axis.set_yscale("log", nonpositive="mask")
    positive = [value for value in values if np.isfinite(value) and value > 0] or [1]
    spread = max(positive) / min(positive)
    steps = (1, 1.5, 2, 3, 5, 7) if spread < 10 else (1, 2, 5) if spread < 1e4 else (1,)
    axis.yaxis.set_major_locator(MaxNLocator(4) if spread < 1.6 else LogLocator(subs=steps))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def decades(axis: Axes, values: Sequence[float]) -> None:
    """A logarithmic x axis with a number at each decade; at 1, 2 and 5 where it spans less than one."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1,) if max(values) >= 10 * min(values) else (1, 2, 5)))
    # Those between would stand in each other's way.
    axis.xaxis.set_minor_formatter(NullFormatter())


def add_title(figure: Figure, title: str) -> None:
    """The title of the whole figure, broken into lines where it is wider than the figure."""
    characters = int(figure.get_figwidth() / 0.077)
    figure.suptitle("\n".join(textwrap.wrap(title, characters)), fontsize=9.5)


def whole_ticks(axis: Axis, count: int, inches: float) -> None:
    """Ticks at 0, 1, 2 and so on, or at every second, fourth, eighth where there is no room for all."""
    from matplotlib.ticker import FixedLocator

    step = 1
    while count / step > inches / 0.22:
        step *= 2
    axis.set_major_locator(FixedLocator(list(range(0, count, step))))


def rows_not_measured(table: pd.DataFrame, over: str) -> pd.Series:
    """Which lines of a run's table hold nothing but their place: checkpoints that are missing or broken."""
    return table.drop(columns=over).isna().all(axis=1)


def legend_below(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)))
