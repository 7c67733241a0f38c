"""What all results of patching share: raw and relative effects, their intervals, a table and a figure.

The *effect* is the metric with a patch minus the metric without, for every sample, in units of the metric. The
*relative effect* is its share of the difference between the two runs of a pair: 1 means that the patch does as much as
all that differs between clean and shifted.
"""

from __future__ import annotations

import textwrap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from torch import Tensor

from p0circuit.interventions.nodes import InterventionError, Node
from p0circuit.stats import Interval, bootstrap, ratio_interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MOST_LINES = 24
"""Number of nodes or edges that a figure with one line for each shows; those with the largest effects."""

LABEL_LENGTH = 30
"""Number of characters of a metric's name in labels of figures; the rest is left out."""


class Effects(ABC):
    """Effects of several patches, each on every sample.

    Attributes:
        metric: name of the metric.
    """

    metric: str

    @property
    @abstractmethod
    def effect(self) -> Float[Tensor, "what *sample"]:
        """Change of the metric by each patch, in units of the metric."""

    @property
    @abstractmethod
    def total_effect(self) -> Float[Tensor, " *sample"] | None:
        """Difference of the metric between the other run and the patched one; None if it was not measured."""

    @property
    def relative_effect(self) -> Float[Tensor, "what *sample"]:
        """Effect as a share of the mean difference between the two runs: 1 is the whole difference.

        Raises:
            InterventionError: the other run was not measured, or the metric is the same in both.
        """
        return self.effect / self._total().mean(0)

    def interval(self, relative: bool = False) -> list[Interval]:
        """Compute the mean effect of each patch over samples, with its 95 % bootstrap interval.

        Args:
            relative: whether to give shares of the difference between the two runs; the interval then also covers the
                uncertainty of that difference.

        Returns:
            One interval for each line of `effect`, in the same order.

        Raises:
            InterventionError: as `relative_effect`, for shares.
        """
        effects, totals = self._samples(relative)
        if totals is None:
            return [bootstrap(effect) for effect in _numpy(effects)]
        pairs = zip(_numpy(effects), _numpy(totals.expand_as(effects)), strict=True)
        return [ratio_interval(effect, total) for effect, total in pairs]

    @abstractmethod
    def to_dataframe(self, relative: bool = False) -> pd.DataFrame:
        """Tabulate the effects, one line for each patch.

        Args:
            relative: whether to give relative effects.

        Returns:
            What was patched; and `effect`, `low`, `high` and `n`: the mean effect with its 95 % interval, and the
            number of samples.

        Raises:
            InterventionError: as `relative_effect`, for shares.
        """

    @abstractmethod
    def plot(self, relative: bool = False) -> Figure:
        """Draw the effects.

        Args:
            relative: whether to draw relative effects.

        Raises:
            InterventionError: as `relative_effect`, for shares.
        """

    def _samples(self, relative: bool) -> tuple[Tensor, Tensor | None]:
        """Effects [what, sample] of each line of the table, and for shares the differences that they are shares of."""
        return self.effect, self._total() if relative else None

    def _total(self) -> Tensor:
        total = self.total_effect
        if total is None:
            raise InterventionError(
                "effects can only be shares of the difference between two runs if the other run was measured; patch "
                "with a PromptPair, or read `effect`"
            )
        if bool((total.mean(0) == 0).any()):
            raise InterventionError(
                f"both runs have the same {self.metric}, so no effect can be a share of the difference; read `effect`"
            )
        return total

    def _add_intervals(self, table: pd.DataFrame, relative: bool) -> pd.DataFrame:
        intervals = self.interval(relative)
        columns = {"effect": [interval.value for interval in intervals]}
        columns |= {name: [getattr(interval, name) for interval in intervals] for name in ("low", "high", "n")}
        return table.assign(**columns)

    def value_label(self, relative: bool = False) -> str:
        """Say in a few words what the effects are, for an axis.

        Args:
            relative: whether for relative effects.
        """
        if relative:
            return "share of the difference between runs"
        return f"change of the {textwrap.shorten(self.metric, LABEL_LENGTH, placeholder=' …')}"


