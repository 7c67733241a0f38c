"""The P0 circuit as a graph, recovered by path patching between the clean and the shifted run.

1. Choose the sink heads on one half of the samples; everything else is measured on the other half.
2. Pair the prompts with themselves behind a random prefix; what each component computes at the same token, when that
   token is not first, is its new value at P0.
3. Patch every edge between components at P0 (Q, K, V and MLP inputs), and measure the sink heads' score. If there are
   more than `most_edges`, search for the edges that change it by a fixed share (`interventions.edge_search`): the heads
   of a block are one receiver, K (and V) of all sink heads together another, `sink.k`; single heads are receivers only
   if their group has that share.
4. Keep the edges that change the score by a fixed share, and of those the edges that lead to the sink heads.
Paper: the P0 sink circuit; method after Wang et al. 2022 (arXiv 2211.00593).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from p0circuit.experiments.base import Experiment, NotApplicable
from p0circuit.experiments.measures.sink_head_edges import input_shares
from p0circuit.experiments.sink_under_study import head_list, sink_scores
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.batched_runs import TOKENS_AT_ONCE
from p0circuit.interventions.circuit import circuit_graph, owner
from p0circuit.interventions.closed_form import KeyEdges, NotOfTheClosedForm
from p0circuit.interventions.edge_search import expected_passes, search_edges
from p0circuit.interventions.metrics import sink_score_of
from p0circuit.interventions.nodes import components
from p0circuit.interventions.own_scores import edges_into_keys
from p0circuit.interventions.pairs import PromptPair, patch_values, shifted_pair
from p0circuit.interventions.path_patching import patch_edges
from p0circuit.interventions.receivers import receivers_of
from p0circuit.models import ModelInfo, describe
from p0circuit.prompts import PromptSet
from p0circuit.recording.quantities import SINK_SCORE
from p0circuit.recording.record import record
from p0circuit.results import Result
from p0circuit.sink import FALLBACK_HEADS, SINK_THRESHOLD, any_sink_head, sink_heads
from p0circuit.stats import Interval, bootstrap

if TYPE_CHECKING:
    import networkx as nx
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class CircuitConfig:
    """Settings of `Circuit`.

    Attributes:
        shift: tokens of the random prefix.
        samples: maximum number of prompts to patch.
        share: minimum effect of an edge of the circuit, as a share of the sink score.
        eps: minimum mean sink score of a sink head.
        fallback_heads: number of heads with the highest scores that are used if none is above `eps`.
        most_edges: maximum number of edges that are all patched; more are searched.
        screening_rows: maximum number of prompts for the first estimates of a search.
        sample: minimum number of random edges that a search patches exactly.
        budget: maximum cost of a search's exact runs, in passes over the prompts that are patched.
    """

    shift: int = 8
    samples: int = 16
    share: float = 0.05
    eps: float = SINK_THRESHOLD
    fallback_heads: int = FALLBACK_HEADS
    most_edges: int = 2_000
    screening_rows: int = 4
    sample: int = 3
    budget: float = 15.0


class Circuit(Experiment[CircuitConfig]):
    """Path patching between all components at P0: the table of edges and the pruned circuit."""

    id = "circuit"
    title = "The P0 circuit"
    config_type = CircuitConfig

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Patch all edges into the sink heads, or search those of a large model."""
        info, config = describe(model), self.config
        first, second = prompts.split()
        scores = record(model, first, [SINK_SCORE], condition="first half")[SINK_SCORE]
        heads = sink_heads(scores, config.eps, config.fallback_heads)
        above = any_sink_head(scores, config.eps)
        names = [f"attn.{layer}.{head}" for layer, head in heads]
        patched = second.subset(slice(0, config.samples))
        layers = range(max(layer for layer, _ in heads) + 1)
        pair = shifted_pair(model, patched, config.shift, prompts.seed)
        which = f"sink heads: {head_list(heads)}" + ("" if above else " (the highest; none is above the threshold)")
        study = _Study(model, pair, heads, names, layers, which)
        edges = _edges_up_to(info, layers[-1])
        return self._search(study, edges) if edges > config.most_edges else self._patch_all(study)

    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        """Declare the patching of all edges, or the search."""
        info, n, length = describe(model), prompts.n, prompts.length
        config, rows = self.config, min(self.config.samples, n - n // 2)
        recording = rows * (1 + config.shift / length)
        if _edges_up_to(info, info.n_layers - 1) > config.most_edges:
            screening = min(rows, config.screening_rows)
            return (recording + expected_passes(info, length, rows, screening, config.budget, heads=True)) / n
        senders, heads = 1 + info.n_layers * (info.n_heads + 1), info.n_heads
        per_batch = max(1, TOKENS_AT_ONCE // (rows * length))
        variants = senders + -(-senders // per_batch)
        total = 2.0
        for layer in range(info.n_layers):
            before = 1 + layer * (heads + 1)
            # Edges into Q have no effect and are not run.
            edges = 2 * heads * before + before + heads
            # The clean run up to the layer; what its receivers read from every sender; the edges themselves.
            total += layer / info.n_layers + variants * (layer + 1) / info.n_layers
            total += edges * (info.n_layers - layer) / info.n_layers
        return (recording + rows * (total + (senders + 1) / length)) / n

    def _patch_all(self, study: _Study) -> Result:
        """Step 3 for small models: every edge, exactly."""
        model, patched, heads, names = study.model, study.pair.clean, study.heads, study.names
        senders, receivers = components(model, study.layers, heads=True), receivers_of(model, study.layers)
        values = patch_values(model, study.pair, senders)
        effects = patch_edges(model, patched, senders, receivers, values, sink_score_of(heads))
        keys = edges_into_keys(model, patched, senders, values)

        table = effects.to_dataframe()
        clean = bootstrap(effects.clean.double().cpu().numpy())
        graph = effects.circuit(self.config.share * clean.value, relative=False, ends=names).graph
        metrics = {"sink_score": clean}
        if (shares := input_shares(effects, names)) is not None:
            metrics["share_of_k_among_edges_into_sink_heads"] = shares["k"]
        tables = {"edges": table, "into_keys": _key_table(keys, heads)}
        notes = [f"edges into K at P0 by {keys.method}; largest error on the clean run {keys.error:.1e}"]
        return self._result(study, graph, names, clean, len(table), metrics, tables, notes)

    def _search(self, study: _Study, edges: int) -> Result:
        """Step 3 for large models: the edges that have the share, coarse to fine."""
        model, patched, heads, config = study.model, study.pair.clean, study.heads, self.config
        senders, last = components(model, study.layers, heads=True), study.layers[-1]
        # No sink head reads the MLP of the last sink heads' block.
        receivers = [f"mlp.{layer}" for layer in range(last)]
        receivers += [f"attn.{layer}.{part}" for layer in study.layers for part in "kv"]
        sets = {f"sink.{part}": [f"{name}.{part}" for name in study.names] for part in "kv"}
        values = patch_values(model, study.pair, senders)
        clean = bootstrap(sink_scores(model, patched, heads))
        threshold = config.share * clean.value
        try:
            search = search_edges(
                model,
                patched,
                senders,
                receivers,
                values,
                heads,
                threshold,
                sets,
                screening_rows=config.screening_rows,
                members=True,
                sample=config.sample,
                budget=config.budget,
                seed=study.pair.clean.seed,
            )
        except NotOfTheClosedForm as reason:
            raise NotApplicable(f"about {edges} edges are too many to patch one by one, and {reason}") from None
        table = search.to_dataframe()
        # Edges end in the set of sink heads, in single sink heads, or in groups that contain some of them.
        groups = {f"attn.{layer}" for layer, _ in heads}
        read = {owner(receiver) for receiver in table["receiver"]}
        ends = ["sink", *sorted((groups | {*study.names}) & read)]
        graph = circuit_graph(table, ends, threshold)
        graph.remove_nodes_from([end for end in ends if end != "sink" and not graph.degree(end)])
        ends = [end for end in ends if end in graph]
        notes = [
            f"about {edges} edges are more than {config.most_edges}: they were searched, coarse to fine, with first "
            f"estimates from {min(config.screening_rows, patched.n)} prompts and exact effects from {patched.n}",
            *search.summary(),
            f"{len(search.strong_edges)} of those patched exactly change the score by {config.share:.0%} of it or more",
        ]
        estimates = search.estimates_table(config.share / 10 * clean.value)
        tables = {"edges": table, "estimates": estimates}
        count = len(search.edges) + search.without_effect
        return self._result(study, graph, ends, clean, count, {"sink_score": clean}, tables, notes)

    def _result(
        self,
        study: _Study,
        graph: nx.DiGraph,
        ends: Sequence[str],
        clean: Interval,
        count: int,
        metrics: dict[str, Interval],
        tables: dict[str, pd.DataFrame],
        notes: Sequence[str],
    ) -> Result:
        """Step 4: the notes name every edge of the circuit, and the table `ends` the nodes that it leads to."""
        import pandas as pd

        edges = [
            (sender, receiver, effect)
            for sender, _, inputs in graph.edges(data="inputs")
            for receiver, effect in inputs.items()
        ]
        notes = [
            study.which,
            *notes,
            f"{len(edges)} of {count} edges lead to the sink heads and change their score of {clean.value:.3f} by "
            f"{self.config.share:.0%} or more:",
            *(f"{s} -> {r}: {effect:+.3f}" for s, r, effect in sorted(edges, key=lambda edge: -abs(edge[2]))),
        ]
        tables = {**tables, "ends": pd.DataFrame({"node": list(ends)})}
        return Result(self.id, self.title, metrics, tables, notes=notes)

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw the circuit: the edges above the threshold that lead to the sink heads."""
        from p0circuit.figures.circuit import draw_circuit

        threshold = result.provenance["config"]["share"] * result.metrics["sink_score"].value
        ends = result.tables["ends"]["node"].tolist()
        graph = circuit_graph(result.tables["edges"], ends, threshold)
        return {"graph": draw_circuit(graph, ends, f"The circuit of the P0 sink in {result.model_title}")}


@dataclass(frozen=True)
class _Study:
    """The model, the clean and shifted prompts, the sink heads, and the layers whose edges can reach them."""

    model: HookedModel
    pair: PromptPair
    heads: Sequence[tuple[int, int]]
    names: list[str]
    layers: range
    which: str


def _edges_up_to(info: ModelInfo, layer: int) -> int:
    """About how many edges there are between single heads, MLPs and their inputs up to a layer."""
    senders = 1 + (layer + 1) * (info.n_heads + 1)
    return senders * (layer + 1) * (3 * info.n_heads + 1) // 2


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
