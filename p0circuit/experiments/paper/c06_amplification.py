"""C6: MLPs 0 and 1 write the P0 direction, with a few of their neurons (paper, section on amplification).

1. Choose the sink heads, the P0 direction and the neurons on one half of the samples; measure on the other half.
2. Measure what each component before the sink heads writes along the P0 direction, as a share of the stream's
   projection on it.
3. Rank the neurons of MLPs 0 and 1 by their effect on that projection, directly or through later MLPs: integrated
   gradients, from their values at P0 to their values at the same token when it is not first.
4. Put these values into the top 1 % of the neurons, at P0, and measure how much of the excess score is lost; likewise
   for many random 1 %, and for single neurons.
5. In a mixture of experts, ablate experts instead of neurons: which experts P0 is routed to, what each writes, and how
   much of the excess score is lost without it.

Decided before measuring:

- *The P0 direction* is the mean direction of P0's stream where the first layer with a sink head reads it, at the
  earliest after block 1. *The final projection* is the stream's own, there. What later blocks add counts against the
  claim.
- *Ablated* means: at P0, the neuron has its value at the same token after 8 random ones. Nothing else of the run is
  changed, and everything computed later may respond.
- *1 %* is rounded down, with one neuron at the least. Neurons are ranked by how much of the projection is lost without
  them. For a *random 1 %*, all neurons of both blocks, the top 1 % included, are split into random groups of that size;
  each group is measured on a few random samples. The interval is over groups.
- P0 attends to itself alone, so its own stream is computed from rows of two tokens.

Source: first-detector and sink neurons, Yona et al. 2025 (arXiv 2503.08908); super experts, Su et al. (2507.23279).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from p0circuit.experiments.base import Experiment, NotApplicable, is_large, second_half
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.sink_under_study import StudiedSink, studied_sink
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.ablation import ablate
from p0circuit.interventions.attribution import attribute, patch_values_at_p0
from p0circuit.interventions.experts import experts_at_p0
from p0circuit.interventions.intervention import p0_direction
from p0circuit.interventions.metrics import Metric, Reading, Rows
from p0circuit.interventions.nodes import Node, components
from p0circuit.interventions.pairs import PromptPair, patch_values, shifted_pair, values_at
from p0circuit.models import ModelError, ModelInfo, describe
from p0circuit.models.hooks import hook_point
from p0circuit.models.passes import WITH_GRADIENT
from p0circuit.prompts import PromptSet
from p0circuit.results import Result
from p0circuit.sink import CIRCUIT_BLOCKS, CONTROL
from p0circuit.stats import Interval, bootstrap, ratio_interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class AmplificationConfig:
    """Settings of `Amplification`.

    Attributes:
        shift: number of tokens in the prefix after which a token is not first.
        steps: steps of integrated gradients.
        share: share of the neurons that is ablated.
        draws: maximum number of random groups of as many neurons.
        draw_samples: number of samples on which each random group is measured.
        choosing: maximum number of samples on which neurons are ranked.
        singles: number of top neurons that are ablated one by one.
        single_samples: number of samples on which single neurons, groups by size and experts are ablated.
        blocks: where the circuit is: the first two blocks, as the paper says, or those that `depth` finds.
    """

    shift: int = 8
    steps: int = 8
    share: float = 0.01
    draws: int = 128
    draw_samples: int = 8
    choosing: int = 128
    singles: int = 8
    single_samples: int = 64
    blocks: tuple[int, ...] = CIRCUIT_BLOCKS


def share_of_mlps(blocks: Sequence[int]) -> str:
    """Name the metric that is the share of these blocks' MLPs in the projection."""
    return f"share_of_mlps_{'_and_'.join(map(str, blocks))}"


