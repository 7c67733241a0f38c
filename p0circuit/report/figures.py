"""The figures, in one style: made for a two-column paper and legible from the back of a lecture room."""

from __future__ import annotations

import functools
import itertools
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

from p0circuit.intervals import Interval

if TYPE_CHECKING:
    import networkx as nx
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
# More cells than this are told by their colour alone.
_MOST_ANNOTATED_CELLS = 80


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


def _styled(draw: Callable[Parameters, Drawn]) -> Callable[Parameters, Drawn]:
    """Run a drawing function under the project's style."""

    @functools.wraps(draw)
    def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Drawn:
        import matplotlib as mpl

        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return wrapper


@_styled
def heat_maps(panels: dict[str, np.ndarray], title: str, value_label: str, x_label: str = "head") -> Figure:
    """One map of layers by heads (or `x_label`) per panel, from 0 to 1; cells carry their value where there is room."""
    count = len(panels)
    layers, heads = next(iter(panels.values())).shape
    # Five panels fill the page, fewer may be wider.
    width = max(1.2, min(0.34 * heads + 0.35, 6.1 / count))
    height = max(1.6, min(5.0, 0.3 * layers + 0.9))
    figure, axes = new_figure(width * count + 0.9, height + 0.25, 1, count, sharey=True)
    annotated = layers * heads <= _MOST_ANNOTATED_CELLS and width / heads > 0.24
    for axis, (name, values) in zip(axes[0], panels.items(), strict=True):
        image = axis.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto", origin="lower")
        axis.grid(False)
        axis.set_title(name)
        axis.set_xlabel(x_label)
        _whole_ticks(axis.xaxis, heads, width)
        _whole_ticks(axis.yaxis, layers, height)
        if annotated:
            for layer, head in np.ndindex(layers, heads):
                value = values[layer, head]
                colour = "black" if value > 0.6 else "white"
                text = f"{value:.2f}".lstrip("0").replace("1.00", "1.0")
                axis.text(head, layer, text, ha="center", va="center", fontsize=6.5, color=colour)
    axes[0, 0].set_ylabel("layer")
    figure.colorbar(image, ax=axes[0, -1], label=value_label)
    _add_title(figure, title)
    return figure


@_styled
def effect_maps(panels: dict[str, pd.DataFrame], title: str, value_label: str = "effect") -> Figure:
    """One map per panel of what patching does: layers (the table's lines) by components, heads or neurons (columns).

    The scale is the same for all, from -1 (blue) over no effect (white) to 1 (red); cells there are none of stay grey.
    """
    count = len(panels)
    layers, columns = (max(table.shape[axis] for table in panels.values()) for axis in (0, 1))
    width, height = max(1.5, min(3.4, 0.42 * columns + 0.35)), max(1.6, min(5.0, 0.26 * layers + 1.1))
    figure, axes = new_figure(width * count + 0.9, height + 0.25, 1, count, sharey=True)
    for axis, (name, table) in zip(axes[0], panels.items(), strict=True):
        values = table.to_numpy(dtype=float)
        image = axis.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", origin="lower")
        axis.set_facecolor("#E5E5E5")
        axis.grid(False)
        axis.set_title(name)
        step = max(1, len(table.columns) // 8)
        wordy = any(isinstance(label, str) for label in table.columns)
        axis.set_xticks(range(0, len(table.columns), step), table.columns[::step], rotation=45 if wordy else 0)
        axis.set_yticks(range(len(table.index)), table.index)
        axis.set_xlabel(str(table.columns.name or ""))
        if values.size <= _MOST_ANNOTATED_CELLS:
            for row, column in np.argwhere(np.isfinite(values)):
                value = values[row, column]
                colour = "white" if abs(value) > 0.6 else "black"
                text = f"{value:.2f}".replace("0.", ".").replace("-.00", ".00")
                axis.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)
    axes[0, 0].set_ylabel("layer")
    figure.colorbar(image, ax=axes[0, -1], label=value_label)
    _add_title(figure, title)
    return figure


def _plain_log_scale(axis: Axes, values: Sequence[float]) -> None:
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