class NodeEffects(Effects):
    """Effects of patching nodes.

    Attributes:
        nodes: the patched node of each line of `effect`.
        offsets: position of each patch, in tokens after P0.
    """

    nodes: tuple[Node, ...]
    offsets: tuple[int | tuple[int, ...], ...]

    @property
    @abstractmethod
    def title(self) -> str:
        """Title of the figure."""

    @property
    @abstractmethod
    def position_name(self) -> str:
        """Name of the position at offset 0."""

    def to_dataframe(self, relative: bool = False) -> pd.DataFrame:
        """Tabulate the effects, one line for each patch, in the order of `nodes`.

        Args:
            relative: whether to give relative effects.

        Returns:
            Data frame with the columns node, component (kind of the node), layer, index (of a head or neuron), offset
            (position, in tokens after P0 or the shifted token), effect, low, high and n.

        Raises:
            InterventionError: as `relative_effect`, for shares.
        """
        return self._add_intervals(node_table(self.nodes).assign(offset=list(self.offsets)), relative)

    def maps(self, column: str = "effect", relative: bool = False) -> dict[str, pd.DataFrame]:
        """Arrange the table of one kind of node as maps of layers by components, heads or neurons.

        Args:
            column: column of `to_dataframe` that the maps contain.
            relative: whether to give relative effects.

        Returns:
            One map for each offset, by a title for it.

        Raises:
            InterventionError: as `relative_effect`, for shares.
        """
        table = self.to_dataframe(relative)
        without_index = table["index"].isna().all()
        by, label = ("component", "component") if without_index else ("index", self.nodes[0].kind)
        panels = {}
        for offset, part in table.groupby("offset", sort=False):
            panel = part.pivot(index="layer", columns=by, values=column)[part[by].unique()]
            panel.columns.name = label
            panels[f"at {self.position_name} + {offset}" if offset else f"at {self.position_name}"] = panel
        return panels

    def plot(self, relative: bool = False) -> Figure:
        """Draw maps of layers by heads or components; for neurons and mixed nodes, the strongest ones as lines.

        Args:
            relative: whether to draw relative effects.

        Returns:
            Maps, in which a dot marks effects whose 95 % interval contains 0; or lines with 95 % intervals.

        Raises:
            InterventionError: as `relative_effect`, for shares.
        """
        kinds = {node.kind for node in self.nodes}
        if kinds == {"head"} or not kinds & {"head", "neuron"}:
            from p0circuit.figures.maps import effect_maps

            low, high = self.maps("low", relative), self.maps("high", relative)
            n = self.effect.shape[1]
            return effect_maps(
                self.maps("effect", relative),
                f"{self.title}, n = {n} (dot: 95 % interval contains 0)",
                self.value_label(relative),
                limit=None,
                uncertain={name: (low[name] <= 0) & (high[name] >= 0) for name in low},
            )
        names = [
            f"{node} + {offset}" if offset else str(node) for node, offset in zip(self.nodes, self.offsets, strict=True)
        ]
        return line_figure(self, names, self.title, relative)


def node_table(nodes: Sequence[Node]) -> pd.DataFrame:
    """Tabulate nodes: name, component (kind), layer, and index of a head or neuron.

    Args:
        nodes: the nodes.
    """
    import pandas as pd

    rows = [(str(node), node.kind, node.layer, node.index) for node in nodes]
    return pd.DataFrame(rows, columns=["node", "component", "layer", "index"]).astype({"index": "Int64"})


def largest_first(table: pd.DataFrame, column: str = "effect") -> pd.DataFrame:
    """Sort a table by the size of a column, the largest first.

    Args:
        table: data frame with this column.
        column: the column.
    """
    return table.sort_values(column, key=lambda values: -values.abs(), kind="stable", ignore_index=True)


def line_figure(effects: Effects, names: Sequence[str], title: str, relative: bool = False) -> Figure:
    """Draw the patches with the largest mean effects: one line for each, with a dot and its 95 % interval.

    Args:
        effects: the effects.
        names: name of each patch.
        title: title of the figure; the number of samples is added.
        relative: whether to draw relative effects.
    """
    from p0circuit.figures.intervals import intervals

    size = abs(_numpy(effects.effect).mean(1))
    strongest = np.argsort(-size, kind="stable")[:MOST_LINES]
    every = effects.interval(relative)
    lines = {names[int(number)]: every[int(number)] for number in strongest}
    part = f"the {len(strongest)} largest of {len(names)}" if len(strongest) < len(names) else ""
    title = ", ".join(filter(None, [title, part, f"n = {effects.effect.shape[1]}, 95 % intervals"]))
    return intervals({"": lines}, title, [effects.value_label(relative)], reference=0.0)


def _numpy(values: Tensor) -> Float[np.ndarray, "..."]:
    return values.double().cpu().numpy()
