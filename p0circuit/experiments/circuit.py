"""The P0 circuit as a graph, recovered by path patching between the clean and the shifted run.

1. Choose the sink heads on one half of the samples; everything else is measured on the other half.
2. Pair the prompts with themselves behind a random prefix; what each component computes at the same token, when that
   token is not first, is its new value at P0.
3. Patch every edge between components at P0, Q, K, V and MLP inputs alike, and measure the sink heads' score.
4. Keep the edges that change it by a fixed share, and of those what leads to the sink heads.
Paper: the P0 sink circuit; method after Wang et al. 2022 (arXiv 2211.00593).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from p0circuit.activations import SINK_SCORE
from p0circuit.experiments.base import Experiment, NotApplicable
from p0circuit.experiments.conditions import drawable
from p0circuit.experiments.edges import input_shares
from p0circuit.experiments.heads import FALLBACK_HEADS, sink_heads
from p0circuit.intervals import bootstrap
from p0circuit.interventions.circuit import circuit_graph
from p0circuit.interventions.closed_form import KeyEdges
from p0circuit.interventions.contrast import contrast, replacements
from p0circuit.interventions.metrics import sink_score_of
from p0circuit.interventions.nodes import components
from p0circuit.interventions.path_patching import edges_into_keys, path_patch, receivers_of
from p0circuit.models import describe
from p0circuit.prompts import PromptSet
from p0circuit.results import Result
from p0circuit.sink import SINK_THRESHOLD

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class CircuitConfig:
    """`shift`: tokens of the prefix; `samples`: prompts to patch; `share` of the sink score from which an edge counts.

    `fallback_heads` stand in where no head is above `eps`; with more than `most_edges` the experiment declines.
    """

    shift: int = 8
    samples: int = 16
    share: float = 0.05
    eps: float = SINK_THRESHOLD
    fallback_heads: int = FALLBACK_HEADS
    most_edges: int = 20_000


class Circuit(Experiment):
    """Path patching between all components at P0: the edge table, the pruned circuit and its drawing."""

    id = "circuit"
    title = "The P0 circuit"

    def __init__(self, config: CircuitConfig = CircuitConfig()) -> None:
        super().__init__(config)

    def measure(self, model: Any, prompts: PromptSet) -> Result:
        from p0circuit.report.figures import draw_circuit

        info, config = describe(model), self.config
        first, second = prompts.split()
        scores = self.record(model, first, [SINK_SCORE], "first half")[SINK_SCORE]
        heads, above = sink_heads(scores, config.eps, config.fallback_heads)
        names = [f"attn.{layer}.{head}" for layer, head in heads]
        chosen = second.subset(slice(0, config.samples))
        layers = range(max(layer for layer, _ in heads) + 1)
        senders, receivers = components(model, layers, heads=True), receivers_of(model, layers)
        if (edges := len(senders) * len(receivers) // 2) > config.most_edges:
            raise NotApplicable(
                f"{info.title} has about {edges} edges up to layer {layers[-1]}, more than {config.most_edges}; "
                "raise most_edges, or patch chosen senders and receivers with interventions.path_patching"
            )
        vocabulary, special = drawable(model)
        pair = contrast(chosen, config.shift, vocabulary, prompts.seed, tuple(special))
        values = replacements(model, pair, senders)
        effects = path_patch(model, chosen, senders, receivers, values, sink_score_of(heads))
        keys = edges_into_keys(model, chosen, senders, values)

        table = effects.to_dataframe()
        clean = bootstrap(effects.clean.double().cpu().numpy())
        graph = circuit_graph(table, names, config.share * clean.value)
        found = [
            (sender, receiver, effect)
            for sender, _, inputs in graph.edges(data="inputs")
            for receiver, effect in inputs.items()
        ]
        notes = [
            f"sink heads: {', '.join(names)}" + ("" if above else " (the highest; none is above the threshold)"),
            f"edges into K at P0 by {keys.method}; largest error on the clean run {keys.error:.1e}",
            f"{len(found)} of {len(table)} edges lead to the sink heads and change their score of {clean.value:.3f} by "
            f"{config.share:.0%} or more:",
            *(f"{s} -> {r}: {effect:+.3f}" for s, r, effect in sorted(found, key=lambda edge: -abs(edge[2]))),
        ]
        metrics = {"sink_score": clean}
        if (shares := input_shares(effects, names)) is not None:
            metrics["share_of_k_among_edges_into_sink_heads"] = shares["k"]
        tables = {"edges": table, "into_keys": _key_table(keys, heads)}
        title = f"The circuit of the P0 sink in {info.title}"
        return Result(self.id, self.title, metrics, tables, {"graph": draw_circuit(graph, names, title)}, notes=notes)


def _key_table(keys: KeyEdges, heads: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """The effect of each sender on each sink head's own score, through its key of P0 alone."""
    import pandas as pd

    rows = []
    for sender, effect in zip(keys.senders, keys.effect, strict=True):
        for layer, head in heads:
            if sender.depth < (layer, 1):
                interval = bootstrap(effect[:, layer, head].double().cpu().numpy())
                rows.append((str(sender), f"attn.{layer}.{head}.k", *interval.to_json().values()))
    return pd.DataFrame(rows, columns=["sender", "receiver", "effect", "low", "high", "n"])
