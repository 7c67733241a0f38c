"""Every edge at P0 whose effect on the sink is at least a threshold, at a small part of one pass per edge.

The metric is the mean sink score of some heads. What makes the search cheap: whatever stays in P0's own stream is a
computation on rows of one token, and the effect of a new key of P0 on a head's attention is `sigmoid(s_t - Z_t)`.

1. *Clean run*, on some or all rows: queries, scores and values, and the gradient of the metric by what every head
   reads (z) at every position. A second gradient is taken halfway: where P0's values have gone half the way to those
   that all senders give together. Other positions saturate, and a gradient of 0 in the clean run can hide an effect.
2. *Read.* Rows of one token give the key, value and MLP output at P0 that each sender leads to, all other paths cut.
3. *Edges into Q* at P0 have no effect: P0's query sees P0 alone. They are known without a run.
4. *Edges into K* are estimated without a run: the heads' own scores are exact, and what their new output does at later
   positions is first order (a gradient times the exact change of z; once for each of the two gradients).
5. *Edges into V and MLPs* change P0's stream above the receiver. Rows of one token run it to the last sink head; the
   keys and values it gives there are scored as in 4. Groups come first: all heads of a block as one sender, V of all
   heads of a block as one receiver. Members are run only where the group's estimate, or the sum of the sizes of the
   members' first-order estimates (members can cancel), reaches the threshold over the safety factor.
   Where that is done on a few rows, everything that reaches the threshold over `SAFETY_OF_FEW_ROWS` is estimated again
   on all of them, as are all members of a group that reaches it over the safety factor: effects differ from row to row.
6. *Verify.* Every edge one of whose two estimates reaches the threshold over the safety factor is patched exactly on
   all rows, strongest first, within a budget of passes. Estimates for V are the least exact; they count twice.
   With `members`, an edge into a group of heads that reaches the threshold is followed by edges into its heads. What is
   left of the budget goes to a random sample of the edges that were left out: the result states the error of the
   estimates on both.

Sets of receivers (K of all sink heads, whatever their block) are receivers like any others; their estimate is the sum
of their members'. Exhaustive search is `path_patching.path_patch`; the tests hold the two together.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from p0circuit.interventions.attribution import rows_with_gradients
from p0circuit.interventions.closed_form import (
    ROWS_AT_ONCE,
    QueryScores,
    attention_from_score,
    key_hook,
    query_side,
)
from p0circuit.interventions.metrics import Complete, Metric, Rows, reading_hooks, sink_score_of
from p0circuit.interventions.nodes import InterventionError, Node, nodes_of
from p0circuit.interventions.path_patching import PathEffects, Receiver
from p0circuit.interventions.receiver_inputs import (
    InputPatch,
    InputsAtP0,
    Variant,
    clean_streams,
    measure_inputs,
    read_at_p0,
)
from p0circuit.interventions.side_by_side import by_slot, check_value, repeated
from p0circuit.models import ModelInfo, describe, device_of, forward, resume
from p0circuit.models.forward import Hook
from p0circuit.models.memory import return_freed_memory
from p0circuit.models.passes import WITH_GRADIENT
from p0circuit.prompts import PromptSet
from p0circuit.sink import mean_over_queries

if TYPE_CHECKING:
    import pandas as pd

Edge = tuple[str, str]
POINTS = 2
"""Where gradients are taken: in the clean run and halfway."""
SAFETY_OF_FEW_ROWS = 8.0
"""Estimates from a few rows leave out what is this many times below the threshold."""
SAFETY = 2.0
"""An estimate is trusted to lie within this factor of the exact effect where it leaves an edge out."""


@dataclass(frozen=True, eq=False)
class EdgeSearch:
    """Estimates for all edges, and the exact effects of those that could reach the threshold.

    Attributes:
        threshold: the least size of an effect, in units of the metric.
        edges: all edges with an effect to be estimated, in the order of `means`.
        means: the estimated mean change of the metric, the mean of the two estimates.
        by_row: the same for each row; None where most edges were estimated on a few rows only.
        exact: exact effects of the verified edges, those of the random sample included.
        sampled: the edges of the random sample; every other verified edge passed the screen.
        unverified: edges that passed the screen but were beyond the limit on exact runs.
        without_effect: how many edges end in Q at P0, or above the last sink heads: their effect is 0 in any model.
        variants: variants that were run, by stage: one-token rows and exact runs.
    """

    threshold: float
    edges: tuple[Edge, ...]
    means: Float[Tensor, " edge"]
    by_row: Float[Tensor, "edge batch"] | None
    exact: PathEffects
    sampled: frozenset[Edge]
    unverified: tuple[Edge, ...]
    without_effect: int
    variants: Mapping[str, int] = field(default_factory=dict)

    @functools.cached_property
    def _number(self) -> dict[Edge, int]:
        return {edge: number for number, edge in enumerate(self.edges)}

    @property
    def strong_edges(self) -> list[Edge]:
        """The edges whose exact effect reaches the threshold."""
        means = self.exact.effect.double().mean(1)
        return [edge for edge, mean in zip(self.exact.edges, means, strict=True) if abs(float(mean)) >= self.threshold]

    @property
    def screened_out(self) -> int:
        """How many edges the screen left out, those of the random sample included."""
        return len(self.edges) - (len(self.exact.edges) - len(self.sampled)) - len(self.unverified)

    @property
    def largest_screened_out(self) -> float:
        """The largest size of an estimate among the edges that were left out."""
        passed = {*self.exact.edges} - self.sampled | {*self.unverified}
        left = [float(mean) for edge, mean in zip(self.edges, self.means.abs(), strict=True) if edge not in passed]
        return max(left, default=0.0)

    def errors(self, sampled: bool) -> Float[np.ndarray, " edge"]:
        """Mean estimate minus mean exact effect of the verified edges: of the random sample, or of the others."""
        means = self.exact.effect.double().mean(1)
        return np.array(
            [
                float(self.means[self._number[edge]] - mean)
                for edge, mean in zip(self.exact.edges, means, strict=True)
                if (edge in self.sampled) == sampled
            ]
        )

    def sizes(self, receivers: Sequence[str]) -> Float[np.ndarray, " row"]:
        """The summed sizes of the effects of all edges into these receivers: exact where verified, else estimated.

        Raises:
            InterventionError: the estimates are not of all rows.
        """
        if self.by_row is None:
            raise InterventionError(
                "most edges were estimated on a few rows, and single rows cannot be added up; search with "
                "screening_rows=None"
            )
        chosen = {*receivers}
        best = self.by_row.clone()
        for edge, effect in zip(self.exact.edges, self.exact.effect, strict=True):
            best[self._number[edge]] = effect
        into = torch.tensor([receiver in chosen for _, receiver in self.edges])
        return best[into].abs().sum(0).double().numpy()

    def summary(self) -> list[str]:
        """What was screened, what was verified, and how wrong the estimates were: sentences for a result's notes."""
        lines = [
            f"{len(self.edges) + self.without_effect} edges: {self.without_effect} have no effect (Q at P0, or above "
            "the sink heads), "
            f"{self.screened_out} were screened out (largest estimate {self.largest_screened_out:.4f}), "
            f"{len(self.exact.edges) - len(self.sampled)} were patched exactly",
        ]
        for sampled, name in ((False, "edges that passed the screen"), (True, "edges drawn from those screened out")):
            if len(errors := abs(self.errors(sampled))):
                lines.append(
                    f"error of the estimates on {len(errors)} {name}: mean {errors.mean():.4f}, largest "
                    f"{errors.max():.4f}, beside a threshold of {self.threshold:.4f}"
                )
        if self.unverified:
            largest = max(abs(float(self.means[self._number[edge]])) for edge in self.unverified)
            lines.append(
                f"{len(self.unverified)} edges passed the screen and were beyond the limit on exact runs (largest "
                f"estimate {largest:.4f})"
            )
        return lines

    def to_dataframe(self) -> pd.DataFrame:
        """The verified edges: sender, receiver, exact mean effect with its interval, n, and the estimate."""
        table = self.exact.to_dataframe()
        pairs = zip(table["sender"], table["receiver"], strict=True)
        return table.assign(estimate=[float(self.means[self._number[pair]]) for pair in pairs])

    def estimates_table(self, least: float) -> pd.DataFrame:
        """All edges whose mean estimate has at least this size: sender, receiver, estimate; largest first."""
        import pandas as pd

        rows = [(*edge, float(mean)) for edge, mean in zip(self.edges, self.means, strict=True) if abs(mean) >= least]
        table = pd.DataFrame(rows, columns=["sender", "receiver", "estimate"])
        return table.sort_values("estimate", key=lambda estimate: -estimate.abs(), kind="stable", ignore_index=True)


