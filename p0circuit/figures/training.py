"""Figures of training runs: curves over steps or tokens, training methods compared, and predictions of the loss."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from p0circuit.figures.style import (
    BLUE,
    COLOURS,
    COLUMN,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    add_title,
    decades,
    legend_below,
    new_figure,
    rows_not_measured,
    styled,
)
from p0circuit.stats import Interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DARK = "#333333"
GROUP_STYLES = (
    (BLUE, "-"),
    (ORANGE, "-"),
    (GREEN, "-"),
    (PURPLE, "-"),
    (GREY, "-"),
    (DARK, "--"),
    (BLUE, ":"),
    (ORANGE, ":"),
    (GREEN, ":"),
    (PURPLE, ":"),
)
"""Colour and dashes of the groups of a figure, in order. Thin lines allow only so many distinct colours."""
X_LABELS = {"step": "step", "tokens": "tokens", "share": "share of the run's tokens"}


@dataclass(frozen=True)
class TrainingCurve:
    """One training run in a figure.

    Attributes:
        label: name of the run.
        group: runs of a group, such as the seeds of a variant, share a line style.
        table: one row per checkpoint, with the columns that are drawn.
        formation: index of the row at which the sink has emerged; None if it has not.
    """

    label: str
    group: str
    table: pd.DataFrame
    formation: int | None = None


@styled
def trace_panels(runs: Mapping[str, pd.DataFrame], formation_step: int | None = None) -> Figure:
    """Draw loss, sink, norm of P0, concentration and induction over the steps of one or several runs.

    Args:
        runs: tables of runs by name, as `Trace.to_dataframe` makes them. A row with nothing but a step is a checkpoint
            that could not be measured; it is a gap in every line, and marked.
        formation_step: step at which the sink emerged; drawn as a dashed line.
    """
    panels = {
        "Loss": ("loss", "nats per token"),
        "Sink heads": ("excess", "excess score"),
        "Sink rate, layers ≥ 2": ("sink_rate_from_layer_2", "share of heads"),
        "Norm ratio after block 1": ("norm_ratio", "P0 over median"),
        "Concentration, causal": ("concentration_causal", "share of the sink rate"),
        "Induction": ("induction_score", "best head"),
    }
    figure, axes = new_figure(2 * COLUMN, 4.2, 2, 3, sharex=True)
    curves = [TrainingCurve(name, name, table) for name, table in runs.items()]
    _draw_curves(axes.flat, panels, curves, "step")
    for axis in axes.flat:
        if formation_step is not None:
            axis.axvline(formation_step, color=GREY, linewidth=0.8, linestyle="--")
    for axis in axes[0]:
        axis.set_xlabel("")
    # While there are few sink heads, the concentration is a ratio with a small denominator and can be any number.
    axes[1, 1].set_ylim(bottom=max(axes[1, 1].get_ylim()[0], -1.05))
    if len(runs) > 1:
        legend_below(figure, axes[0, 0])
    remarks = [] if formation_step is None else ["dashed: the sink has emerged"]
    if any(rows_not_measured(table, "step").any() for table in runs.values()):
        remarks.append("crosses: not measured")
    add_title(figure, f"{', '.join(runs)}: along training" + (f" ({'; '.join(remarks)})" if remarks else ""))
    return figure


@styled
def training_curves(
    panels: Mapping[str, tuple[str, str]],
    runs: Sequence[TrainingCurve],
    title: str,
    over: str = "tokens",
    limit: float | None = None,
) -> Figure:
    """Draw columns of many runs along training, one panel each.

    Of a group with several runs at the same checkpoints the mean is drawn, with a band from the lowest to the highest
    run. A circle marks the checkpoint at which a run's sink has emerged.

    Args:
        panels: column and label of the y axis of each panel, by the panel's title.
        runs: the runs, in the order of the legend.
        title: title of the figure.
        over: column of the x axis: "step", "tokens" or "share".
        limit: position of a dashed vertical line on the x axis.
    """
    figure, axes = new_figure(2.3 * len(panels) + 0.4, 3.1, 1, len(panels), sharex=True)
    _draw_curves(axes.flat, panels, runs, over)
    if limit is not None:
        for axis in axes.flat:
            axis.axvline(limit, color=DARK, linewidth=0.9, linestyle="--")
    legend_below(figure, axes[0, 0])
    add_title(figure, title)
    return figure


@styled
def method_comparison(
    runs: Sequence[TrainingCurve], final: pd.DataFrame, differences: Mapping[str, Interval], title: str
) -> Figure:
    """Draw training methods: sink and loss along training, the final sink of each run, and the differences.

    Args:
        runs: the runs of the methods and of their baseline.
        final: columns variant, norm_ratio and excess, one row per run.
        differences: differences to the baseline by label, with their intervals.
        title: title of the figure.
    """
    figure, axes = new_figure(3 * COLUMN, 3.2, 1, 4)
    panels = {"Sink heads": ("excess", "excess score"), "Held-out loss": ("loss", "nats per token")}
    _draw_curves(axes[0, :2], panels, runs, "tokens")
    styles = _styles_of(runs)
    at_end, effects = axes[0, 2:]
    for group, table in final.groupby("variant", sort=False):
        colour, _ = styles[str(group)]
        at_end.plot(table["norm_ratio"], table["excess"], color=colour, marker="o", linestyle="", markersize=5)
    at_end.set(title="At the end, run by run", xlabel="largest norm ratio of P0", ylabel="excess score")
    for row, interval in enumerate(differences.values()):
        error = [[interval.value - interval.low], [interval.high - interval.value]]
        effects.errorbar(interval.value, row, xerr=error, color=DARK, marker="o", markersize=4, capsize=2)
    effects.axvline(0, color=GREY, linewidth=0.8)
    effects.set_yticks(range(len(differences)), list(differences))
    effects.set(title="Difference to the baseline", ylim=(len(differences) - 0.5, -0.5), xlabel="method - baseline")
    legend_below(figure, axes[0, 0])
    add_title(figure, title)
    return figure


@styled
def prediction_errors(errors: pd.DataFrame, deviations: pd.DataFrame, title: str) -> Figure:
    """Draw the errors of two predictions, run by run, and the data that the second one is fitted to.

    Args:
        errors: one row per run, one column per prediction, in nats.
        deviations: columns "circuit" and "loss", one row per run and checkpoint.
        title: title of the figure.
    """
    figure, axes = new_figure(2 * COLUMN, 3.0, 1, 2)
    left, right = axes[0]
    for row, values in enumerate(errors.to_numpy()):
        left.plot(values, [row] * len(values), color=GREY, linewidth=0.8)
        for value, colour in zip(values, COLOURS, strict=False):
            left.plot(value, row, color=colour, marker="o", linestyle="")
    for name, colour in zip(errors.columns, COLOURS, strict=False):
        left.plot([], [], color=colour, marker="o", linestyle="", label=str(name).replace("_", " "))
    left.set_yticks(range(len(errors)), [str(name) for name in errors.index])
    left.set(title=f"Held-out runs (n = {len(errors)})", xlabel="error of the remaining loss (nats)")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    right.plot(deviations["circuit"], deviations["loss"], color=BLUE, marker="o", linestyle="", markersize=3, alpha=0.6)
    right.axhline(0, color=GREY, linewidth=0.8)
    right.axvline(0, color=GREY, linewidth=0.8)
    right.set(
        title=f"Away from the seeds' mean (n = {len(deviations)})",
        xlabel="sink rate from layer 2 on, deviation",
        ylabel="remaining loss, deviation (nats)",
    )
    add_title(figure, title)
    return figure


def _draw_curves(
    axes: Iterable[Axes], panels: Mapping[str, tuple[str, str]], runs: Sequence[TrainingCurve], over: str
) -> None:
    """Draw columns of runs over a logarithmic x axis, one panel each."""
    styles = _styles_of(runs)
    groups = {name: [run for run in runs if run.group == name] for name in styles}
    numbered = any(len(members) > 1 for members in groups.values())
    # Step 0 has a position on the log axis too, the same for all runs: half of the first later step of any run.
    later = [value for run in runs for value in run.table[over] if value > 0] or [1]
    start = 0.5 * min(later)
    for axis, (title, (column, label)) in zip(axes, panels.items(), strict=True):
        for name, members in groups.items():
            colour, dashes = styles[name]
            legend = f"{name} (n = {len(members)})" if numbered else name
            for bundle in _bundles(members, over):
                x = bundle[0].table[over].where(bundle[0].table[over] != 0, start)
                values = np.array([run.table[column].astype(float) for run in bundle])
                mean, low, high = _mean_and_range(values)
                axis.plot(
                    x, mean, color=colour, linestyle=dashes, marker="o", markersize=2.5, linewidth=1.2, label=legend
                )
                legend = None
                if len(bundle) > 1:
                    axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
                if (gaps := x[rows_not_measured(bundle[0].table, over)]).size:
                    axis.plot(gaps, 0 * gaps, "x", color=GREY, transform=axis.get_xaxis_transform(), clip_on=False)
                for run, own in zip(bundle, values, strict=True):
                    if run.formation is not None:
                        point = x.iloc[run.formation], own[run.formation]
                        axis.plot(*point, color=colour, marker="o", markersize=7, fillstyle="none")
        decades(axis, [start, *later])
        axis.set(title=title, ylabel=label, xlabel=X_LABELS[over])


def _bundles(runs: Sequence[TrainingCurve], over: str) -> list[list[TrainingCurve]]:
    """Group runs that can be averaged: all together if they have the same checkpoints, otherwise each alone."""
    first = runs[0].table[over].to_numpy()
    same = all(np.array_equal(first, run.table[over].to_numpy(), equal_nan=True) for run in runs)
    return [list(runs)] if same else [[run] for run in runs]


def _mean_and_range(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean, lowest and highest of [run, checkpoint] over the runs with a value; NaN where there is none."""
    defined = ~np.isnan(values)
    count = defined.sum(0)
    mean = np.where(count > 0, np.where(defined, values, 0).sum(0) / np.maximum(count, 1), np.nan)
    low = np.where(count > 0, np.where(defined, values, np.inf).min(0), np.nan)
    high = np.where(count > 0, np.where(defined, values, -np.inf).max(0), np.nan)
    return mean, low, high


def _styles_of(runs: Sequence[TrainingCurve]) -> dict[str, tuple[str, str]]:
    return dict(zip(dict.fromkeys(run.group for run in runs), itertools.cycle(GROUP_STYLES), strict=False))
