"""Effects of edges, and the circuit that the edges with large effects make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from p0circuit.interventions.batched_runs import Through
from p0circuit.interventions.circuit import circuit_graph, owner
from p0circuit.interventions.effects import Effects, largest_first, line_figure

if TYPE_CHECKING:
    import networkx as nx
    import pandas as pd
    from matplotlib.figure import Figure

Edge = tuple[str, str]
"""Names of a sender and a receiver, such as ("mlp.0", "attn.2.1.k")."""
THRESHOLD = 0.05
"""Smallest relative effect of an edge of a circuit."""


@dataclass(frozen=True, eq=False)
class PathEffects(Effects):
    """The metric with single edges patched, and that of the clean run.

    Attributes:
        edges: the edges, in the order of the first axis of `patched`.
        clean: metric of the clean run.
        patched: metric with one edge patched.
        metric: name of the metric.
        through: what could carry the effect between sender and receiver.
        shifted: metric of the run that the values come from; None if it was not measured.
        ends: components that the metric is measured at, among those that own a receiver: where a circuit ends.
        closed_form: edges whose effect was computed by the closed form; the others were run.
    """

    edges: tuple[Edge, ...]
    clean: Float[Tensor, " sample"]
    patched: Float[Tensor, "edge sample"]
    metric: str
    through: Through
    shifted: Float[Tensor, " sample"] | None = None
    ends: tuple[str, ...] = ()
    closed_form: frozenset[Edge] = frozenset()

    @property
    def effect(self) -> Float[Tensor, "edge sample"]:
        """Change of the metric by each edge: negative if the edge carries what the metric measures."""
        return self.patched - self.clean

    @property
    def total_effect(self) -> Float[Tensor, " sample"] | None:
        """Metric of the shifted run minus that of the clean one; None if the shifted run was not measured."""
        return None if self.shifted is None else self.shifted - self.clean

    def to_dataframe(self, relative: bool = False) -> pd.DataFrame:
        """Tabulate the effects, one line for each edge, the largest first.

        Args:
            relative: whether to give relative effects.

        Returns:
            Data frame with the columns sender, receiver, effect, low, high and n.

        Raises:
            InterventionError: as `relative_effect`, for shares.
        """
        return largest_first(self._add_intervals(self._edge_table(), relative))

    def plot(self, relative: bool = False) -> Figure:
        """Draw the edges with the largest effects, with 95 % intervals.

        Args:
            relative: whether to draw relative effects.

        Raises:
            InterventionError: as `relative_effect`, for shares.
        """
        names = [f"{sender} → {receiver}" for sender, receiver in self.edges]
        return line_figure(self, names, "Path patching of single edges", relative)

    def circuit(
        self, threshold: float = THRESHOLD, relative: bool = True, ends: Sequence[str] | None = None
    ) -> CircuitGraph:
        """Keep the edges with large effects that lead to the components at which the metric is measured.

        Args:
            threshold: smallest size of the mean effect of an edge.
            relative: whether the threshold is a share of the difference between the two runs; otherwise it is in units
                of the metric.
            ends: components that the circuit leads to. If None, `self.ends`; or, if that is empty, the components that
                receive and do not send.

        Raises:
            InterventionError: the threshold is not above 0; or as `relative_effect`, for shares.

        Example:
            edges = p0circuit.path_patch(model, pair, metric, receivers=["attn.3.k", "mlp.2", "mlp.1"])
            edges.circuit(threshold=0.05).plot()
        """
        effect = self.relative_effect if relative else self.effect
        table = self._edge_table().assign(effect=effect.double().mean(1).cpu().numpy())
        ends = (self.ends or self._last_components()) if ends is None else tuple(ends)
        graph = circuit_graph(table, ends, threshold)
        numbers = [
            number
            for number, (sender, receiver) in enumerate(self.edges)
            if receiver in graph.get_edge_data(sender, owner(receiver), {"inputs": ()})["inputs"]
        ]
        edges = tuple(self.edges[number] for number in numbers)
        return CircuitGraph(
            edges=edges,
            clean=self.clean,
            patched=self.patched[numbers],
            metric=self.metric,
            through=self.through,
            shifted=self.shifted,
            ends=ends,
            closed_form=self.closed_form.intersection(edges),
            graph=graph,
            threshold=threshold,
            relative=relative,
        )

    def _edge_table(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(list(self.edges), columns=["sender", "receiver"])

    def _last_components(self) -> tuple[str, ...]:
        owners = dict.fromkeys(owner(receiver) for _, receiver in self.edges)
        sending = {sender for sender, _ in self.edges}
        return tuple(name for name in owners if name not in sending)


@dataclass(frozen=True, eq=False, kw_only=True)
class CircuitGraph(PathEffects):
    """The edges of a circuit with their effects, and the graph of components that they make.

    Attributes:
        graph: directed graph of components. Each of its edges has the attributes `effect`, the sum over the inputs of
            the receiving component, and `inputs`, the effects by input.
        threshold: smallest size of the mean effect of an edge.
        relative: whether threshold and graph are in shares of the difference between the two runs.
    """

    graph: nx.DiGraph
    threshold: float
    relative: bool

    def plot(self, relative: bool | None = None) -> Figure:
        """Draw the circuit as a graph, from the embedding at the bottom to the ends at the top.

        Args:
            relative: whether to draw relative effects. If None, as the threshold was given.

        Returns:
            A figure in which the number at an edge is the mean effect of patching it.

        Raises:
            InterventionError: as `relative_effect`, for shares.
        """
        from p0circuit.figures.circuit import draw_circuit

        relative = self.relative if relative is None else relative
        graph = self.graph
        if relative != self.relative:
            total = float(self._total().double().mean())
            graph = graph.copy()
            for _, _, data in graph.edges(data=True):
                data["effect"] *= 1 / total if relative else total
        least = f"{self.threshold:.0%} of the difference between runs" if self.relative else f"{self.threshold:.3g}"
        title = f"Circuit of edges with an effect of {least} or more, n = {len(self.clean)}"
        # An edge that carries the metric lowers it when it is patched, which is a positive share of what is lost.
        return draw_circuit(graph, self.ends, title, self.value_label(relative), 1 if relative else -1)
