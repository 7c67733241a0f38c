"""Figure of a circuit as a graph."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import networkx as nx
    from matplotlib.figure import Figure
from p0circuit.figures.style import BLUE, COLUMN, GREY, ORANGE, add_title, new_figure, styled


@styled
def draw_circuit(
    graph: nx.DiGraph,
    ends: Collection[str],
    title: str,
    value_label: str = "change of the sink heads' score when the edge is patched",
    sign_of_carriers: Literal[-1, 1] = -1,
) -> Figure:
    """Draw a circuit of components, the embedding at the bottom and the ends on top.

    Args:
        graph: directed graph whose edges have the attributes `effect` and `inputs`, as of `circuit_graph`.
        ends: components that the circuit leads to; they are filled.
        title: title of the figure.
        value_label: what the numbers at the edges are.
        sign_of_carriers: sign of the effect of an edge that carries the sink: -1 for changes of the score, 1 for shares
            of the difference between two runs. Such edges are blue, others orange. Widths are sizes of effects.
    """
    names = sorted(graph.nodes, key=_order)
    rows: dict[tuple[int, int], list[str]] = {}
    for name in names:
        rows.setdefault(_order(name)[:2], []).append(name)
    widest = max(map(len, rows.values()), default=1)
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
        # arc lies rad * height / 2 from the straight line.
        low, high = at[start][1], at[end][1]
        between = [len(row) for height, row in enumerate(rows.values()) if low < height < high]
        distance = ((max(between) - 1) / 2 + 0.75) * (-1) ** number if between else 0.0
        bend = 2 * distance / (high - low)
        axis.annotate(
            "",
            at[end],
            at[start],
            arrowprops={
                "arrowstyle": "-|>",
                "color": BLUE if data["effect"] * sign_of_carriers > 0 else ORANGE,
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
            (middle[0] + distance, middle[1]),
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
    note = f"numbers: {value_label}\nblue: the edge carries the sink"
    axis.text(0, -0.75, note, ha="center", va="center", fontsize=6.5, color=GREY)
    add_title(figure, title)
    return figure


def _order(name: str) -> tuple[int, int, int]:
    """Order in which components are drawn: layer, attention before MLP, index; a set of heads of many layers on top."""
    part, *numbers = name.split(".")
    if part == "embed":
        return -1, 0, 0
    if not numbers:
        return 10**6, 0, 0
    layer, index = int(numbers[0]), int(numbers[1].split("+")[0]) if len(numbers) > 1 else 0
    return layer, 0 if part == "attn" else 1, index