@torch.no_grad()
def search_edges(
    model: Any,
    prompts: PromptSet,
    senders: Sequence[str | Node],
    receivers: Sequence[str],
    values: Mapping[Node, Tensor],
    heads: Sequence[tuple[int, int]],
    threshold: float,
    sets: Mapping[str, Sequence[str]] | None = None,
    screening_rows: int | None = None,
    safety: float = SAFETY,
    members: bool = False,
    sample: int = 8,
    budget: float | None = None,
    seed: int = 0,
) -> EdgeSearch:
    """Search all edges from senders at P0 to receivers for those that change the heads' sink score by `threshold`.

    Args:
        senders: embedding, attention outputs, their heads, MLPs.
        receivers: Q, K or V of heads or of groups of heads, and MLPs.
        values: the senders' new values at P0, as `contrast.replacements` gives them.
        heads: (layer, head) of the sink heads; the metric is their mean sink score.
        threshold: the least size of a mean effect.
        sets: names for sets of receivers, all K or all V, that are patched together.
        screening_rows: how many of the first rows are used for the first estimates; all if None.
        safety: edges are left out where their estimate is below `threshold / safety`.
        members: whether the single heads of a group are receivers where an edge into the group reaches the threshold.
        sample: how many of those left out are patched exactly as well, drawn at random.
        budget: passes over the prompts for exact runs; what is left of it makes the sample larger. No limit if None.

    Raises:
        InterventionError: a name, value, threshold or number that does not fit.
        NotOfTheClosedForm: the model's attention is of another kind; use `path_patch`.
    """
    if not senders:
        raise InterventionError("no sender to search edges from; expected at least one, such as components(model)")
    if not threshold > 0 or not safety >= 1 or sample < 0 or (budget is not None and budget < 0):
        raise InterventionError(
            f"threshold={threshold}, safety={safety}, sample={sample}, budget={budget}: expected a threshold above 0, "
            "a safety factor of at least 1, and no negative number of edges or passes"
        )
    nodes, info = nodes_of(senders, model), describe(model)
    for node in nodes:
        check_value(node, values, prompts.n, info)
    targets: dict[str, tuple[Receiver, ...]] = {name: (Receiver.parse(name, info),) for name in receivers}
    for name, parts in (sets or {}).items():
        targets[name] = tuple(Receiver.parse(part, info) for part in parts)
    _check_targets(targets)
    metric = sink_score_of(heads).check(model)
    exact = _Exact(model, prompts, metric, nodes, values, targets, math.inf if budget is None else budget)
    least, number = threshold / safety, prompts.n if screening_rows is None else max(1, screening_rows)
    if few := number < prompts.n:
        rows = slice(0, number)
        some = {node: values[node][rows] for node in nodes}
        first = _Screen.of(model, prompts.subset(rows), nodes, some, heads, threshold / SAFETY_OF_FEW_ROWS)
        estimates = _Estimates(first.estimates(targets))
        again = {*estimates.from_size(threshold / SAFETY_OF_FEW_ROWS), *first.members_of(least)}
        screen = first
        if again:
            sending = {sender for sender, _ in again}
            screen = _Screen.of(model, prompts, [node for node in nodes if node in sending], values, heads, least)
            screen.single += first.single
            estimates.update(screen.estimates(targets, again))
    else:
        screen = _Screen.of(model, prompts, nodes, values, heads, least)
        estimates = _Estimates(screen.estimates(targets))

    passing = estimates.from_rank(least, targets)
    # A random sample, and the members of groups, need a part of the budget.
    reserve = sample * exact.cost(None) + (exact.budget / 4 if members and budget is not None else 0)
    exact.run(passing, reserve)
    if members:
        finer: set[Pair] = set()
        for (node, name), effect in exact.effects.items():
            group, *others = targets[name]
            if others or len(group.heads) < 2 or abs(float(effect.double().mean())) < threshold:
                continue
            for head in group.heads:
                member = f"attn.{group.layer}.{head}.{group.kind}"
                targets[member] = (Receiver.parse(member, info),)
                if (node, member) not in estimates.by_edge:
                    finer.add((node, member))
        estimates.update(screen.estimates({name: targets[name] for _, name in finer}, finer))
        passing += [pair for pair in estimates.from_rank(least, targets) if pair in finer]
        exact.run(passing, sample * exact.cost(None))
    left = [pair for pair in estimates.by_edge if pair not in {*passing}]
    generator = torch.Generator().manual_seed(seed)
    order = [left[place] for place in torch.randperm(len(left), generator=generator).tolist()]
    drawn = exact.run(order if budget is not None else order[:sample], 0.0, at_least=min(sample, len(order)))
    clean, pairs = exact.clean.cpu(), list(exact.effects)
    effects = torch.stack([exact.effects[pair] for pair in pairs]) if pairs else torch.zeros(0, prompts.n)
    last = metric.end(model) - 1
    without = sum(
        any(part.hears(node, info) for part in parts)
        and (parts[0].kind == "q" or all(part.layer > last for part in parts if part.hears(node, info)))
        for node in nodes
        for parts in targets.values()
    )
    return EdgeSearch(
        threshold,
        tuple(map(_named, estimates.by_edge)),
        torch.tensor([float(both.mean()) for both in estimates.by_edge.values()], dtype=torch.float64),
        None if few or not estimates.by_edge else torch.stack([e.mean(0).cpu() for e in estimates.by_edge.values()]),
        PathEffects(tuple(map(_named, pairs)), clean, clean + effects, metric.name, "direct"),
        frozenset(map(_named, drawn)),
        tuple(_named(pair) for pair in passing if pair not in exact.effects),
        without,
        {"one-token": screen.single, "exact": len(pairs)},
    )


