"""Where the circuit is: layers from left to right, stages shaded."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from p0circuit.figures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, new_figure, styled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHADES = (BLUE, ORANGE, GREEN, PURPLE)


@styled
def depth_figure(
    depths: pd.DataFrame, curves: pd.DataFrame, stages: pd.DataFrame, roles: pd.DataFrame, model: str, n: int
) -> Figure:
    """Draw norm and direction of P0's stream, the heads that read it, and what is left of the sink, one above another.

    Args:
        depths: columns depth, norm_ratio, consistency, sink_heads_of_the_layer.
        curves: columns curve, block, heads, value, low, high.
        stages: columns stage, first_depth, last_depth.
        roles: columns stage, role, node.
        model: how the model is called.
        n: number of samples.
    """
    figure, axes = new_figure(6.8, 6.4, rows=4, columns=1, sharex=True)
    norm, direction, heads, left = axes[:, 0]
    norm.plot(depths["depth"], depths["norm_ratio"], color=BLUE, marker="o", markersize=3)
    norm.set_yscale("log")
    norm.set_ylabel("P0's norm over\nthe others' median")
    direction.plot(depths["depth"], depths["consistency"], color=PURPLE, marker="o", markersize=3)
    direction.set_ylabel("cosine to the\nmean direction")
    direction.set_ylim(0, 1.05)
    heads.bar(depths["depth"], depths["sink_heads_of_the_layer"].fillna(0), color=GREY)
    heads.set_ylabel("sink heads\nthat read it")
    labels = {
        "stream": ("P0's stream replaced here", RED, 1),
        "mixed_from": ("recognition only before this depth", GREEN, 0),
        "mixed_but_in": ("recognition in this block only", ORANGE, 0),
    }
    for name, (label, colour, offset) in labels.items():
        lines = curves[(curves["curve"] == name) & (curves["heads"] == "all")]
        left.plot(lines["block"] + offset, lines["value"], color=colour, marker="o", markersize=3, label=label)
        left.fill_between(lines["block"] + offset, lines["low"], lines["high"], color=colour, alpha=0.2, linewidth=0)
    left.axhline(1, color=GREY, linewidth=0.6)
    left.set_ylabel("share of the\nsink left")
    left.set_xlabel("depth of the residual stream (0: embedding, i: after block i - 1, read by the heads of layer i)")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.36), ncols=3, frameon=False)
    for shade, stage in zip(SHADES, stages.to_dict("records"), strict=False):
        for panel in axes[:, 0]:
            panel.axvspan(stage["first_depth"] - 0.5, stage["last_depth"] + 0.5, color=shade, alpha=0.08, linewidth=0)
        _name_stage(norm, stage, roles)
    norm.margins(y=0.3)
    figure.suptitle(f"{model}: where the sink is written, read and erased (n = {n}, bands: 95 % intervals)", fontsize=9)
    return figure


def _name_stage(axes: Axes, stage: dict[Hashable, Any], roles: pd.DataFrame) -> None:
    """Write a stage's number and its strongest writer at the top of its shade."""
    own = [role for role in roles.to_dict("records") if (role["stage"], role["role"]) == (stage["stage"], "writer")]
    name = f"stage {stage['stage']}"
    if own:
        name += f"\nwritten by {max(own, key=lambda role: role['effect'])['node']}"
    middle = (stage["first_depth"] + stage["last_depth"]) / 2
    axes.text(middle, 0.96, name, transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=7)
