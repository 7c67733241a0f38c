"""From a table of edges to a circuit: what is left when only edges that matter are kept, and what leads to the sink.

1. Keep the edges whose effect is large enough.
2. A sender is joined to the receiver its edge ends in, and every input of a component to the component itself.
3. Keep what the sink heads can be reached from; the rest acts on the metric through nothing that was kept.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from p0circuit.interventions.nodes import InterventionError

if TYPE_CHECKING:
    import networkx as nx
    import pandas as pd


def owner(receiver: str) -> str:
    """The component an input belongs to: `attn.2.1` for `attn.2.1.k`; MLPs and streams are named like their inputs.

    A group of heads is a component (`attn.2` for `attn.2.k`), and so is a set (`sink` for `sink.k`).
    """
    return receiver[:-2] if receiver[-2:] in (".q", ".k", ".v") else receiver


def circuit_graph(edges: pd.DataFrame, ends: Collection[str], threshold: float) -> nx.DiGraph:
    """The circuit as a graph of components: which senders, through which inputs, reach the components in `ends`.

    `edges` has the columns of `PathEffects.to_dataframe`. Graph edges carry `effect` (the sum where two components
    are joined by several inputs) and `inputs`, the inputs themselves with their effects.

    Raises:
        InterventionError: the threshold is not positive, or the table has other columns.
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
    kept = set(ends).union(*(nx.ancestors(graph, end) for end in ends))
    return graph.subgraph(kept).copy()