Pair = tuple[Node, str]


def _named(pair: Pair) -> Edge:
    return str(pair[0]), pair[1]


@dataclass(eq=False)
class _Estimates:
    """Both estimates of every edge."""

    by_edge: dict[Pair, Float[Tensor, "point batch"]]

    def update(self, more: Mapping[Pair, Float[Tensor, "point batch"]]) -> None:
        """Put estimates of more edges, or better ones, beside those there are."""
        self.by_edge |= more

    def from_size(self, least: float) -> list[Pair]:
        """The edges one of whose mean estimates has at least this size, the largest first."""
        sizes = {pair: float(both.mean(1).abs().max()) for pair, both in self.by_edge.items()}
        return [pair for pair in sorted(sizes, key=lambda pair: -sizes[pair]) if sizes[pair] >= least]

    def from_rank(self, least: float, targets: Targets) -> list[Pair]:
        """The same, with estimates for V counted twice."""
        pairs = self.from_size(least / 2)
        ranks = {pair: float(self.by_edge[pair].mean(1).abs().max()) for pair in pairs}
        ranks = {pair: size * (1 + (targets[pair[1]][0].kind == "v")) for pair, size in ranks.items()}
        return [pair for pair in sorted(pairs, key=lambda pair: -ranks[pair]) if ranks[pair] >= least]