def _decades(axis: Axes, values: Sequence[float]) -> None:
    """A logarithmic x axis with a number at each decade; at 1, 2 and 5 where it spans less than one."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1,) if max(values) >= 10 * min(values) else (1, 2, 5)))
    # Those between would stand in each other's way.
    axis.xaxis.set_minor_formatter(NullFormatter())


def _add_title(figure: Figure, title: str) -> None:
    """The title of the whole figure, broken into lines where it is wider than the figure."""
    characters = int(figure.get_figwidth() / 0.077)
    figure.suptitle("\n".join(textwrap.wrap(title, characters)), fontsize=9.5)


def _whole_ticks(axis: Axis, count: int, inches: float) -> None:
    """Ticks at 0, 1, 2 and so on, or at every second, fourth, eighth where there is no room for all."""
    from matplotlib.ticker import FixedLocator

    step = 1
    while count / step > inches / 0.22:
        step *= 2
    axis.set_major_locator(FixedLocator(list(range(0, count, step))))


@_styled
def trajectories(
    panels: dict[str, Sequence[Series]],
    positions: Sequence[str],
    title: str,
    x_label: str,
    y_labels: Sequence[str],
    log: Sequence[bool] | bool = False,
    reference: float | None = None,
) -> Figure:
    """Lines with their intervals over a common axis (usually the layers), one panel for each group."""
    logs = [log] * len(panels) if isinstance(log, bool) else list(log)
    most = max(map(len, panels.values()))
    # More names than two find no room that no line passes through: they go below.
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
            _plain_log_scale(axis, [value for line in lines for value in line.values])
        step = max(1, len(positions) // 10)
        axis.set_xticks(x[::step], [str(p) for p in positions][::step])
        axis.set(title=name, xlabel=x_label, ylabel=y_label)
        if below:
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
        elif len(lines) > 1:
            axis.legend()
    _add_title(figure, title)
    return figure


@_styled
def sweeps(
    panels: Mapping[str, tuple[Sequence[Series], Sequence[str]]], title: str, x_labels: Sequence[str], y_label: str
) -> Figure:
    """Lines with their intervals, each panel over the settings of its own sweep, all on a common scale.

    A panel is its lines and the labels of the settings; a line has NaN where it has no value.
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
        # Under the panel, where it can hide no line.
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
    axes[0, 0].set_ylabel(y_label)
    _add_title(figure, title)
    return figure


