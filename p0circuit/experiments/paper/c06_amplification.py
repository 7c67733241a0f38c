"""Amplification: MLPs 0 and 1 write the P0 direction, by a few of their neurons (paper, section on amplification).

1. Choose the sink heads, the P0 direction and the neurons on one half of the samples; measure on the other half.
2. What each component before the sink heads writes along the P0 direction, as a share of the stream's projection on it.
3. Rank the neurons of MLPs 0 and 1 by what they do to that projection, directly or through later MLPs: integrated
   gradients, from their values at P0 to those they have at the same token when it is not first.
4. Put these values into the first 1 % of them, at P0, and see how much of the excess score goes; likewise for a random
   1 %, many times, and for single neurons.
5. In a mixture of experts, the experts take the place of the neurons: who is chosen for P0, what each writes, and how
   much of the excess score goes without it.

Decided before measuring:

- *The P0 direction* is the mean direction of P0's stream as the first layer with a sink head reads it, at the earliest
  that after block 1. *The final projection* is the stream's own, there. Whatever later blocks add counts against the
  claim.
- *Ablated* means: at P0, the value of the neuron at the same token behind 8 random ones. Nothing else of the run
  changes, and what is computed later is free to follow.
- *1 %* is rounded down, with one neuron at the least. Neurons are ranked by how much of the projection goes without
  them. For a *random 1 %* all neurons of both blocks, the first 1 % not excepted, are dealt into random groups of that
  size; each group is measured on a few samples, other ones each time. The interval is over groups.
- P0 sees itself alone, so all that happens in its own stream is computed from rows of two tokens.

Source: first-detector and sink neurons, Yona et al. 2025 (arXiv 2503.08908); super experts, Su et al. (2507.23279).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from p0circuit.experiments.base import Experiment, NotApplicable, is_large, second_half
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.sink_under_study import StudiedSink, excess_scores, studied_sink
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.ablation import ablate
from p0circuit.interventions.attribution import Attribution, attribute, patch_values_at_p0
from p0circuit.interventions.experts import experts_at_p0
from p0circuit.interventions.intervention import p0_direction
from p0circuit.interventions.metrics import Metric, Reading, Rows
from p0circuit.interventions.nodes import Node, components
from p0circuit.interventions.pairs import patch_values, shifted_pair, values_at
from p0circuit.models import ModelError, ModelInfo, describe
from p0circuit.models.hooks import hook_point
from p0circuit.models.passes import WITH_GRADIENT
from p0circuit.prompts import PromptSet
from p0circuit.results import Result
from p0circuit.sink import CIRCUIT_BLOCKS, CONTROL
from p0circuit.stats import Interval, bootstrap, ratio_interval

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class AmplificationConfig:
    """`shift`: tokens of the prefix behind which a token is not first; `steps` of integrated gradients.

    `share` of the neurons is ablated, and at most `draws` random groups of as many, on `draw_samples` samples each.
    `choosing`: samples that neurons are ranked on; `shown`: the first of them, ablated one by one on `shown_samples`.
    """

    shift: int = 8
    steps: int = 8
    share: float = 0.01
    draws: int = 128
    draw_samples: int = 8
    choosing: int = 128
    shown: int = 8
    shown_samples: int = 64


class Amplification(Experiment[AmplificationConfig]):
    """Who writes the P0 direction: MLPs 0 and 1 and their neurons (or experts), ablated against random ones."""

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
            Criterion("share_of_mlps_0_and_1", ">=", 0.5),
            Criterion("excess_carried_by_the_top_neurons", ">=", 0.5, if_measured=True),
            Criterion("excess_carried_by_random_neurons", "<", 0.05, if_measured=True),
        ),
        control="As many random neurons of the same blocks; the same neurons at position 8.",
    )

    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        info, config, rows = describe(model), self.config, second_half(prompts)
        few = min(rows, config.shown_samples)
        runs = len(CIRCUIT_BLOCKS) + 1  # rows with each whole MLP replaced, and with both
        if info.experts:
            return (runs * rows + len(CIRCUIT_BLOCKS) * 2 * few) / prompts.n
        neurons = len(CIRCUIT_BLOCKS) * info.d_mlp
        count = _count(config.share, neurons)
        groups = min(config.draws, neurons // count)
        singles = min(config.shown, neurons) + len(_numbers(count, neurons))
        measured = (runs + 2) * rows + groups * config.draw_samples + singles * few
        # The ranking of neurons: gradients in rows of two tokens, below the first sink heads.
        ranked = 2 * min(config.choosing, prompts.n - rows) * (1 + len(CIRCUIT_BLOCKS) * config.steps) * WITH_GRADIENT
        return measured / prompts.n + ranked / (prompts.n * prompts.length) * min(
            1, (max(CIRCUIT_BLOCKS) + 2) / info.n_layers
        )

    def quick(self, info: ModelInfo) -> Amplification:
        if not is_large(info):
            return self
        return Amplification(replace(self.config, draws=8, shown=3, shown_samples=8))

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Raises NotApplicable where there is no sink, or no block 1."""
        from p0circuit.figures.intervals import bars

        info = describe(model)
        if info.n_layers <= max(CIRCUIT_BLOCKS):
            raise NotApplicable(f"{info.title} has {info.n_layers} block: there are no blocks 0 and 1")
        found = studied_sink(model, prompts)
        first = prompts.split()[0]
        layer = max(max(CIRCUIT_BLOCKS) + 1, min(layer for layer, _ in found.heads))
        direction = p0_direction(model, first, layer)
        writers, total = _projections(model, found.prompts, direction, layer)
        mlps = _sum(writers[f"mlp.{block}"] for block in CIRCUIT_BLOCKS)
        shares = {name: ratio_interval(value, total) for name, value in writers.items()}
        metrics = {
            "share_of_mlps_0_and_1": ratio_interval(mlps, total),
            **{f"share_of_mlp_{block}": shares[f"mlp.{block}"] for block in CIRCUIT_BLOCKS},
            "projection": bootstrap(total),
        }
        where = f"before block {layer}" if layer < info.n_layers else "at the end"
        notes = [found.note, f"the P0 direction is that of the stream {where}"]
        tables = {"writers": _interval_table("writer", "share", shares)}
        early = ("embed", "attn.0", "attn.1")
        rest = [writers[name] for name in early]
        later = [value for name, value in writers.items() if name not in (*early, "mlp.0", "mlp.1")]
        shown = {name: shares[name] for name in ("mlp.0", "mlp.1")}
        shown["embed, attention"] = ratio_interval(_sum(rest), total)
        if later:
            shown["later blocks"] = ratio_interval(_sum(later), total)
        panels = {"Projection on the P0 direction": shown}
        strongest = sorted(shares, key=lambda name: -abs(shares[name].value))[:3]
        named = ", ".join(f"{name} ({shares[name].value:.2f})" for name in strongest)
        notes.append(f"most of the projection is written by {named}")

        clean = excess_scores(model, found.prompts, found.heads)
        carried = self._whole_mlps(model, found, clean)
        if info.experts:
            notes.append("neurons belong to experts and have no hook of their own: experts are ablated in their place")
            tables["experts"], without = self._experts(model, found, direction, clean)
            if not len(tables["experts"]):
                del tables["experts"]
                notes.append("the routed experts do not add up to the MLPs' outputs (a shared expert, or a norm after)")
            carried |= without
        elif why_not := _no_neurons(model):
            notes.append(why_not)
        else:
            tables["neurons"], tables["by_number"], of_neurons, few = self._neurons(
                model, first, found, direction, layer, clean, prompts.seed
            )
            metrics |= {
                f"excess_carried_by_{name.replace(' ', '_')}": interval for name, interval in of_neurons.items()
            }
            notes.append(few)
            carried |= dict(zip(("top 1 %", "random 1 %", "top, at 8"), of_neurons.values(), strict=True))
        metrics |= {f"excess_carried_by_{name.replace('.', '_')}": carried[name] for name in ("mlp.0", "mlp.1")}
        tables["ablations"] = _interval_table("ablated", "excess_carried", carried)
        panels["Excess score lost without"] = dict(list(carried.items())[:7])
        figure = bars(panels, f"{info.title}: who writes the P0 direction", ["share of the whole"] * 2)
        figure.set_size_inches(7.0, 2.9)
        return Result(self.id, self.title, metrics, tables, {"writers": figure}, notes=notes)

    def _whole_mlps(self, model: HookedModel, found: StudiedSink, clean: np.ndarray) -> dict[str, Interval]:
        """The share of the excess that goes with each whole MLP, and with both."""
        nodes = [Node("mlp", block) for block in CIRCUIT_BLOCKS]
        values = self._shifted(model, found.prompts, nodes)
        groups = {"mlp.0": nodes[:1], "mlp.1": nodes[1:], "both MLPs": nodes}
        return {name: _carried(model, found, some, values, clean) for name, some in groups.items()}

    def _shifted(self, model: HookedModel, prompts: PromptSet, nodes: Sequence[Node]) -> dict[Node, Tensor]:
        """The values of nodes at the same tokens, where these are not first."""
        return patch_values(model, self._pair(model, prompts), nodes)

    def _pair(self, model: HookedModel, prompts: PromptSet) -> Any:
        # What a token computes does not depend on what follows it.
        return shifted_pair(model, _two_tokens(prompts), self.config.shift, prompts.seed)

    def _neurons(
        self,
        model: HookedModel,
        first: PromptSet,
        found: StudiedSink,
        direction: Tensor,
        layer: int,
        clean: np.ndarray,
        seed: int,
    ) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Interval], str]:
        """Steps 3 and 4: a table of all neurons, one by number ablated, the shares carried, and a note."""
        import pandas as pd

        config = self.config
        chosen_on = first.subset(slice(0, config.choosing))
        ranking, at_p0, shifted = self._rank(model, chosen_on, direction, layer)
        order = ranking.mean.argsort(stable=True)
        nodes = [ranking.nodes[number] for number in order]
        count = _count(config.share, len(nodes))
        values = self._all_shifted(model, found.prompts)
        top = nodes[:count]
        beside = ablate(model, found.prompts, top, "mean", CONTROL)
        lost = clean - excess_scores(model, found.prompts, found.heads, interventions=[beside])
        shares = {
            "the top neurons": _carried(model, found, top, values, clean),
            "random neurons": self._random(model, found, nodes, count, values, clean, seed),
            "the top neurons at position 8": ratio_interval(lost, clean),
        }
        few = _part(found, slice(0, config.shown_samples))
        here = {node: value[: few.prompts.n] for node, value in values.items()}
        single = {node: _carried(model, few, [node], here, clean[: few.prompts.n]) for node in nodes[: config.shown]}
        rows = []
        for number, node in zip(order.tolist(), nodes, strict=True):
            alone = single.get(node)
            rows.append(
                (str(node), node.layer, node.index, float(ranking.mean[number]), at_p0[node], shifted[node])
                + ((alone.value, alone.low, alone.high) if alone else (np.nan,) * 3)
            )
        columns = ["neuron", "layer", "index", "change_of_projection", "at_p0", "not_first"]
        table = pd.DataFrame(rows, columns=[*columns, "excess_carried_alone", "low", "high"])
        by_number = {
            number: _carried(model, few, nodes[:number], here, clean[: few.prompts.n])
            for number in _numbers(count, len(nodes))
        }
        named = ", ".join(f"{node} ({single[node].value:.2f} alone)" for node in nodes[: min(count, config.shown)])
        note = f"the top {count} of {len(nodes)} neurons carry {shares['the top neurons']} of the excess score: {named}"
        return table, _interval_table("neurons", "excess_carried", by_number), shares, note

    def _all_shifted(self, model: HookedModel, prompts: PromptSet) -> dict[Node, Tensor]:
        return patch_values_at_p0(model, self._pair(model, prompts), ("neuron",), layers=CIRCUIT_BLOCKS)

    def _rank(
        self, model: HookedModel, prompts: PromptSet, direction: Tensor, layer: int
    ) -> tuple[Attribution, dict[Node, float], dict[Node, float]]:
        """Every neuron's effect on the projection, and its mean value at P0 and where its token is not first."""

        def project(residual: Tensor, rows: Rows) -> Tensor:
            return residual[rows.at(0)] @ direction.to(residual)

        metric = Metric("projection", (Reading(f"blocks.{layer - 1}.hook_resid_post", project),), lambda value: value)
        values = self._all_shifted(model, prompts)
        ranking = attribute(model, _two_tokens(prompts), values, metric, self.config.steps)
        clean = values_at(model, _two_tokens(prompts), ranking.nodes)
        at_p0, shifted = ({node: float(one[node].double().mean()) for node in values} for one in (clean, values))
        return ranking, at_p0, shifted

    def _random(
        self,
        model: HookedModel,
        found: StudiedSink,
        nodes: Sequence[Node],
        count: int,
        values: Mapping[Node, Tensor],
        clean: np.ndarray,
        seed: int,
    ) -> Interval:
        """The share of the excess that random neurons carry, over groups of `count` without a neuron in common."""
        rng = np.random.default_rng(seed)
        dealt = rng.permutation(len(nodes))[: len(nodes) // count * count].reshape(-1, count)
        shares = []
        for group in dealt[: self.config.draws]:
            drawn = [nodes[number] for number in group]
            rows = np.sort(rng.permutation(found.prompts.n)[: self.config.draw_samples])
            here = {node: values[node][rows] for node in drawn}
            left = _excess_without(model, _part(found, rows.tolist()), drawn, here)
            shares.append(1 - left.mean() / clean[rows].mean())
        return bootstrap(np.array(shares))

    def _experts(
        self, model: HookedModel, found: StudiedSink, direction: Tensor, clean: np.ndarray
    ) -> tuple[pd.DataFrame, dict[str, Interval]]:
        """Step 5: a line for every expert that P0 is routed to; and what goes without the three that write most."""
        import pandas as pd

        few = _part(found, slice(0, self.config.shown_samples))
        rows, carried = [], {}
        for block in CIRCUIT_BLOCKS:
            here = experts_at_p0(model, few.prompts, block)
            if here is None:
                continue
            for expert in (here.weights > 0).any(0).nonzero().squeeze(1).tolist():
                written = here.written[:, expert]
                left = {Node("mlp", block): here.output - written}
                without = _carried(model, few, list(left), left, clean[: few.prompts.n])
                along = bootstrap((written.double() @ direction.double().cpu()).numpy())
                routed = bootstrap((here.weights[:, expert] > 0).double().numpy())
                line = {
                    "block": block,
                    "expert": expert,
                    "routed": routed.value,
                    "weight": float(here.weights[:, expert].double().mean()),
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


def _count(share: float, neurons: int) -> int:
    """A share of the neurons as a number: rounded down, at least one."""
    return max(1, int(share * neurons))


def _numbers(count: int, neurons: int) -> list[int]:
    """How many of the first neurons are ablated together: powers of two up to four times `count`, `count`, and all."""
    return sorted({2**power for power in range(12) if 2**power < 4 * count} | {count, neurons})


def _sum(values: Iterable[np.ndarray]) -> np.ndarray:
    return np.sum(list(values), axis=0)


def _two_tokens(prompts: PromptSet) -> PromptSet:
    """P0 and the token after it: all that P0's own stream needs."""
    rows = torch.arange(prompts.n)
    ids = torch.stack([prompts.ids[rows, prompts.p0], prompts.ids[rows, prompts.p0 + 1]], dim=1)
    return replace(prompts, ids=ids, attention_mask=torch.ones_like(ids, dtype=torch.bool), overflow=None)


def _part(found: StudiedSink, rows: slice | Sequence[int]) -> StudiedSink:
    return replace(found, prompts=found.prompts.subset(rows))


def _projections(
    model: HookedModel, prompts: PromptSet, direction: Float[Tensor, " d_model"], layer: int
) -> tuple[dict[str, Float[np.ndarray, " sample"]], Float[np.ndarray, " sample"]]:
    """What every component below `layer` writes along the direction at P0, and the projection of the stream there."""
    end = Node("resid_post", layer - 1)
    writers = components(model, range(layer))
    values = values_at(model, _two_tokens(prompts), [*writers, end])
    along = {node: (value.double() @ direction.to(value).double()).cpu().numpy() for node, value in values.items()}
    return {str(node): along[node] for node in writers}, along[end]


def _carried(
    model: HookedModel, found: StudiedSink, nodes: Sequence[Node], values: Mapping[Node, Tensor], clean: np.ndarray
) -> Interval:
    """The share of the excess score that goes when nodes have other values at P0."""
    return ratio_interval(clean - _excess_without(model, found, nodes, values), clean)


def _excess_without(
    model: HookedModel, found: StudiedSink, nodes: Sequence[Node], values: Mapping[Node, Tensor]
) -> Float[np.ndarray, " sample"]:
    ablation = ablate(model, found.prompts, nodes, {node: values[node] for node in nodes})
    return excess_scores(model, found.prompts, found.heads, interventions=[ablation])


def _no_neurons(model: HookedModel) -> str:
    """Why neurons cannot be ablated in this model; empty if they can."""
    try:
        for block in CIRCUIT_BLOCKS:
            hook_point(model, Node("neuron", block, 0).hook)
    except ModelError as error:
        return f"neurons are left out: {error}"
    return ""


def _interval_table(name: str, value: str, intervals: Mapping[Any, Interval]) -> pd.DataFrame:
    import pandas as pd

    rows = [(key, *interval.to_json().values()) for key, interval in intervals.items()]
    return pd.DataFrame(rows, columns=[name, value, "low", "high", "n"])