def expected_passes(
    info: ModelInfo,
    length: int,
    rows: int,
    screening_rows: int,
    budget: float,
    heads: bool,
    kinds: Collection[str] = ("v", "mlp"),
) -> float:
    """About how many passes over one row of `length` tokens a search takes that spends all of its budget.

    Args:
        rows, screening_rows: of the prompts, and of those that are screened.
        budget: passes over the prompts for exact runs.
        heads: whether single heads send; their blocks then send as groups first.
        kinds: the receivers that are screened by rows of one token.
    """
    layers = info.layers
    senders = 1 + layers * (2 + (info.heads if heads else 0))
    few = screening_rows < rows
    # One run without a gradient, and one with it at each point.
    clean = (1 + POINTS * WITH_GRADIENT) * (screening_rows + rows * few)
    read = screening_rows * (senders + 1) / length
    # By receiver: the senders below it, each a row of one token through the blocks above.
    coarse = sum(
        (1 + 2 * layer + (kind == "mlp")) * (layers - layer) / layers for layer in range(layers) for kind in kinds
    )
    # Members of groups, and what few rows leave to be estimated again, come on top.
    return clean + read + 1.5 * screening_rows * coarse / length + rows * (1 + budget)


Targets = Mapping[str, tuple[Receiver, ...]]
"""Receivers by name; more than one for a set."""


def _check_targets(targets: Targets) -> None:
    for name, members in targets.items():
        kinds = {member.kind for member in members}
        if len(kinds) != 1 or not kinds <= {"q", "k", "v", "mlp"} or (len(members) > 1 and not kinds <= {"k", "v"}):
            raise InterventionError(
                f"{name} holds inputs of kinds {sorted(kinds)}; expected Q, K or V of heads, an MLP, or a set whose "
                "members are K, or all V"
            )


