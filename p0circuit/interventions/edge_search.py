"""A search for every edge at P0 whose effect on the sink reaches a threshold, for a small part of one pass per edge.

The metric is the mean sink score of some heads. What makes the search cheap: whatever stays in P0's own stream is a
computation on rows of one token, and the effect of a new key of P0 on a head's attention is `sigmoid(s_t - Z_t)`.

1. *Clean run*, on the first or all rows: queries, scores and values, and the gradient of the metric by what every head
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
of their members'. Exhaustive search is `path_patching.patch_edges`; the tests compare the two.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.batched_runs import check_value
from p0circuit.interventions.edge_effects import Edge, PathEffects
from p0circuit.interventions.edge_estimates import EdgeEstimates, EdgeEstimator
from p0circuit.interventions.edge_gradients import POINTS
from p0circuit.interventions.edge_search_result import EdgeSearch
from p0circuit.interventions.exact_edges import ExactEdges
from p0circuit.interventions.metrics import sink_score_of
from p0circuit.interventions.nodes import InterventionError, Node, nodes_of
from p0circuit.interventions.receivers import NodeEdge, Receiver, check_targets
from p0circuit.models import ModelInfo, describe
from p0circuit.models.passes import WITH_GRADIENT
from p0circuit.prompts import PromptSet

SAFETY_OF_FEW_ROWS = 8.0
"""Factor below the threshold at which estimates from a few rows leave an edge out."""
SAFETY = 2.0
"""Factor within which an estimate is trusted to be of the exact effect, if it leaves an edge out."""


@torch.no_grad()
def search_edges(
    model: HookedModel,
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
        model: a hooked model.
        prompts: the clean prompts.
        senders: embedding, attention outputs, their heads, MLPs.
        receivers: Q, K or V of heads or of groups of heads, and MLPs.
        values: new values of the senders at P0, as `pairs.patch_values` returns them.
        heads: (layer, head) of the sink heads; the metric is their mean sink score.
        threshold: smallest size of a mean effect.
        sets: sets of receivers by name, all K or all V, that are patched together.
        screening_rows: number of rows, the first ones, that are used for the first estimates; all if None.
        safety: edges are left out if their estimate is below `threshold / safety`.
        members: whether the single heads of a group are receivers if an edge into the group reaches the threshold.
        sample: number of edges, at random among those left out, that are patched exactly as well.
        budget: passes over the prompts for exact runs; what is left of it makes the sample larger. No limit if None.
        seed: seed of the random sample.

    Returns:
        Estimates of all edges, and exact effects of the strongest.

    Raises:
        InterventionError: a name, value, threshold or number that does not fit.
        NotOfTheClosedForm: the model's attention is of another kind; use `path_patching.patch_edges`.
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
    check_targets(targets)
    metric = sink_score_of(heads).check(model)
    exact = ExactEdges(model, prompts, metric, nodes, values, targets, math.inf if budget is None else budget)
    least, number = threshold / safety, prompts.n if screening_rows is None else max(1, screening_rows)
    if from_few_rows := number < prompts.n:
        rows = slice(0, number)
        first_values = {node: values[node][rows] for node in nodes}
        first = EdgeEstimator.of(
            model, prompts.subset(rows), nodes, first_values, heads, threshold / SAFETY_OF_FEW_ROWS
        )
        estimates = EdgeEstimates(first.estimates(targets))
        again = {*estimates.from_size(threshold / SAFETY_OF_FEW_ROWS), *first.members_of(least)}
        estimator = first
        if again:
            sending = {sender for sender, _ in again}
            estimator = EdgeEstimator.of(
                model, prompts, [node for node in nodes if node in sending], values, heads, least
            )
            estimator.one_token_variants += first.one_token_variants
            estimates.update(estimator.estimates(targets, again))
    else:
        estimator = EdgeEstimator.of(model, prompts, nodes, values, heads, least)
        estimates = EdgeEstimates(estimator.estimates(targets))

    passing = estimates.from_rank(least, targets)
    # A random sample, and the members of groups, need a part of the budget.
    reserve = sample * exact.cost(None) + (exact.budget / 4 if members and budget is not None else 0)
    exact.run(passing, reserve)
    if members:
        finer: set[NodeEdge] = set()
        for (node, name), effect in exact.effects.items():
            group, *others = targets[name]
            if others or len(group.heads) < 2 or abs(float(effect.double().mean())) < threshold:
                continue
            for head in group.heads:
                member = f"attn.{group.layer}.{head}.{group.kind}"
                targets[member] = (Receiver.parse(member, info),)
                if (node, member) not in estimates.by_edge:
                    finer.add((node, member))
        estimates.update(estimator.estimates({name: targets[name] for _, name in finer}, finer))
        passing += [pair for pair in estimates.from_rank(least, targets) if pair in finer]
        exact.run(passing, sample * exact.cost(None))
    left = [pair for pair in estimates.by_edge if pair not in {*passing}]
    generator = torch.Generator().manual_seed(seed)
    order = [left[number] for number in torch.randperm(len(left), generator=generator).tolist()]
    sampled = exact.run(order if budget is not None else order[:sample], 0.0, at_least=min(sample, len(order)))
    clean, pairs = exact.clean.cpu(), list(exact.effects)
    effects = torch.stack([exact.effects[pair] for pair in pairs]) if pairs else torch.zeros(0, prompts.n)
    last = metric.end(model) - 1
    without = sum(
        any(part.comes_after(node, info) for part in parts)
        and (parts[0].kind == "q" or all(part.layer > last for part in parts if part.comes_after(node, info)))
        for node in nodes
        for parts in targets.values()
    )
    return EdgeSearch(
        threshold,
        tuple(map(_named, estimates.by_edge)),
        torch.tensor([float(both.mean()) for both in estimates.by_edge.values()], dtype=torch.float64),
        None
        if from_few_rows or not estimates.by_edge
        else torch.stack([e.mean(0).cpu() for e in estimates.by_edge.values()]),
        PathEffects(tuple(map(_named, pairs)), clean, clean + effects, metric.name, "direct"),
        frozenset(map(_named, sampled)),
        tuple(_named(pair) for pair in passing if pair not in exact.effects),
        without,
        {"one-token": estimator.one_token_variants, "exact": len(pairs)},
    )


def expected_passes(
    info: ModelInfo,
    length: int,
    rows: int,
    screening_rows: int,
    budget: float,
    heads: bool,
    kinds: Collection[str] = ("v", "mlp"),
) -> float:
    """Estimate the passes over one row that a search takes which spends all of its budget.

    Args:
        info: description of the model.
        length: tokens of a row.
        rows: number of rows.
        screening_rows: number of rows that are used for the first estimates.
        budget: passes over the prompts for exact runs.
        heads: whether single heads send; their blocks then send as groups first.
        kinds: kinds of receivers whose estimates need rows of one token.
    """
    layers = info.n_layers
    senders = 1 + layers * (2 + (info.n_heads if heads else 0))
    again = screening_rows < rows
    # One run without a gradient, and one with it at each point.
    clean = (1 + POINTS * WITH_GRADIENT) * (screening_rows + rows * again)
    read = screening_rows * (senders + 1) / length
    # By receiver: the senders below it, each a row of one token through the blocks above.
    coarse = sum(
        (1 + 2 * layer + (kind == "mlp")) * (layers - layer) / layers for layer in range(layers) for kind in kinds
    )
    # Members of groups, and what has to be estimated again on all rows, come on top.
    return clean + read + 1.5 * screening_rows * coarse / length + rows * (1 + budget)


def _named(pair: NodeEdge) -> Edge:
    return str(pair[0]), pair[1]
