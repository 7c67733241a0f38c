"""Edges from components at P0 into Q, K and V of the sink heads, and how much of their effect each input carries.

Two ways, by the size of the model:

- `patch_every_edge`: each edge into each sink head, exactly (`interventions.path_patching`).
- `search_strongest_edges`: the sink heads of a block are one receiver. All edges are estimated, and the strongest and a
  random sample are patched exactly (`interventions.edge_search`). The whole stream enters an input of all sink heads in
  one run (`whole_stream`), and so does that of the control position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from p0circuit.experiments.measures.joint_patches import WHOLE_STREAM, AssignedPairs, JointChanges, total_effects
from p0circuit.experiments.measures.whole_stream import WholeStreamChanges, measured_at_p0, whole_stream_changes
from p0circuit.experiments.sink_under_study import Heads
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.edge_effects import PathEffects
from p0circuit.interventions.edge_search import search_edges
from p0circuit.interventions.edge_search_result import EdgeSearch
from p0circuit.interventions.effects import largest_first
from p0circuit.interventions.metrics import sink_score_of
from p0circuit.interventions.nodes import Node, components
from p0circuit.interventions.pairs import PromptPair, values_at
from p0circuit.interventions.path_patching import patch_edges
from p0circuit.prompts import PromptSet
from p0circuit.sink import CIRCUIT_BLOCKS
from p0circuit.stats import Interval, bootstrap, ratio_interval

if TYPE_CHECKING:
    import pandas as pd

_MLPS = [f"mlp.{layer}" for layer in CIRCUIT_BLOCKS]
_LEAST_EFFECT = 1e-6
"""Least threshold of the search, in units of the sink score."""


@dataclass(frozen=True, eq=False)
class SinkHeadEdges:
    """What edges into the sink heads carry.

    Attributes:
        shares: by input (`k`, `q`, `v`), its share of the summed sizes of all effects; None if there is no effect.
        whole_stream: by input, the effect of the whole stream through it as a share of the total effect.
        control_ratio: summed sizes of the effects from a random position over those from P0.
        table: all edges from P0, with their effects.
        control_table: the same from the random position.
        samples: number of samples.
        notes: how the edges were measured, for the notes of a result.
    """

    shares: dict[str, Interval] | None
    whole_stream: dict[str, Interval]
    control_ratio: Interval
    table: pd.DataFrame
    control_table: pd.DataFrame
    samples: int
    notes: tuple[str, ...] = ()


def patch_every_edge(
    model: HookedModel,
    pairs: Sequence[PromptPair],
    heads: Heads,
    changes: Sequence[JointChanges],
    control_offsets: Int[Tensor, " sample"],
    most_runs: int,
) -> SinkHeadEdges:
    """Patch each edge from each component at P0 to each input of each sink head, all other paths cut.

    Args:
        model: the model.
        pairs: one pair for each shift, all with the same clean prompts.
        heads: the sink heads, as (layer, head).
        changes: the joint changes at each shift, for the total effect.
        control_offsets: for each sample, the random position of the control, counted from P0.
        most_runs: bound on edges times samples.
    """
    names = [f"attn.{layer}.{head}" for layer, head in heads]
    inputs = [f"{name}.{part}" for name in names for part in "qkv"]
    senders, streams = _senders(model, heads), _streams(heads)
    most = max(len(pairs), most_runs // (2 * len(senders) * len(inputs)))
    nodes = [*senders, *streams.values()]
    runs = _shifted_runs(model, AssignedPairs.of(pairs, most), control_offsets, nodes, nodes)
    metric = sink_score_of(heads)
    effects = patch_edges(model, runs.clean, senders, [*_MLPS, *inputs], runs.values, metric)
    control_effects = patch_edges(
        model, runs.clean, senders, inputs, runs.control_values, measured_at_p0(metric), runs.control_position
    )
    in_total = _whole_stream_by_head(model, heads, streams, runs)
    total = total_effects(changes, runs.samples)
    return SinkHeadEdges(
        shares=input_shares(effects, names),
        whole_stream={part: ratio_interval(change, total) for part, change in in_total.items()},
        control_ratio=_ratio(_summed_sizes(control_effects, names), _summed_sizes(effects, names)),
        table=effects.to_dataframe(),
        control_table=control_effects.to_dataframe(),
        samples=runs.clean.n,
    )


def search_strongest_edges(
    model: HookedModel,
    pairs: Sequence[PromptPair],
    heads: Heads,
    changes: Sequence[JointChanges],
    control_offsets: Int[Tensor, " sample"],
    most_samples: int,
    row_runs: float,
) -> SinkHeadEdges:
    """Estimate all edges into the sink heads of each block, and patch the strongest and a random sample exactly.

    Args:
        model: the model.
        pairs: one pair for each shift, all with the same clean prompts.
        heads: the sink heads, as (layer, head).
        changes: the joint changes at each shift, for the total effect.
        control_offsets: for each sample, the random position of the control, counted from P0.
        most_samples: number of samples at most.
        row_runs: bound on the exact patches, in rows through all blocks.

    Raises:
        NotOfTheClosedForm: the model's attention has no closed form, so nothing can be estimated.
    """
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    groups = sorted(f"attn.{layer}.{'+'.join(map(str, sorted(numbers)))}" for layer, numbers in by_layer.items())
    inputs = {part: [f"{name}.{part}" for name in groups] for part in "kqv"}
    senders, streams = _senders(model, heads), _streams(heads)
    assigned = AssignedPairs.of(pairs, max(len(pairs), most_samples))
    runs = _shifted_runs(model, assigned, control_offsets, [*senders, *streams.values()], [*streams.values()])
    total = total_effects(changes, runs.samples)
    search = search_edges(
        model,
        runs.clean,
        senders,
        [*_MLPS, *inputs["k"], *inputs["q"], *inputs["v"]],
        runs.values,
        heads,
        # A hundredth: shares are of summed sizes, in which many small edges count.
        max(abs(float(total.mean())) / 100, _LEAST_EFFECT),
        budget=row_runs / runs.clean.n,
        seed=runs.clean.seed,
    )
    sizes = {part: search.sizes(inputs[part]) for part in "kqv"}
    summed = np.sum(list(sizes.values()), axis=0)
    stream = whole_stream_changes(model, runs.clean, heads, runs.values, runs.control_values, runs.control_position)
    in_total = {
        "k": stream.at_p0["k"],
        "q": stream.at_control["q"] * runs.later_queries,
        "v": stream.at_p0["v"],
    }
    return SinkHeadEdges(
        shares={part: ratio_interval(size, summed) for part, size in sizes.items()} if summed.any() else None,
        whole_stream={part: ratio_interval(change, total) for part, change in in_total.items()},
        control_ratio=_ratio(
            np.sum([abs(change) for change in stream.at_control.values()], axis=0),
            np.sum([abs(change) for change in stream.at_p0.values()], axis=0),
        ),
        table=_search_table(search),
        control_table=_control_table(stream),
        samples=runs.clean.n,
        notes=("the sink heads of a block are one receiver of edges", *search.summary()),
    )


def input_shares(effects: PathEffects, heads: Sequence[str]) -> dict[str, Interval] | None:
    """Return the shares of Q, K and V in the summed sizes of the effects of all edges into heads.

    Args:
        effects: effects of edges, into these heads and into other receivers.
        heads: names of heads, such as `attn.2.1`.

    Returns:
        Shares by input (`q`, `k`, `v`); None if no edge has an effect.
    """
    sizes = {part: torch.zeros_like(effects.clean) for part in "qkv"}
    for (_, receiver), effect in zip(effects.edges, effects.effect, strict=True):
        name, _, part = receiver.rpartition(".")
        if name in heads:
            sizes[part] = sizes[part] + effect.abs()
    total = sum(sizes.values(), torch.zeros_like(effects.clean))
    if not bool((total > 0).any()):
        return None
    summed = total.double().cpu().numpy()
    return {part: ratio_interval(size.double().cpu().numpy(), summed) for part, size in sizes.items()}


@dataclass(frozen=True, eq=False)
class _ShiftedRuns:
    """Clean prompts, and what the shifted runs compute at the tokens that are patched.

    Attributes:
        clean: the clean prompts.
        samples: their indices among all clean prompts.
        control_position: the random position of each row.
        values: values at the token of P0, by node.
        control_values: values at the token of the control position, by node.
    """

    clean: PromptSet
    samples: Int[Tensor, " row"]
    control_position: Int[Tensor, " row"]
    values: dict[Node, Tensor]
    control_values: dict[Node, Tensor]

    @property
    def later_queries(self) -> Float[np.ndarray, " row"]:
        """How many queries come after P0."""
        return (self.clean.length - 1 - self.clean.p0).double().numpy()


def _shifted_runs(
    model: HookedModel,
    assigned: AssignedPairs,
    control_offsets: Int[Tensor, " sample"],
    nodes: Sequence[Node],
    control_nodes: Sequence[Node],
) -> _ShiftedRuns:
    """Read the values of nodes in the shifted runs, each sample at the shift it is assigned to."""

    def values(offsets: Int[Tensor, " sample"], read_nodes: Sequence[Node]) -> dict[Node, Tensor]:
        parts = [
            values_at(model, pair.shifted, read_nodes, pair.position + offsets[rows])
            for pair, rows in zip(assigned.pairs, assigned.samples, strict=True)
        ]
        return {node: torch.cat([part[node] for part in parts]) for node in parts[0]}

    clean = assigned.clean
    return _ShiftedRuns(
        clean,
        assigned.order,
        clean.p0 + control_offsets[assigned.order],
        values(torch.zeros_like(control_offsets), nodes),
        values(control_offsets, control_nodes),
    )


def _senders(model: HookedModel, heads: Heads) -> list[Node]:
    """The components below the last sink heads; what the block of those writes, none of them reads."""
    last = max(layer for layer, _ in heads)
    return components(model, range(max(last, CIRCUIT_BLOCKS[-1] + 1)))


def _streams(heads: Heads) -> dict[int, Node]:
    """The stream before the block of every sink head, by layer."""
    return {layer: Node("resid_pre", layer) for layer in sorted({layer for layer, _ in heads})}


def _whole_stream_by_head(
    model: HookedModel, heads: Heads, streams: dict[int, Node], runs: _ShiftedRuns
) -> dict[str, Float[np.ndarray, " row"]]:
    """The effect of the whole stream through each input, summed over the sink heads, which are patched one by one.

    K and V at P0; Q of all later queries is estimated from one random query of each row, times their number.
    """
    metric = sink_score_of(heads)
    changes = {part: np.zeros(runs.clean.n) for part in "kqv"}
    for layer, stream in streams.items():
        names = [f"attn.{layer}.{head}" for at, head in heads if at == layer]
        at_p0 = patch_edges(
            model, runs.clean, [stream], [f"{name}.{part}" for name in names for part in "kv"], runs.values, metric
        )
        for (_, receiver), effect in zip(at_p0.edges, at_p0.effect, strict=True):
            changes[receiver[-1]] += effect.double().cpu().numpy()
        at_control = patch_edges(
            model,
            runs.clean,
            [stream],
            [f"{name}.q" for name in names],
            runs.control_values,
            measured_at_p0(metric),
            runs.control_position,
        )
        changes["q"] += at_control.effect.sum(0).double().cpu().numpy() * runs.later_queries
    return changes


def _summed_sizes(effects: PathEffects, heads: Sequence[str]) -> Float[np.ndarray, " sample"]:
    """The summed sizes of the effects of all edges into these heads."""
    into = [receiver.rpartition(".")[0] in heads for _, receiver in effects.edges]
    return effects.effect[torch.tensor(into)].abs().sum(0).double().cpu().numpy()


def _ratio(numerator: Float[np.ndarray, " sample"], denominator: Float[np.ndarray, " sample"]) -> Interval:
    return ratio_interval(numerator, denominator) if denominator.any() else Interval(0.0, 0.0, 0.0, len(denominator))


def _search_table(search: EdgeSearch) -> pd.DataFrame:
    """All edges of a search: the exact effect where there is one, else the estimate; `exact` says which."""
    import pandas as pd

    table = search.exact.to_dataframe().assign(exact=True)
    exact = {*search.exact.edges}
    assert search.by_row is not None
    numbers = [number for number, edge in enumerate(search.edges) if edge not in exact]
    if not numbers:
        return table
    edges, estimates = tuple(search.edges[number] for number in numbers), search.by_row[numbers]
    estimated = PathEffects(edges, search.exact.clean, search.exact.clean + estimates, search.exact.metric, "direct")
    both = pd.concat([table, estimated.to_dataframe().assign(exact=False)])
    return largest_first(both)


def _control_table(stream: WholeStreamChanges) -> pd.DataFrame:
    """The effect of the random position's whole stream on each input of all sink heads."""
    import pandas as pd

    rows = []
    for part, change in stream.at_control.items():
        mean = bootstrap(change)
        rows.append((WHOLE_STREAM, f"sink.{part}", mean.value, mean.low, mean.high, mean.n))
    return pd.DataFrame(rows, columns=["sender", "receiver", "effect", "low", "high", "n"])
