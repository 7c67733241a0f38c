"""Training curves."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
from p0circuit.figures.style import (
    BLUE,
    COLOURS,
    COLUMN,
    GREY,
    add_title,
    decades,
    legend_below,
    new_figure,
    rows_not_measured,
    styled,
)


@dataclass(frozen=True)
class TrainingCurve:
    """One training run in a figure: its table, the group whose colour it has, and the index where its sink formed."""

    label: str
    group: str
    table: pd.DataFrame
    formation: int | None = None


@styled
def trace_panels(runs: dict[str, pd.DataFrame], formation_step: int | None = None) -> Figure:
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
    lines = [TrainingCurve(name, name, table) for name, table in runs.items()]
    _draw_courses(axes.flat, panels, lines, "step")
    for axis in axes.flat:
        if formation_step is not None:
            axis.axvline(formation_step, color=GREY, linewidth=0.8, linestyle="--")
    for axis in axes[0]:
        axis.set_xlabel("")
    # Where hardly a head is a sink yet, what a handful of them gain can be any multiple of what there is to lose.
    axes[1, 1].set_ylim(bottom=max(axes[1, 1].get_ylim()[0], -1.05))
    if len(runs) > 1:
        legend_below(figure, axes[0, 0])
    told = [] if formation_step is None else ["dashed: the sink has formed"]
    if any(rows_not_measured(table, "step").any() for table in runs.values()):
        told.append("crosses: not measured")
    add_title(figure, f"{', '.join(runs)}: along training" + (f" ({'; '.join(told)})" if told else ""))
    return figure


@styled
def training_curves(panels: dict[str, tuple[str, str]], runs: Sequence[TrainingCurve], title: str) -> Figure:
    """Columns of many runs over the tokens seen, one panel each; a panel is its title, its column and its label.

    Runs of a group share a colour; a circle marks the checkpoint at which a run's sink has formed.
    """
    figure, axes = new_figure(2.3 * len(panels) + 0.4, 3.1, 1, len(panels), sharex=True)
    _draw_courses(axes.flat, panels, runs, "tokens")
    legend_below(figure, axes[0, 0])
    add_title(figure, title)
    return figure


@styled
def method_comparison(runs: Sequence[TrainingCurve], final: pd.DataFrame, title: str) -> Figure:
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
    legend_below(figure, axes[0, 0])
    add_title(figure, title)
    return figure


@styled
def prediction_errors(errors: pd.DataFrame, deviations: pd.DataFrame, title: str) -> Figure:
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
    add_title(figure, title)
    return figure


def _draw_courses(
    axes: Iterable[Axes], panels: dict[str, tuple[str, str]], runs: Sequence[TrainingCurve], over: str
) -> None:
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
            if (gaps := x[rows_not_measured(run.table, over)]).size:
                axis.plot(gaps, 0 * gaps, "x", color=GREY, transform=axis.get_xaxis_transform(), clip_on=False)
            if run.formation is not None:
                at = (x.iloc[run.formation], y.iloc[run.formation])
                axis.plot(*at, color=colours[run.group], marker="o", markersize=7, fillstyle="none")
        decades(axis, [start, *later])
        axis.set(title=title, ylabel=label, xlabel=over)


def _colours_of(runs: Sequence[TrainingCurve]) -> dict[str, str]:
    return dict(zip(dict.fromkeys(run.group for run in runs), itertools.cycle(COLOURS), strict=False))