@dataclass(eq=False)
class _Exact:
    """Step 6: edges patched each in a run of its own, on all rows, while the budget of passes lasts."""

    model: Any
    prompts: PromptSet
    metric: Metric
    nodes: Sequence[Node]
    values: Mapping[Node, Tensor]
    targets: Targets
    budget: float
    spent: float = 0.0
    effects: dict[Pair, Float[Tensor, " batch"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device = device_of(self.model)
        parts = (self.prompts.ids, self.prompts.attention_mask, self.prompts.p0)
        self.rows = Rows(*(part.to(device) for part in parts))
        end = self.metric.end(self.model)
        self.below = dict(clean_streams(self.model, self.rows, self.metric, range(end + 1)))
        self.clean = self.metric.value(self.below[end][1])

    def cost(self, pair: Pair | None) -> float:
        """The passes of an edge, from its first receiver to the metric's last block; None: of half of the blocks."""
        end, layers = self.metric.end(self.model), describe(self.model).layers
        start = end / 2 if pair is None else min(member.layer for member in self.targets[pair[1]])
        return max(0.0, end - start) / layers

    def run(self, pairs: Sequence[Pair], reserve: float, at_least: int = 0) -> list[Pair]:
        """Patch those that were not patched yet, in their order, until no more than `reserve` of the budget is left."""
        chosen = []
        for pair in pairs:
            if pair in self.effects:
                continue
            cost = self.cost(pair)
            if self.spent + cost > self.budget - reserve and len(chosen) >= at_least:
                break
            self.spent += cost
            chosen.append(pair)
        if not chosen:
            return []
        used = [node for node in self.nodes if any(node == sender for sender, _ in chosen)]
        end = 1 + max(member.layer for _, name in chosen for member in self.targets[name])
        tokens = self.rows.ids[torch.arange(self.prompts.n, device=self.rows.place.device), self.rows.place]
        inputs = read_at_p0(self.model, tokens, used, self.values, end)
        variants = [_variant(inputs, 1 + used.index(sender), self.targets[name]) for sender, name in chosen]
        return_freed_memory()
        effects = measure_inputs(self.model, self.rows, self.metric, variants, self.below) - self.clean
        self.effects |= dict(zip(chosen, effects.cpu(), strict=True))
        return chosen


def _variant(inputs: InputsAtP0, slot: int, members: Sequence[Receiver]) -> Variant:
    """What a sender leads to at each member of a receiver, as patches of one run."""
    patches = []
    for member in members:
        if member.kind == "k":
            new = inputs.key[slot, :, member.layer]
        elif member.kind == "v":
            new = inputs.value[slot, :, member.layer] - inputs.value[0, :, member.layer]
        else:
            new = inputs.mlp[slot, :, member.layer]
        patches.append(InputPatch(member.kind, member.layer, member.heads, new))  # pyright: ignore[reportArgumentType]
    return patches


@dataclass(eq=False)
class _Layer:
    """What the clean run of the screening rows gives in one block: steps 1 and 4."""

    side: QueryScores
    later: Float[Tensor, "batch query"]
    """1 at real positions after P0."""
    counted: Float[Tensor, " head"]
    """What each head's sink score counts in the metric."""
    slope: Float[Tensor, "point batch query head d_head"]
    """The gradient of the metric by z."""
    others: Float[Tensor, "point batch head query"]
    """The slope along what each query reads from the keys other than P0, at full weight."""
    attention: Float[Tensor, "batch head query"]
    """Clean attention to P0."""
    clean: Float[Tensor, "batch head"]
    """Clean sink scores."""
    along_value: Float[Tensor, "point batch head query"]
    """The slope along P0's clean value."""

    def effect(
        self, key: Float[Tensor, "slot batch kv_head d_head"], value: Float[Tensor, "slot batch kv_head d_head"] | None
    ) -> Float[Tensor, "slot point batch head"]:
        """The estimated change of the metric by head with new keys (and values) of P0; a head's own score is exact."""
        side = self.side
        attention = attention_from_score(side.form.score(side.query, key) + side.rest, side.others, side.visible)
        slots = len(key)
        own = mean_over_queries(attention.flatten(0, 1), side.p0.repeat(slots), repeated(side.mask, slots))
        along = self.along_value
        if value is not None:
            value = value.repeat_interleave(self.slope.shape[3] // value.shape[2], dim=2)
            along = torch.einsum("pbqhd,sbhd->spbhq", self.slope, value)
        attention = attention[:, None]
        read = attention * along + (1 - attention) * self.others
        before = self.attention * self.along_value + (1 - self.attention) * self.others
        passed_on = ((read - before) * self.later[:, None]).sum(-1)
        return ((by_slot(own, slots) - self.clean) * self.counted)[:, None] + passed_on


@dataclass(eq=False)
class _Screen:
    """Steps 1 to 5 on the screening rows."""

    model: Any
    info: ModelInfo
    nodes: Sequence[Node]
    inputs: InputsAtP0
    layers: dict[int, _Layer]
    slope_mlp: Float[Tensor, "point batch layer d_model"]
    """The gradient of the metric by the MLP outputs at P0."""
    least: float
    """Estimates from here on are pursued."""
    groups: dict[int, Node]
    """By layer, all heads that send from it as one sender."""
    senders: list[Node]
    """`nodes`, then the groups: slot 1 + i of `inputs` belongs to sender i."""
    single: int = 0
    """One-token variants that were run."""
    group_sizes: dict[Pair, float] = field(default_factory=dict)
    """By member edge, the size of its group's larger mean estimate."""

    @classmethod
    def of(
        cls,
        model: Any,
        prompts: PromptSet,
        nodes: Sequence[Node],
        values: Mapping[Node, Tensor],
        heads: Sequence[tuple[int, int]],
        least: float,
    ) -> _Screen:
        info, device = describe(model), device_of(model)
        end = 1 + max(layer for layer, _ in heads)
        rows = Rows(*(part.to(device) for part in (prompts.ids, prompts.attention_mask, prompts.p0)))
        tokens = rows.ids[torch.arange(prompts.n, device=device), rows.place]
        sending: dict[int, list[Node]] = {}
        for node in nodes:
            if node.kind == "head":
                sending.setdefault(node.layer, []).append(node)
        together = _attention_outputs(model, tokens, sending, values)
        groups = {layer: Node("attn", layer) for layer in together}
        senders = [*nodes, *groups.values()]
        every = {**values, **{groups[layer]: value for layer, value in together.items()}}
        inputs = read_at_p0(model, tokens, senders, every, end)
        values_together = _values_together(model, tokens, nodes, values, end)
        layers, slope_mlp = _clean_side(model, prompts, rows, heads, end, values_together)
        return cls(model, info, nodes, inputs, layers, slope_mlp, least, groups, senders, len(senders))

    def estimates(
        self, targets: Targets, only: Collection[Pair] | None = None
    ) -> dict[tuple[Node, str], Float[Tensor, "point batch"]]:
        """The estimates of every edge that can have an effect, or of some of them."""
        inputs, layers = self.inputs, self.layers
        # Step 4, for all senders, blocks and heads; where a sender comes later the key is the clean one.
        keys = {layer: side.effect(inputs.key[1:, :, layer], None) for layer, side in layers.items()}
        changes = inputs.value[1:] - inputs.value[0]
        first_v, first_mlp = {}, {}
        for layer, side in layers.items():
            weighted = torch.einsum("pbqhd,bhq->pbhd", side.slope, side.attention)
            change = changes[:, :, layer].repeat_interleave(self.info.heads // self.info.kv_heads, dim=2)
            first_v[layer] = torch.einsum("pbhd,sbhd->spbh", weighted, change)
            move = inputs.mlp[1:, :, layer] - inputs.mlp[0, :, layer]
            first_mlp[layer] = torch.einsum("pbd,sbd->spb", self.slope_mlp[:, :, layer], move)

        number = {node: place for place, node in enumerate(self.nodes)}
        estimates: dict[tuple[Node, str], Tensor] = {}
        singles: list[tuple[int, Receiver]] = []
        groups: dict[tuple[Node, tuple[str, int]], list[tuple[Node, str]]] = {}
        for name, members in targets.items():
            kind = members[0].kind
            for node in self.nodes:
                reached = [m for m in members if m.hears(node, self.info) and m.layer in layers]
                # Q at P0 has no effect, nor has anything that no sink head comes after.
                if kind == "q" or not reached:
                    continue
                if only is not None and (node, name) not in only:
                    continue
                slot, total = number[node], torch.zeros(POINTS, inputs.key.shape[1], device=inputs.key.device)
                for member in reached:
                    if kind == "k":
                        total = total + keys[member.layer][slot][..., list(member.heads)].sum(-1)
                    elif kind == "v":
                        total = total + first_v[member.layer][slot][..., list(member.heads)].sum(-1)
                    else:
                        total = total + first_mlp[member.layer][slot]
                estimates[node, name] = total
                if kind in ("v", "mlp") and len(members) == 1 and reached:
                    group = self.groups.get(node.layer, node) if node.kind == "head" else node
                    groups.setdefault((group, (kind, members[0].layer)), []).append((node, name))
        if only is not None:
            asked = [pair for edges in groups.values() for pair in edges]
            place = {node: slot for slot, node in enumerate(self.nodes)}
            singles = [(place[node], targets[name][0]) for node, name in asked]
            return estimates | dict(zip(asked, self._through_p0(singles, changes), strict=True))
        # Step 5: groups first.
        place = {node: slot for slot, node in enumerate(self.senders)}
        heads_of: dict[tuple[str, int], set[int]] = {}
        for _, members in targets.items():
            if len(members) == 1:
                heads_of.setdefault((members[0].kind, members[0].layer), set()).update(members[0].heads)
        coarse = [
            (group, Receiver(kind, layer, tuple(sorted(heads_of[kind, layer])), f"{kind}.{layer}"))  # pyright: ignore[reportArgumentType]
            for group, (kind, layer) in groups
        ]
        by_group = self._through_p0([(place[group], receiver) for group, receiver in coarse], changes)
        pursued: list[tuple[Node, str]] = []
        for (group, receiver), key, estimate in zip(coarse, groups, by_group, strict=True):
            edges = groups[key]
            if len(edges) == 1 and edges[0][0] == group and targets[edges[0][1]][0].heads == receiver.heads:
                estimates[edges[0]] = estimate
                continue
            net = sum(float(estimates[edge].mean(1).abs().max()) for edge in edges)
            size = max(float(estimate.mean(1).abs().max()), net)
            self.group_sizes |= dict.fromkeys(edges, size)
            if size >= self.least:
                pursued += edges
        singles = [(place[node], targets[name][0]) for node, name in pursued]
        estimates |= dict(zip(pursued, self._through_p0(singles, changes), strict=True))
        return estimates

    def members_of(self, least: float) -> list[Pair]:
        """The edges whose group has at least this size."""
        return [pair for pair, size in self.group_sizes.items() if size >= least]

    def _through_p0(
        self, edges: Sequence[tuple[int, Receiver]], changes: Float[Tensor, "slot batch layer kv_head d_head"]
    ) -> list[Float[Tensor, "point batch"]]:
        """The estimates of edges into V and MLPs: P0's stream runs on from the receiver, every later key is scored."""
        inputs, batch, end = self.inputs, self.inputs.key.shape[1], max(self.layers, default=-1) + 1
        self.single += len(edges)
        estimates: dict[int, Tensor] = {}
        per_pass = max(1, ROWS_AT_ONCE // batch)
        for layer in sorted({receiver.layer for _, receiver in edges}):
            mine = [number for number, (_, receiver) in enumerate(edges) if receiver.layer == layer]
            for start in range(0, len(mine), per_pass):
                some = mine[start : start + per_pass]
                total = torch.zeros(len(some), POINTS, batch, device=inputs.key.device)
                for slot, number in enumerate(some):
                    sender, receiver = edges[number]
                    if receiver.kind == "v" and layer in self.layers:
                        # What later positions read of P0's new value, with its old key.
                        total[slot] = self._read_value(layer, receiver.heads, changes[sender, :, layer])
                keys, values = self._stream_from(layer, [edges[number] for number in some], changes, end)
                for later in range(layer + 1, end):
                    total += self.layers[later].effect(keys[later], values[later]).sum(-1)
                estimates |= dict(zip(some, total, strict=True))
        return [estimates[number] for number in range(len(edges))]

    def _read_value(self, layer: int, heads: Sequence[int], change: Tensor) -> Float[Tensor, "point batch"]:
        side = self.layers[layer]
        change = change.repeat_interleave(self.info.heads // self.info.kv_heads, dim=1)
        along = torch.einsum("pbqhd,bhd->pbhq", side.slope, change) * side.attention * side.later[:, None]
        return along[:, :, list(heads)].sum((2, 3))

    def _stream_from(
        self, layer: int, edges: Sequence[tuple[int, Receiver]], changes: Tensor, end: int
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Keys and values of P0 above a block in which each edge's receiver has its new input."""
        inputs, batch, slots = self.inputs, self.inputs.key.shape[1], len(edges)
        keys: dict[int, Tensor] = {}
        values: dict[int, Tensor] = {}

        def put_mlp(activation: Tensor, hook: Any) -> Tensor:
            changed = activation.clone()
            for slot, (sender, receiver) in enumerate(edges):
                if receiver.kind == "mlp":
                    changed[slot * batch : (slot + 1) * batch, 0] = inputs.mlp[1 + sender, :, layer].to(changed)
            return changed

        def put_value(z: Tensor, hook: Any) -> Tensor:
            changed = z.clone()
            group = z.shape[2] // changes.shape[3]
            for slot, (sender, receiver) in enumerate(edges):
                if receiver.kind == "v":
                    for head in receiver.heads:
                        # P0 attends to itself alone: what a head reads there is its value.
                        changed[slot * batch : (slot + 1) * batch, 0, head] += changes[sender, :, layer, head // group]
            return changed

        def note(activation: Tensor, hook: Any, into: dict[int, Tensor], at: int) -> None:
            into[at] = by_slot(activation[:, 0], slots).clone()

        if layer + 1 >= end:
            return keys, values
        hooks: list[Hook] = []
        kinds = {receiver.kind for _, receiver in edges}
        if "mlp" in kinds:
            hooks.append((Node("mlp", layer).hook, put_mlp))
        if "v" in kinds:
            hooks.append((f"blocks.{layer}.attn.hook_z", put_value))
        for later in range(layer + 1, end):
            hooks.append((key_hook(self.model, later), functools.partial(note, into=keys, at=later)))
            hooks.append((f"blocks.{later}.attn.hook_v", functools.partial(note, into=values, at=later)))
        stream = repeated(inputs.stream[:, layer, None], slots)
        resume(self.model, stream, layer, hooks=hooks, stop_at_layer=end)
        return keys, values


def _attention_outputs(
    model: Any, tokens: Int[Tensor, " batch"], sending: Mapping[int, Sequence[Node]], values: Mapping[Node, Tensor]
) -> dict[int, Float[Tensor, "batch d_model"]]:
    """What the attention of each block writes at P0 when all of its sending heads have their new values at once."""
    outputs: dict[int, Tensor] = {}
    if not sending:
        return outputs
    place = torch.zeros_like(tokens)

    def put(z: Tensor, hook: Any, nodes: Sequence[Node]) -> Tensor:
        changed = z.clone()
        for node in nodes:
            node.put(changed, place, values[node])
        return changed

    def read(out: Tensor, hook: Any, layer: int) -> None:
        outputs[layer] = out[:, 0].clone()

    hooks: list[Hook] = []
    for layer, nodes in sending.items():
        hooks.append((nodes[0].hook, functools.partial(put, nodes=nodes)))
        hooks.append((Node("attn", layer).hook, functools.partial(read, layer=layer)))
    with torch.no_grad():
        forward(model, tokens[:, None], hooks=hooks, stop_at_layer=max(sending) + 1)
    return outputs


def _values_together(
    model: Any, tokens: Int[Tensor, " batch"], nodes: Sequence[Node], values: Mapping[Node, Tensor], end: int
) -> dict[int, Float[Tensor, "batch kv_head d_head"]]:
    """P0's value in every block when all senders have their new values at once."""
    read: dict[int, Tensor] = {}
    place = torch.zeros_like(tokens)
    by_hook: dict[str, list[Node]] = {}
    for node in nodes:
        by_hook.setdefault(node.hook, []).append(node)

    def put(activation: Tensor, hook: Any, some: Sequence[Node]) -> Tensor:
        changed = activation.clone()
        for node in some:
            node.put(changed, place, values[node])
        return changed

    def note(value: Tensor, hook: Any, layer: int) -> None:
        read[layer] = value[:, 0].clone()

    hooks: list[Hook] = [(name, functools.partial(put, some=some)) for name, some in by_hook.items()]
    hooks += [(f"blocks.{layer}.attn.hook_v", functools.partial(note, layer=layer)) for layer in range(end)]
    with torch.no_grad():
        forward(model, tokens[:, None], hooks=hooks, stop_at_layer=end)
    return read


def _clean_side(
    model: Any,
    prompts: PromptSet,
    rows: Rows,
    heads: Sequence[tuple[int, int]],
    end: int,
    together: Mapping[int, Float[Tensor, "batch kv_head d_head"]],
) -> tuple[dict[int, _Layer], Float[Tensor, "point batch layer d_model"]]:
    """Step 1: one run for queries, scores and values, and two with gradients."""
    info = describe(model)
    index = torch.arange(prompts.n, device=rows.place.device)
    mixed: dict[int, Tensor] = {}
    at_p0: dict[int, Tensor] = {}
    attention: dict[int, Tensor] = {}

    def read_value(value: Tensor, hook: Any, layer: int) -> None:
        at_p0[layer] = value[index, rows.place].clone()
        mixed[layer] = value

    def read_pattern(pattern: Tensor, hook: Any, layer: int) -> None:
        attention[layer] = pattern[index, :, :, rows.place].clone()
        rest = pattern.clone()
        rest[index, :, :, rows.place] = 0
        values = mixed[layer].repeat_interleave(info.heads // info.kv_heads, dim=2)
        whole = rest.sum(-1, keepdim=True).clamp(min=torch.finfo(rest.dtype).tiny)
        # Normalised: what is read if P0 is given nothing. A query that sees P0 alone reads nothing else.
        mixed[layer] = torch.einsum("bhqk,bkhd->bqhd", rest / whole, values)

    hooks: list[Hook] = []
    for layer in range(end):
        hooks.append((f"blocks.{layer}.attn.hook_v", functools.partial(read_value, layer=layer)))
        hooks.append((f"blocks.{layer}.attn.hook_pattern", functools.partial(read_pattern, layer=layer)))
    sides = query_side(model, prompts, hooks=hooks, layers=end)
    halfway = {layer: (together[layer] - value) / 2 for layer, value in at_p0.items()}
    unmoved, moved = (_slopes(model, rows, heads, end, moves) for moves in ({}, halfway))
    slopes = [torch.stack(pair) for pair in zip(unmoved[0], moved[0], strict=True)]
    slope_mlp = torch.stack([unmoved[1], moved[1]])
    position = torch.arange(prompts.length, device=rows.place.device)
    later = ((position > rows.place[:, None]) & rows.mask).to(slopes[0])
    layers = {}
    for layer, side in sides.items():
        counted = torch.zeros(info.heads, device=rows.place.device)
        for head in (head for at, head in heads if at == layer):
            counted[head] += 1 / len(heads)
        value = at_p0[layer].repeat_interleave(info.heads // info.kv_heads, dim=1)
        layers[layer] = _Layer(
            side,
            later,
            counted,
            slopes[layer],
            torch.einsum("pbqhd,bqhd->pbhq", slopes[layer], mixed[layer]),
            attention[layer],
            mean_over_queries(attention[layer], rows.place, rows.mask),
            torch.einsum("pbqhd,bhd->pbhq", slopes[layer], value),
        )
    return layers, slope_mlp


def _slopes(
    model: Any,
    rows: Rows,
    heads: Sequence[tuple[int, int]],
    end: int,
    moves: Mapping[int, Float[Tensor, "batch kv_head d_head"]],
) -> tuple[list[Float[Tensor, "batch query head d_head"]], Float[Tensor, "batch layer d_model"]]:
    """The gradient of the metric by z of every block and by its MLP's output at P0, with P0's values moved."""
    metric, info = sink_score_of(heads), describe(model)
    # By block and part; what lies above the metric's last reading has no slope.
    z: dict[int, list[Tensor]] = {layer: [] for layer in range(end)}
    mlp: dict[int, list[Tensor]] = {layer: [] for layer in range(end)}
    with torch.inference_mode(False), torch.enable_grad():
        for some in torch.arange(len(rows.ids), device=rows.ids.device).split(
            rows_with_gradients(info, rows.ids.shape[1])
        ):
            here = Rows(*(part[some] for part in rows))
            at_place = (torch.arange(len(some), device=some.device), here.place)
            added: dict[str, Tensor] = {}
            readings: dict[int, Tensor] = {}

            def enter(activation: Tensor, hook: Any, name: str, added: dict[str, Tensor] = added) -> Tensor:
                added[name] = torch.zeros_like(activation, requires_grad=True)
                return activation + added[name]

            def move(value: Tensor, hook: Any, by: Tensor, at_place: Any = at_place) -> Tensor:
                return value.index_put(at_place, by.to(value), accumulate=True)

            hooks: list[Hook] = [
                (f"blocks.{layer}.attn.hook_v", functools.partial(move, by=by[some])) for layer, by in moves.items()
            ]
            names = [f"blocks.{layer}.{part}" for layer in range(end) for part in ("attn.hook_z", "hook_mlp_out")]
            hooks += [(name, functools.partial(enter, name=name)) for name in names]
            with contextlib.suppress(Complete):
                forward(model, here.ids, here.mask, hooks=[*hooks, *reading_hooks(metric, here, readings)])
            total = metric.value(readings).sum()
            slope_of: dict[str, Tensor] = {}
            if added and total.requires_grad:
                slopes = torch.autograd.grad(total, list(added.values()), allow_unused=True, materialize_grads=True)
                slope_of = dict(zip(added, slopes, strict=True))
            shape = (*here.ids.shape, info.heads, info.head_size)
            for layer in range(end):
                slope = slope_of.get(f"blocks.{layer}.attn.hook_z")
                z[layer].append(total.new_zeros(shape) if slope is None else slope)
                slope = slope_of.get(f"blocks.{layer}.hook_mlp_out")
                mlp[layer].append(total.new_zeros(len(some), info.d_model) if slope is None else slope[at_place])
            # The graph of a backward pass is many small tensors, whose pages the allocator would keep.
            del added, readings, total, slope_of
            return_freed_memory()
    return (
        [torch.cat(z[layer]).detach() for layer in range(end)],
        torch.stack([torch.cat(mlp[layer]).detach() for layer in range(end)], dim=1),
    )