@_styled
def bars(panels: dict[str, dict[str, Interval]], title: str, y_labels: Sequence[str]) -> Figure:
    """One panel per quantity, one bar with its 95 % interval per condition; the value stands above the bar."""
    figure, axes = new_figure(max(COLUMN, 2.0 * len(panels)), 2.6, 1, len(panels))
    for axis, (name, intervals), y_label in zip(axes[0], panels.items(), y_labels, strict=True):
        for place, (interval, colour) in enumerate(zip(intervals.values(), COLOURS, strict=False)):
            errors = [[interval.value - interval.low], [interval.high - interval.value]]
            axis.bar(place, interval.value, color=colour, width=0.65)
            axis.errorbar(place, interval.value, yerr=np.clip(errors, 0, None), color="black", capsize=3, linewidth=1)
            axis.annotate(
                f"{interval.value:.3g}",
                (place, max(interval.high, interval.value)),
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
    _add_title(figure, title)
    return figure


def _draw_interval(axis: Axes, place: int, interval: Interval, colour: str, told: str, gap: float) -> None:
    """A lying line with a dot, and its value `gap` points beside the panel."""
    axis.plot([interval.low, interval.high], [place, place], color=colour, linewidth=2.4, solid_capstyle="butt")
    axis.plot(interval.value, place, color=colour, marker="o", markersize=5)
    axis.annotate(
        told,
        (1, place),
        xycoords=("axes fraction", "data"),
        xytext=(gap, 0),
        textcoords="offset points",
        va="center",
        fontsize=7,
    )


@_styled
def intervals(
    panels: dict[str, dict[str, Interval]],
    title: str,
    x_labels: Sequence[str],
    controls: Collection[str] = (),
    reference: float | None = None,
) -> Figure:
    """One panel per quantity, one line with a dot and its 95 % interval per condition; the value stands beside it.

    Panels stand above each other on a common scale; controls are grey. For labels too long to stand under bars.
    """
    heights = [len(lines) for lines in panels.values()]
    figure, axes = new_figure(
        COLUMN + 1.2, 0.23 * sum(heights) + 0.75 * len(panels) + 0.3, len(panels), height_ratios=heights, sharex=True
    )
    for axis, (name, lines), x_label in zip(axes[:, 0], panels.items(), x_labels, strict=True):
        if reference is not None:
            axis.axvline(reference, color=GREY, linewidth=0.8, linestyle="--")
        for place, (label, interval) in enumerate(lines.items()):
            colour = GREY if label in controls else BLUE
            _draw_interval(axis, place, interval, colour, f"{interval.value:.3g}", gap=4)
        axis.set_yticks(range(len(lines)), list(lines))
        axis.set_ylim(len(lines) - 0.4, -0.6)
        axis.set(title=name, xlabel=x_label)
        axis.tick_params(labelbottom=True)
        axis.margins(x=0.08)
        axis.grid(axis="y", visible=False)
    _add_title(figure, title)
    return figure


@_styled
def side_by_side(
    panels: Mapping[str, Mapping[str, Interval]], title: str, x_labels: Sequence[str], base: str
) -> Figure:
    """The same conditions under each other, one column with its own scale per quantity; the value stands beside it.

    The condition that the others are compared with is grey, with a dashed line through all of them. Where a quantity
    was not measured there is no dot.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    figure, axes = new_figure(1.7 * len(panels) + 1.8, 0.27 * len(names) + 1.1, 1, len(panels), sharey=True)
    for axis, (quantity, lines), x_label in zip(axes[0], panels.items(), x_labels, strict=True):
        if base in lines:
            axis.axvline(lines[base].value, color=GREY, linewidth=0.8, linestyle="--")
        for name, interval in lines.items():
            place, colour = names.index(name), GREY if name == base else BLUE
            told = f"{interval.value:.3f}" if abs(interval.value) < 1 else f"{interval.value:.3g}"
            _draw_interval(axis, place, interval, colour, told, gap=2)
        axis.set(title=quantity, xlabel=x_label)
        axis.margins(x=0.12)
        axis.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].set_ylim(len(names) - 0.4, -0.6)
    _add_title(figure, title)
    return figure


@_styled
def draw_circuit(graph: nx.DiGraph, ends: Collection[str], title: str) -> Figure:
    """A circuit of components, the embedding at the bottom and the sink heads on top.

    Blue edges lower the sink when they are patched, so they carry it; orange ones hold it back. Widths are effects.
    """
    names = sorted(graph.nodes, key=_place)
    rows: dict[tuple[int, int], list[str]] = {}
    for name in names:
        rows.setdefault(_place(name)[:2], []).append(name)
    widest = max(map(len, rows.values()))
    figure, axes = new_figure(max(COLUMN, 0.9 * widest + 0.9), 0.8 * len(rows) + 0.8)
    axis = axes[0, 0]
    at = {
        name: (number - (len(row) - 1) / 2, height)
        for height, row in enumerate(rows.values())
        for number, name in enumerate(row)
    }
    strongest = max((abs(effect) for *_, effect in graph.edges(data="effect")), default=1.0)
    for number, (start, end, data) in enumerate(
        sorted(graph.edges(data=True), key=lambda edge: abs(edge[2]["effect"]))
    ):
        size = abs(data["effect"]) / strongest
        # Edges over more than one row are bent past the widest row between, to alternating sides: the middle of an
        # arc lies rad * height / 2 beside the straight line.
        low, high = at[start][1], at[end][1]
        between = [len(row) for place, row in enumerate(rows.values()) if low < place < high]
        beside = ((max(between) - 1) / 2 + 0.75) * (-1) ** number if between else 0.0
        bend = 2 * beside / (high - low)
        axis.annotate(
            "",
            at[end],
            at[start],
            arrowprops={
                "arrowstyle": "-|>",
                "color": BLUE if data["effect"] < 0 else ORANGE,
                "linewidth": 0.6 + 3.4 * size,
                "shrinkA": 12,
                "shrinkB": 13,
                "alpha": 0.35 + 0.65 * size,
                "connectionstyle": f"arc3,rad={bend}",
            },
        )
        middle = [(first + second) / 2 for first, second in zip(at[start], at[end], strict=True)]
        inputs = "/".join(sorted({name[-1].upper() for name in data["inputs"] if name[-2:] in (".q", ".k", ".v")}))
        label = f"{inputs} {data['effect']:+.2f}".strip()
        axis.annotate(
            label,
            (middle[0] + beside, middle[1]),
            fontsize=6.5,
            ha="center",
            va="center",
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )
    for name, (x, y) in at.items():
        face = BLUE if name in ends else "white"
        axis.annotate(
            name,
            (x, y),
            ha="center",
            va="center",
            fontsize=7.5,
            color="white" if name in ends else "black",
            bbox={"boxstyle": "round,pad=0.4", "facecolor": face, "edgecolor": "black", "linewidth": 0.8},
        )
    half = (widest - 1) / 2 + 1.1
    axis.set(xlim=(-half, half), ylim=(-0.9, len(rows) - 0.6), aspect="equal")
    axis.axis("off")
    note = "numbers: change of the sink heads' score when the edge is patched\nblue: the edge carries the sink"
    axis.text(0, -0.75, note, ha="center", va="center", fontsize=6.5, color=GREY)
    figure.suptitle(title, fontsize=9.5)
    return figure


def _place(name: str) -> tuple[int, int, int]:
    """Where a component is drawn: layer, attention before MLP, index; a set of heads of many layers on top."""
    part, *numbers = name.split(".")
    if part == "embed":
        return -1, 0, 0
    if not numbers:
        return 10**6, 0, 0
    layer, index = int(numbers[0]), int(numbers[1].split("+")[0]) if len(numbers) > 1 else 0
    return layer, 0 if part == "attn" else 1, index


@dataclass(frozen=True)
class Course:
    """One training run in a figure: its table, the group whose colour it has, and the index where its sink formed."""

    label: str
    group: str
    table: pd.DataFrame
    formation: int | None = None


@_styled
def development(runs: dict[str, pd.DataFrame], formation_step: int | None = None) -> Figure:
    """The development of runs along training: loss, sink, norm of P0 and concentration, over steps on a log axis."""
    panels = {
        "Loss": ("loss", "nats per token"),
        "Sink heads": ("excess", "excess score"),
        "Sink rate, layers ≥ 2": ("sink_rate_from_layer_2", "share of heads"),
        "Norm ratio after block 1": ("norm_ratio", "P0 over median"),
        "Concentration, causal": ("concentration_causal", "share of the sink rate"),
        "Induction": ("induction_score", "best head"),
    }
    figure, axes = new_figure(2 * COLUMN, 4.2, 2, 3, sharex=True)
    lines = [Course(name, name, table) for name, table in runs.items()]
    _draw_courses(axes.flat, panels, lines, "step")
    for axis in axes.flat:
        if formation_step is not None:
            axis.axvline(formation_step, color=GREY, linewidth=0.8, linestyle="--")
    for axis in axes[0]:
        axis.set_xlabel("")
    # Where hardly a head is a sink yet, what a handful of them gain can be any multiple of what there is to lose.
    axes[1, 1].set_ylim(bottom=max(axes[1, 1].get_ylim()[0], -1.05))
    if len(runs) > 1:
        _legend_below(figure, axes[0, 0])
    told = [] if formation_step is None else ["dashed: the sink has formed"]
    if any(_not_measured(table, "step").any() for table in runs.values()):
        told.append("crosses: not measured")
    _add_title(figure, f"{', '.join(runs)}: along training" + (f" ({'; '.join(told)})" if told else ""))
    return figure


@_styled
def courses(panels: dict[str, tuple[str, str]], runs: Sequence[Course], title: str) -> Figure:
    """Columns of many runs over the tokens seen, one panel each; a panel is its title, its column and its label.

    Runs of a group share a colour; a circle marks the checkpoint at which a run's sink has formed.
    """
    figure, axes = new_figure(2.3 * len(panels) + 0.4, 3.1, 1, len(panels), sharex=True)
    _draw_courses(axes.flat, panels, runs, "tokens")
    _legend_below(figure, axes[0, 0])
    _add_title(figure, title)
    return figure


@_styled
def methods_beside(runs: Sequence[Course], final: pd.DataFrame, title: str) -> Figure:
    """Training methods: sink and loss along training, and the final sink against the final norm ratio, run by run."""
    figure, axes = new_figure(2 * COLUMN + 0.6, 3.2, 1, 3)
    panels = {"Sink heads": ("excess", "excess score"), "Held-out loss": ("loss", "nats per token")}
    _draw_courses(axes[0, :2], panels, runs, "tokens")
    colours = _colours_of(runs)
    for group, table in final.groupby("variant", sort=False):
        axes[0, 2].plot(
            table["norm_ratio"], table["excess"], color=colours[str(group)], marker="o", linestyle="", markersize=5
        )
    axes[0, 2].set(title="Sink against outlier, at the end", xlabel="largest norm ratio of P0", ylabel="excess score")
    _legend_below(figure, axes[0, 0])
    _add_title(figure, title)
    return figure


@_styled
def predictions(errors: pd.DataFrame, deviations: pd.DataFrame, title: str) -> Figure:
    """Errors of two predictions, run by run, and what the second has learnt from.

    `errors`: a line per run, a column per prediction; `deviations`: columns "circuit" and "loss".
    """
    figure, axes = new_figure(2 * COLUMN, 3.0, 1, 2)
    left, right = axes[0]
    for place, values in enumerate(errors.to_numpy()):
        left.plot(values, [place] * len(values), color=GREY, linewidth=0.8)
        for value, colour in zip(values, COLOURS, strict=False):
            left.plot(value, place, color=colour, marker="o", linestyle="")
    for name, colour in zip(errors.columns, COLOURS, strict=False):
        left.plot([], [], color=colour, marker="o", linestyle="", label=str(name).replace("_", " "))
    left.set_yticks(range(len(errors)), [str(name) for name in errors.index])
    left.set(title="Held-out runs", xlabel="error of the remaining loss (nats)")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    right.plot(deviations["circuit"], deviations["loss"], color=BLUE, marker="o", linestyle="", markersize=3, alpha=0.6)
    right.axhline(0, color=GREY, linewidth=0.8)
    right.axvline(0, color=GREY, linewidth=0.8)
    right.set(
        title="Away from the mean of the seeds",
        xlabel="sink rate from layer 2 on, deviation",
        ylabel="remaining loss, deviation (nats)",
    )
    _add_title(figure, title)
    return figure


def _colours_of(runs: Sequence[Course]) -> dict[str, str]:
    return dict(zip(dict.fromkeys(run.group for run in runs), itertools.cycle(COLOURS), strict=False))


def _draw_courses(axes: Iterable[Axes], panels: dict[str, tuple[str, str]], runs: Sequence[Course], over: str) -> None:
    """Columns of runs over steps or tokens on a log axis, one panel each."""
    colours = _colours_of(runs)
    # Step 0 has its place on a log axis too, the same for all runs: at half of the first step of any.
    later = [value for run in runs for value in run.table[over] if value > 0] or [1]
    start = 0.5 * min(later)
    for axis, (title, (column, label)) in zip(axes, panels.items(), strict=True):
        told: set[str] = set()
        for run in runs:
            x = run.table[over].where(run.table[over] != 0, start)
            y = run.table[column].astype(float)
            name = None if run.group in told else run.group
            told.add(run.group)
            axis.plot(x, y, color=colours[run.group], marker="o", markersize=2.5, linewidth=1.2, label=name)
            if (gaps := x[_not_measured(run.table, over)]).size:
                axis.plot(gaps, 0 * gaps, "x", color=GREY, transform=axis.get_xaxis_transform(), clip_on=False)
            if run.formation is not None:
                at = (x.iloc[run.formation], y.iloc[run.formation])
                axis.plot(*at, color=colours[run.group], marker="o", markersize=7, fillstyle="none")
        _decades(axis, [start, *later])
        axis.set(title=title, ylabel=label, xlabel=over)


def _not_measured(table: pd.DataFrame, over: str) -> pd.Series:
    """Which lines of a run's table hold nothing but their place: checkpoints that are missing or broken."""
    return table.drop(columns=over).isna().all(axis=1)


def _legend_below(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)))
