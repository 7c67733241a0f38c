"""From a table of edges to a circuit: the edges with large effects that lead to the sink heads.

1. Keep the edges whose effect is large enough.
2. Join each sender to the component that owns the receiver of its edge.
3. Keep the components from which the sink heads can be reached. The others act on the metric only through edges that
   were left out.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from p0circuit.interventions.nodes import InterventionError

if TYPE_CHECKING:
    import networkx as nx
    import pandas as pd


def owner(receiver: str) -> str:
    """Name the component that an input belongs to.

    Args:
        receiver: name of an input. MLPs and residual streams are named like their inputs.

    Returns:
        `attn.2.1` for `attn.2.1.k`. A group of heads is a component (`attn.2` for `attn.2.k`), and so is a set of
        receivers (`sink` for `sink.k`).
    """
    return receiver[:-2] if receiver[-2:] in (".q", ".k", ".v") else receiver


def circuit_graph(edges: pd.DataFrame, ends: Collection[str], threshold: float) -> nx.DiGraph:
    """Make the graph of the components that reach some ends by edges with large effects.

    Args:
        edges: data frame with the columns sender, receiver and effect, as of `PathEffects.to_dataframe`.
        ends: components that the circuit leads to; they are always in the graph.
        threshold: smallest size of an effect.

    Returns:
        A directed graph. Each of its edges has the attributes `effect`, the sum over the inputs of the receiving
        component, and `inputs`, the effects by input.

    Raises:
        InterventionError: the threshold is not above 0, or the table has other columns.
    """
    import networkx as nx

    if not threshold > 0:
        raise InterventionError(f"a circuit needs a threshold above 0 to leave anything out, got {threshold}")
    if missing := {"sender", "receiver", "effect"} - set(edges.columns):
        raise InterventionError(f"the table of edges lacks {sorted(missing)}; expected PathEffects.to_dataframe()")
    graph = nx.DiGraph()
    graph.add_nodes_from(ends)
    for sender, receiver, effect in edges[["sender", "receiver", "effect"]].itertuples(index=False):
        if abs(effect) < threshold:
            continue
        end = owner(receiver)
        inputs = graph.get_edge_data(sender, end, {"inputs": {}})["inputs"] | {receiver: effect}
        graph.add_edge(sender, end, inputs=inputs, effect=sum(inputs.values()))
    reaching = set(ends).union(*(nx.ancestors(graph, end) for end in ends))
    return graph.subgraph(reaching).copy()
