"""Figure of a circuit as a graph."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import networkx as nx
    from matplotlib.figure import Figure
from p0circuit.figures.style import BLUE, COLUMN, GREY, ORANGE, new_figure, styled


@styled
def draw_circuit(graph: nx.DiGraph, ends: Collection[str], title: str) -> Figure:
    """Draw a circuit of components, with the embedding at the bottom and the sink heads at the top.

    The width of an edge is the size of its effect. Patching a blue edge lowers the sink; patching an orange one raises
    it.

    Args:
        graph: nodes are names of components; edges have `effect` (change of the sink score) and `inputs` (node names).
        ends: names of the sink heads.
        title: title of the figure.
    """
    names = sorted(graph.nodes, key=_layout_key)
    rows: dict[tuple[int, int], list[str]] = {}
    for name in names:
        rows.setdefault(_layout_key(name)[:2], []).append(name)
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
        # An edge over more than one row is bent around the widest row between, to alternating sides. The middle of an
        # arc is rad * height / 2 away from the straight line.
        low, high = at[start][1], at[end][1]
        between = [len(row) for height, row in enumerate(rows.values()) if low < height < high]
        offset = ((max(between) - 1) / 2 + 0.75) * (-1) ** number if between else 0.0
        bend = 2 * offset / (high - low)
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
            (middle[0] + offset, middle[1]),
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


def _layout_key(name: str) -> tuple[int, int, int]:
    """Return the sort key of a component: layer, attention before MLP, index. A set of heads of many layers is last."""
    part, *numbers = name.split(".")
    if part == "embed":
        return -1, 0, 0
    if not numbers:
        return 10**6, 0, 0
    layer, index = int(numbers[0]), int(numbers[1].split("+")[0]) if len(numbers) > 1 else 0
    return layer, 0 if part == "attn" else 1, index
