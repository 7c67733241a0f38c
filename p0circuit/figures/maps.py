"""Heat maps: heads by layer, nodes by position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
from p0circuit.figures.style import add_title, new_figure, styled, whole_ticks

# Larger maps show no numbers in their cells.
_MOST_ANNOTATED_CELLS = 80


@styled
def heat_maps(panels: dict[str, np.ndarray], title: str, value_label: str, x_label: str = "head") -> Figure:
    """Draw heat maps on a scale from 0 to 1, layers by heads; cells show their value where there is room.

    Args:
        panels: values [layer, head] by title of the panel.
        title: title of the figure.
        value_label: label of the colour scale.
        x_label: label of the x axis.
    """
    count = len(panels)
    layers, heads = next(iter(panels.values())).shape
    # Five panels fill the page; fewer panels can be wider.
    width = max(1.2, min(0.34 * heads + 0.35, 6.1 / count))
    height = max(1.6, min(5.0, 0.3 * layers + 0.9))
    figure, axes = new_figure(width * count + 0.9, height + 0.25, 1, count, sharey=True)
    annotated = layers * heads <= _MOST_ANNOTATED_CELLS and width / heads > 0.24
    for axis, (name, values) in zip(axes[0], panels.items(), strict=True):
        image = axis.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto", origin="lower")
        axis.grid(False)
        axis.set_title(name)
        axis.set_xlabel(x_label)
        whole_ticks(axis.xaxis, heads, width)
        whole_ticks(axis.yaxis, layers, height)
        if annotated:
            for layer, head in np.ndindex(layers, heads):
                value = values[layer, head]
                colour = "black" if value > 0.6 else "white"
                text = f"{value:.2f}".lstrip("0").replace("1.00", "1.0")
                axis.text(head, layer, text, ha="center", va="center", fontsize=6.5, color=colour)
    axes[0, 0].set_ylabel("layer")
    figure.colorbar(image, ax=axes[0, -1], label=value_label)
    add_title(figure, title)
    return figure


@styled
def effect_maps(
    panels: dict[str, pd.DataFrame],
    title: str,
    value_label: str = "effect",
    limit: float | None = 1.0,
    uncertain: Mapping[str, pd.DataFrame] | None = None,
) -> Figure:
    """Draw heat maps of patching effects on a scale from blue (below 0) over white to red; missing cells are grey.

    Args:
        panels: tables by title of the panel; rows are layers, columns are components, heads or neurons.
        title: title of the figure.
        value_label: label of the colour scale.
        limit: the scale goes from minus this to this. If None, it is the size of the largest effect.
        uncertain: for each panel, which cells get a dot.
    """
    count = len(panels)
    if limit is None:
        limit = (
            max((float(np.nanmax(abs(table.to_numpy(dtype=float)))) for table in panels.values()), default=0.0) or 1.0
        )
    layers, columns = (max(table.shape[axis] for table in panels.values()) for axis in (0, 1))
    width, height = max(1.5, min(3.4, 0.42 * columns + 0.35)), max(1.6, min(5.0, 0.26 * layers + 1.1))
    figure, axes = new_figure(width * count + 0.9, height + 0.25, 1, count, sharey=True)
    for axis, (name, table) in zip(axes[0], panels.items(), strict=True):
        values = table.to_numpy(dtype=float)
        image = axis.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", origin="lower")
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
                colour = "white" if abs(value) > 0.6 * limit else "black"
                text = f"{value:.2f}".replace("0.", ".").replace("-.00", ".00")
                axis.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)
        if uncertain is not None:
            rows, columns_with_dot = np.nonzero(uncertain[name].to_numpy(dtype=bool) & np.isfinite(values))
            axis.scatter(columns_with_dot, rows - 0.35, s=3, color="black")
    axes[0, 0].set_ylabel("layer")
    figure.colorbar(image, ax=axes[0, -1], label=value_label)
    add_title(figure, title)
    return figure


@styled
def edge_map(table: pd.DataFrame, title: str, value_label: str, uncertain: np.ndarray) -> Figure:
    """Draw effects of edges: senders (lines of the table) by receiving heads (columns, by layer and head).

    Args:
        table: data frame of effects, with columns of two levels, layer and head; no value where there is no edge.
        title: title of the figure.
        value_label: label of the colour scale.
        uncertain: which cells get a dot, in the shape of the table.
    """
    values = table.to_numpy(dtype=float)
    limit = float(np.nanmax(abs(values))) if np.isfinite(values).any() else 0.0
    limit = limit or 1.0
    width, height = max(2.5, min(6.1, 0.12 * values.shape[1] + 0.5)), max(1.6, min(6.0, 0.16 * values.shape[0] + 0.7))
    figure, axes = new_figure(width + 0.9, height + 0.25)
    axis = axes[0, 0]
    image = axis.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axis.set_facecolor("#E5E5E5")
    axis.grid(False)
    rows, columns = np.nonzero(uncertain & np.isfinite(values))
    axis.scatter(columns, rows, s=2, color="black")
    heads = len(table.columns.levels[1])  # pyright: ignore[reportAttributeAccessIssue]
    layers = values.shape[1] // heads
    step = max(1, layers // 12)
    axis.set_xticks(range(0, values.shape[1], heads * step), range(0, layers, step))
    step = max(1, len(table.index) // 30)
    axis.set_yticks(range(0, len(table.index), step), table.index[::step])
    axis.set(xlabel=f"layer of the receiving head ({heads} heads each)", ylabel="sender")
    figure.colorbar(image, ax=axis, label=value_label)
    add_title(figure, title)
    return figure