class Amplification(Experiment[AmplificationConfig]):
    """The components, neurons and experts that write the P0 direction, ablated and compared with random ones."""

    id = "amplification"
    title = "Who writes the P0 direction"
    config_type = AmplificationConfig
    claim = Claim(
        id="C6",
        title="Amplification",
        source="Peng et al., arXiv 2603.06591, section on amplification; Yona et al., arXiv 2503.08908",
        statement="The MLPs of blocks 0 and 1 write the P0 direction, and a few of their neurons carry the sink.",
        measure="The share of MLPs 0 and 1 in the projection of P0's stream on the P0 direction, where sink heads read "
        "it; the share of the excess score that goes when the 1 % of their neurons that write most of it get, at P0, "
        "the values they have where the token is not first.",
        criteria=(
            Criterion(share_of_mlps(CIRCUIT_BLOCKS), ">=", 0.5),
            Criterion("excess_carried_by_the_top_neurons", ">=", 0.5, if_measured=True),
            Criterion("excess_carried_by_random_neurons", "<", 0.05, if_measured=True),
        ),
        control="As many random neurons of the same blocks; the same neurons at position 8.",
    )

    @property
    def deciding_metrics(self) -> tuple[str, ...]:
        """Names of the metrics of the configured blocks that correspond to the claim's."""
        _, *of_neurons = super().deciding_metrics
        return share_of_mlps(self.blocks), *of_neurons

    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        """Declare the ranking of neurons and the ablations."""
        info, config, rows = describe(model), self.config, second_half(prompts)
        fewer = min(rows, config.single_samples)
        runs = len(self.config.blocks) + 1  # rows with each whole MLP replaced, and with both
        if info.experts:
            return (runs * rows + len(self.config.blocks) * 2 * fewer) / prompts.n
        neurons = len(self.config.blocks) * info.d_mlp
        count = _count(config.share, neurons)
        groups = min(config.draws, neurons // count)
        singles = min(config.singles, neurons) + len(_sizes(count, neurons))
        measured = (runs + 2) * rows + groups * config.draw_samples + singles * fewer
        # The ranking of neurons: gradients in rows of two tokens, below the first sink heads.
        ranked = (
            2 * min(config.choosing, prompts.n - rows) * (1 + len(self.config.blocks) * config.steps) * WITH_GRADIENT
        )
        below = min(1, (max(self.config.blocks) + 2) / info.n_layers)
        return measured / prompts.n + ranked / (prompts.n * prompts.length) * below

    def quick(self, info: ModelInfo) -> Amplification:
        """Return a version for large models with fewer groups, single neurons and samples."""
        if not is_large(info):
            return self
        return Amplification(replace(self.config, draws=8, singles=3, single_samples=8))

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Measure what components write along the P0 direction, and ablate MLPs, neurons or experts.

        Raises:
            NotApplicable: there is no sink, or no block 1.
        """
        info, blocks = describe(model), self.config.blocks
        if info.n_layers <= (last := max(blocks)):
            raise NotApplicable(f"the last block of {info.title} is {info.n_layers - 1}: there is no block {last}")
        sink = studied_sink(model, prompts)
        layer = max(last + 1, min(layer for layer, _ in sink.heads))
        direction = p0_direction(model, sink.chosen_on, layer)
        writers, total = projections(model, sink.prompts, direction, layer)
        shares = {name: ratio_interval(value, total) for name, value in writers.items()}
        metrics = {
            share_of_mlps(blocks): ratio_interval(_sum(writers[f"mlp.{block}"] for block in blocks), total),
            **{f"share_of_mlp_{block}": shares[f"mlp.{block}"] for block in blocks},
            "projection": bootstrap(total),
        }
        where = f"before block {layer}" if layer < info.n_layers else "at the end"
        strongest = sorted(shares, key=lambda name: -abs(shares[name].value))[:3]
        notes = [
            sink.note,
            f"the P0 direction is that of the stream {where}",
            f"most of the projection is written by {', '.join(f'{n} ({shares[n].value:.2f})' for n in strongest)}",
        ]
        tables = {"writers": _interval_table("writer", "share", shares)}
        carried = self._whole_mlps(sink)
        if info.experts:
            notes.append("experts are ablated instead of neurons, which have no hook in a mixture of experts")
            tables["experts"], of_experts = self._experts(sink, direction)
            if not len(tables["experts"]):
                del tables["experts"]
                notes.append("the routed experts do not add up to the MLPs' outputs (a shared expert, or a later norm)")
            carried |= of_experts
        elif reason := _no_neurons(model, blocks):
            notes.append(reason)
        else:
            tables["neurons"], tables["by_number"], of_neurons, note = self._neurons(sink, direction, layer)
            metrics |= {
                f"excess_carried_by_{name.replace(' ', '_')}": interval for name, interval in of_neurons.items()
            }
            notes.append(note)
            carried |= dict(zip(("top 1 %", "random 1 %", "top, at 8"), of_neurons.values(), strict=True))
        metrics |= {f"excess_carried_by_mlp_{block}": carried[f"mlp.{block}"] for block in blocks}
        tables["ablations"] = _interval_table("ablated", "excess_carried", carried)
        written = _other_writers(writers, blocks)
        groups = {name: ratio_interval(_sum(values), total) for name, values in written.items()}
        tables["writer_groups"] = _interval_table("writers", "share", groups)
        return Result(self.id, self.title, metrics, tables, notes=notes)

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw the shares in the projection, and the excess score lost without MLPs, neurons or experts."""
        from p0circuit.figures.intervals import bars, intervals_by

        shares = intervals_by(result.tables["writers"], "writer", "share")
        groups = intervals_by(result.tables["writer_groups"], "writers", "share")
        carried = intervals_by(result.tables["ablations"], "ablated", "excess_carried")
        mlps = {name: shares[name] for name in (f"mlp.{block}" for block in result.provenance["config"]["blocks"])}
        panels = {
            "Projection on the P0 direction": mlps | groups,
            "Excess score lost without": dict(list(carried.items())[:7]),
        }
        figure = bars(panels, f"{result.model_title}: who writes the P0 direction", ["share of the whole"] * 2)
        figure.set_size_inches(7.0, 2.9)
        return {"writers": figure}

    def _whole_mlps(self, sink: StudiedSink) -> dict[str, Interval]:
        """The share of the excess that is lost with each whole MLP ablated, and with both."""
        nodes = [Node("mlp", block) for block in self.config.blocks]
        values = patch_values(sink.model, self._pair(sink.model, sink.prompts), nodes)
        groups = {str(node): [node] for node in nodes}
        if len(nodes) > 1:
            groups["both MLPs" if len(nodes) == 2 else "all MLPs"] = nodes
        return {name: share_carried(sink, group, values) for name, group in groups.items()}

    def _pair(self, model: HookedModel, prompts: PromptSet) -> PromptPair:
        """The same tokens first and not first."""
        # What a token computes does not depend on what follows it.
        return shifted_pair(model, first_two_tokens(prompts), self.config.shift, prompts.seed)

    def _shifted_neurons(self, model: HookedModel, prompts: PromptSet) -> dict[Node, Tensor]:
        """The values of all neurons of both blocks at the same tokens, where these are not first."""
        return patch_values_at_p0(model, self._pair(model, prompts), ("neuron",), layers=self.config.blocks)

    def _neurons(
        self, sink: StudiedSink, direction: Tensor, layer: int
    ) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Interval], str]:
        """Steps 3 and 4: a table of all neurons, one by number ablated, the shares carried, and a note."""
        model, config = sink.model, self.config
        ranking = self._rank(model, sink.chosen_on.subset(slice(0, config.choosing)), direction, layer)
        nodes = ranking.nodes
        count = _count(config.share, len(nodes))
        top = nodes[:count]
        values = self._shifted_neurons(model, sink.prompts)
        at_control = ablate(model, sink.prompts, top, "mean", CONTROL)
        clean = sink.excess_scores()
        shares = {
            "the top neurons": share_carried(sink, top, values),
            "random neurons": self._random(sink, nodes, count, values),
            "the top neurons at position 8": ratio_interval(clean - sink.excess_scores(at_control), clean),
        }
        fewer = sink.subset(slice(0, config.single_samples))
        first = {node: value[: fewer.prompts.n] for node, value in values.items()}
        alone = {node: share_carried(fewer, [node], first) for node in nodes[: config.singles]}
        by_number = {number: share_carried(fewer, nodes[:number], first) for number in _sizes(count, len(nodes))}
        named = ", ".join(f"{node} ({alone[node].value:.2f} alone)" for node in nodes[: min(count, config.singles)])
        note = f"the top {count} of {len(nodes)} neurons carry {shares['the top neurons']} of the excess score: {named}"
        return _neuron_table(ranking, alone), _interval_table("neurons", "excess_carried", by_number), shares, note

    def _rank(self, model: HookedModel, prompts: PromptSet, direction: Tensor, layer: int) -> _Ranking:
        """Every neuron's effect on the projection, and its mean value at P0 and where its token is not first."""

        def project(residual: Tensor, rows: Rows) -> Tensor:
            return residual[rows.at(0)] @ direction.to(residual)

        metric = Metric("projection", (Reading(f"blocks.{layer - 1}.hook_resid_post", project),), lambda value: value)
        values = self._shifted_neurons(model, prompts)
        attribution = attribute(model, first_two_tokens(prompts), values, metric, self.config.steps)
        clean = values_at(model, first_two_tokens(prompts), attribution.nodes)
        order = attribution.mean.argsort(stable=True).tolist()
        nodes = [attribution.nodes[number] for number in order]
        return _Ranking(
            nodes,
            [float(attribution.mean[number]) for number in order],
            [float(clean[node].double().mean()) for node in nodes],
            [float(values[node].double().mean()) for node in nodes],
        )

    def _random(self, sink: StudiedSink, nodes: Sequence[Node], count: int, values: Mapping[Node, Tensor]) -> Interval:
        """The share of the excess that random neurons carry, over groups of `count` without a neuron in common."""
        rng = np.random.default_rng(sink.prompts.seed)
        groups = rng.permutation(len(nodes))[: len(nodes) // count * count].reshape(-1, count)
        clean, shares = sink.excess_scores(), []
        for group in groups[: self.config.draws]:
            neurons = [nodes[number] for number in group]
            rows = np.sort(rng.permutation(sink.prompts.n)[: self.config.draw_samples])
            left = _excess_without(sink.subset(rows.tolist()), neurons, {node: values[node][rows] for node in neurons})
            shares.append(1 - left.mean() / clean[rows].mean())
        return bootstrap(np.array(shares))

    def _experts(self, sink: StudiedSink, direction: Tensor) -> tuple[pd.DataFrame, dict[str, Interval]]:
        """Step 5: a row for every expert that P0 is routed to; and what is lost without the three that carry most."""
        import pandas as pd

        fewer = sink.subset(slice(0, self.config.single_samples))
        rows, carried = [], {}
        for block in self.config.blocks:
            at_p0 = experts_at_p0(sink.model, fewer.prompts, block)
            if at_p0 is None:
                continue
            for expert in (at_p0.weights > 0).any(0).nonzero().squeeze(1).tolist():
                written = at_p0.written[:, expert]
                node = Node("mlp", block)
                without = share_carried(fewer, [node], {node: at_p0.output - written})
                along = bootstrap((written.double() @ direction.double().cpu()).numpy())
                routed = bootstrap((at_p0.weights[:, expert] > 0).double().numpy())
                line = {
                    "block": block,
                    "expert": expert,
                    "routed": routed.value,
                    "weight": float(at_p0.weights[:, expert].double().mean()),
                    "norm": float(written.double().norm(dim=-1).mean()),
                    "projection": along.value,
                    "projection_low": along.low,
                    "projection_high": along.high,
                    "excess_carried": without.value,
                    "low": without.low,
                    "high": without.high,
                }
                rows.append(line)
                carried[f"expert {block}.{expert}"] = without
        strongest = sorted(carried, key=lambda name: -carried[name].value)[:3]
        return pd.DataFrame(rows), {name: carried[name] for name in strongest}


@dataclass(frozen=True)
class _Ranking:
    """Neurons in the order of their effect on the projection.

    Attributes:
        nodes: the neurons, the most negative change of the projection first.
        change: change of the projection that ablating each causes, as integrated gradients estimate it.
        at_p0: mean value of each at P0.
        not_first: its mean value at the same tokens where they are not first.
    """

    nodes: list[Node]
    change: list[float]
    at_p0: list[float]
    not_first: list[float]


def _count(share: float, neurons: int) -> int:
    """A share of the neurons as a number, rounded down, at least one."""
    return max(1, int(share * neurons))


def _sizes(count: int, neurons: int) -> list[int]:
    """Numbers of top neurons to ablate together: powers of two up to four times `count`, `count`, and all."""
    return sorted({2**power for power in range(12) if 2**power < 4 * count} | {count, neurons})


def _sum(values: Iterable[np.ndarray]) -> np.ndarray:
    return np.sum(list(values), axis=0)


def first_two_tokens(prompts: PromptSet) -> PromptSet:
    """Return P0 and the token after it, from which all of P0's own stream can be computed.

    Args:
        prompts: rows of at least two tokens, padded or not.
    """
    rows = torch.arange(prompts.n)
    ids = torch.stack([prompts.ids[rows, prompts.p0], prompts.ids[rows, prompts.p0 + 1]], dim=1)
    return replace(prompts, ids=ids, attention_mask=torch.ones_like(ids, dtype=torch.bool), overflow=None)


def projections(
    model: HookedModel, prompts: PromptSet, direction: Float[Tensor, " d_model"], layer: int
) -> tuple[dict[str, Float[np.ndarray, " sample"]], Float[np.ndarray, " sample"]]:
    """Project what every component writes at P0 on a direction.

    Args:
        model: the model.
        prompts: prompts to run.
        direction: the direction, of unit length.
        layer: components of the layers below write; the stream before this layer is projected too.

    Returns:
        The projections [sample] by component, and those of the stream before `layer`.
    """
    end = Node("resid_post", layer - 1)
    writers = components(model, range(layer))
    values = values_at(model, first_two_tokens(prompts), [*writers, end])
    along = {node: (value.double() @ direction.to(value).double()).cpu().numpy() for node, value in values.items()}
    return {str(node): along[node] for node in writers}, along[end]


def _other_writers(writers: Mapping[str, np.ndarray], blocks: Sequence[int]) -> dict[str, list[np.ndarray]]:
    """What is written by others than the MLPs of the circuit, in two groups."""
    early, mlps = ["embed", *(f"attn.{block}" for block in blocks)], [f"mlp.{block}" for block in blocks]
    later = [value for name, value in writers.items() if name not in (*early, *mlps)]
    groups = {"embed, attention": [writers[name] for name in early], "later blocks": later}
    return {name: values for name, values in groups.items() if values}


def share_carried(sink: StudiedSink, nodes: Sequence[Node], values: Mapping[Node, Tensor]) -> Interval:
    """Measure the share of the excess score that is lost when nodes have other values at P0.

    Args:
        sink: the sink, and the prompts to measure on.
        nodes: the nodes to ablate.
        values: the value of each node at P0, [sample, ...].
    """
    clean = sink.excess_scores()
    return ratio_interval(clean - _excess_without(sink, nodes, values), clean)


def _excess_without(
    sink: StudiedSink, nodes: Sequence[Node], values: Mapping[Node, Tensor]
) -> Float[np.ndarray, " sample"]:
    return sink.excess_scores(ablate(sink.model, sink.prompts, nodes, {node: values[node] for node in nodes}))


def _neuron_table(ranking: _Ranking, alone: Mapping[Node, Interval]) -> pd.DataFrame:
    """A row for every neuron; the effect of ablating it alone is measured for the first of them."""
    import pandas as pd

    columns = ["neuron", "layer", "index", "change_of_projection", "at_p0", "not_first"]
    rows = []
    for node, *values in zip(ranking.nodes, ranking.change, ranking.at_p0, ranking.not_first, strict=True):
        one = alone.get(node)
        ends = (one.value, one.low, one.high) if one else (np.nan,) * 3
        rows.append((str(node), node.layer, node.index, *values, *ends))
    return pd.DataFrame(rows, columns=[*columns, "excess_carried_alone", "low", "high"])


def _no_neurons(model: HookedModel, blocks: Sequence[int]) -> str:
    """The reason why neurons cannot be ablated in this model; empty if they can be."""
    try:
        for block in blocks:
            hook_point(model, Node("neuron", block, 0).hook)
    except ModelError as error:
        return f"neurons are left out: {error}"
    return ""


def _interval_table(name: str, value: str, intervals: Mapping[str, Interval] | Mapping[int, Interval]) -> pd.DataFrame:
    import pandas as pd

    rows = [(key, *interval.to_json().values()) for key, interval in intervals.items()]
    return pd.DataFrame(rows, columns=[name, value, "low", "high", "n"])
