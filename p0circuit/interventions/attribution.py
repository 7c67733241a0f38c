"""Attribution patching: estimate what patching every head and neuron at P0 would do, from gradients, and check it.

An exact patch costs a forward pass for each node; a model has ten thousands of neurons. The gradient of the metric
gives a first-order estimate for all of them from one forward and one backward pass:

1. In a run of the prompts, zeros are added at P0 to what every node computes. The gradient of the metric by these
   zeros says how it answers to a small change of each node, everything computed later being free to follow.
2. The estimate for a node is that gradient times (replacement - clean value).
3. With `steps`, gradients are taken all along the way to the replacement (integrated gradients). The nodes of a *set*
   go this way together, all others being free: the heads of a layer are a set, its neurons, and each component alone.
   The change of the metric in each step is known from its two ends. A node gets the mean of its first-order estimates
   there, and what these miss of the change together is dealt out in proportion to their sizes.
4. `attribute_and_check` patches the strongest nodes of the estimate exactly, and a random sample of the others, and
   states the error of the estimate.

What estimates are good for. The gradient is right for small patch_values: its error is of second order in their size.
Sinks are about the worst case for it, because norms and softmax saturate: where P0's norm is far above what heads
need, gradients are near zero although the replacement would end the sink. Estimates may still come in the right order
then, but their sizes mean nothing. Nor does a gradient see what jumps: P0 sent to another expert, or over a kink.

Integrated gradients are complete, for any number of steps: the estimates for a set add up to the exact effect of
replacing *the set together* (but for steps at both ends of which all its gradients are zero: nobody can be given that
change). For a component that is its own effect. Nothing of the kind holds across sets, whose effects overlap. Nor for
one node of a set: two heads that are both necessary share their common effect, although patching either has all of it,
and small effects suffer from the large ones that move along. So: the plain gradient to find nodes, steps to size them.

Source: Nanda 2023 (attribution patching), Syed et al. 2023 (arXiv 2310.10348); where it fails, and sampling the rest,
Kramár et al. 2024 (arXiv 2403.00745); integrated gradients, Sundararajan et al. 2017 (arXiv 1703.01365), along one
component at a time as in Marks et al. 2024 (arXiv 2403.19647); dealing out what the steps miss is our own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.activation_patching import Patch, patch_grid
from p0circuit.interventions.batched_runs import check_value
from p0circuit.interventions.effects import node_table
from p0circuit.interventions.metrics import Complete, Metric, Rows, read_logits, reading_hooks
from p0circuit.interventions.nodes import InterventionError, Kind, Node, nodes_of
from p0circuit.interventions.pairs import PromptPair, Reference, patch_values
from p0circuit.models import ModelInfo, describe, device_of, forward
from p0circuit.models.hooks import Hook
from p0circuit.prompts import PromptSet
from p0circuit.recording.batch_size import BATCH_BYTES

if TYPE_CHECKING:
    import pandas as pd

Among = Literal["all", "top", "rest"]


@dataclass(frozen=True, eq=False)
class Attribution:
    """Estimated effects of patching nodes at P0, from gradients.

    Attributes:
        metric: name of the metric; estimates are in its units.
        nodes: the nodes, in the order of the first axis of `estimate`.
        steps: steps of integrated gradients; 0 for the gradient of the clean run.
        clean: metric of each row in the clean run.
        estimate: estimated change of the metric of each row.
    """

    metric: str
    nodes: tuple[Node, ...]
    steps: int
    clean: Float[Tensor, " batch"]
    estimate: Float[Tensor, "node batch"]

    @property
    def mean(self) -> Float[Tensor, " node"]:
        """Estimate for each node, mean over rows."""
        return self.estimate.double().mean(1)

    @property
    def order(self) -> Int[Tensor, " node"]:
        """Numbers of the nodes, by the size of their mean estimates, the largest first."""
        return self.mean.abs().argsort(descending=True, stable=True)

    def to_dataframe(self) -> pd.DataFrame:
        """Tabulate the nodes in their order.

        Returns:
            Data frame with the columns node, component, layer, index and estimate (mean over rows).
        """
        return node_table(self.nodes).assign(estimate=self.mean.numpy())


@dataclass(frozen=True)
class Agreement:
    """Agreement of estimates with exact patching over several nodes, of means over rows.

    Attributes:
        nodes: number of nodes that were patched exactly.
        pearson: correlation of estimate and exact effect, signs included; NaN if one of them is constant.
        spearman: rank correlation of the same.
        mean_abs_error: mean size of the error of the estimates, in units of the metric.
        mean_abs_effect: mean size of the exact effects, for scale: estimates that are all zero have this error.
    """

    nodes: int
    pearson: float
    spearman: float
    mean_abs_error: float
    mean_abs_effect: float


@dataclass(frozen=True, eq=False)
class CheckedAttribution:
    """Estimates for all nodes, and exact effects of the strongest of them and of a random sample of the rest.

    Attributes:
        attribution: the estimates.
        checked: numbers, in `attribution.nodes`, of the nodes patched exactly: strongest first, then the sample.
        top: number of the strongest among them.
        exact: change of the metric of each row with each of the checked nodes patched.
    """

    attribution: Attribution
    checked: Int[Tensor, " checked"]
    top: int
    exact: Float[Tensor, "checked batch"]

    def agreement(self, among: Among = "all") -> Agreement:
        """Compare estimates with exact effects.

        Args:
            among: "top" for the strongest nodes, "rest" for the random sample of the others, "all" for both; then a
                node of the sample counts for as many as it stands for.

        Raises:
            InterventionError: there is no such group, or no node in it.
        """
        if among not in get_args(Among):
            raise InterventionError(f"there is no group {among!r}; expected 'all', 'top' or 'rest'")
        weights = self._weights * {"all": 1, "top": self._is_top, "rest": ~self._is_top}[among]
        if not weights.any():
            raise InterventionError("no node is left beside the top ones: all have been patched exactly")
        estimate, exact = self.attribution.mean[self.checked].numpy(), self.exact.double().mean(1).numpy()
        return Agreement(
            nodes=int((weights > 0).sum()),
            pearson=_correlation(estimate, exact, weights),
            spearman=_correlation(_ranks(estimate, weights), _ranks(exact, weights), weights),
            mean_abs_error=float(np.average(abs(estimate - exact), weights=weights)),
            mean_abs_effect=float(np.average(abs(exact), weights=weights)),
        )

    def recall(self, k: int | None = None) -> float:
        """Compute the share of the nodes with the largest exact effects that are among the top ones of the estimate.

        It is exact if all nodes were checked; otherwise nodes of the sample count for as many as they stand for.

        Args:
            k: number of nodes with the largest exact effects; `top` if None.

        Raises:
            InterventionError: `k` is not a number of nodes.
        """
        k, nodes = self.top if k is None else k, len(self.attribution.nodes)
        if not 1 <= k <= nodes:
            raise InterventionError(f"there is no recall of the {k} strongest of {nodes} nodes; expected 1 to {nodes}")
        order = self.exact.double().mean(1).abs().argsort(descending=True, stable=True).numpy()
        weights = self._weights[order]
        counted = (k - weights.cumsum() + weights).clip(0, weights)
        return float((counted * self._is_top[order]).sum() / k)

    def to_dataframe(self) -> pd.DataFrame:
        """Tabulate the checked nodes, the largest exact effect first.

        Returns:
            Data frame with the columns node, component, layer, index, estimate, exact, error and top (whether it is one
            of the strongest).
        """
        table = node_table([self.attribution.nodes[number] for number in self.checked])
        table["estimate"] = self.attribution.mean[self.checked].numpy()
        table["exact"] = self.exact.double().mean(1).numpy()
        table["error"] = table["estimate"] - table["exact"]
        table["top"] = self._is_top
        return table.sort_values("exact", key=abs, ascending=False, kind="stable", ignore_index=True)

    @property
    def _is_top(self) -> Bool[np.ndarray, " checked"]:
        return np.arange(len(self.checked)) < self.top

    @property
    def _weights(self) -> Float[np.ndarray, " checked"]:
        """Number of nodes that each of the checked ones stands for."""
        sampled = len(self.checked) - self.top
        return np.where(self._is_top, 1.0, (len(self.attribution.nodes) - self.top) / max(sampled, 1))


def patch_values_at_p0(
    model: HookedModel,
    pair: PromptPair,
    kinds: Sequence[Kind] = ("head", "neuron"),
    reference: Reference = "shifted",
    layers: Sequence[int] | None = None,
    offset: int = 8,
) -> dict[Node, Float[Tensor, "batch ..."]]:
    """Compute new values at P0 for all nodes of given kinds; all heads or neurons of a layer are read at once.

    Args:
        model: a hooked model.
        pair: clean and shifted prompts.
        kinds: kinds of nodes.
        reference: where the values come from, as for `pairs.patch_values`.
        layers: blocks of the nodes; all if None.
        offset: tokens after P0, for the reference "position".

    Returns:
        Values by node.

    Raises:
        InterventionError: a kind or layer that does not exist, neurons of a mixture of experts, or as `patch_values`.
    """
    info = describe(model)
    if not kinds or not set(kinds) <= set(get_args(Kind)):
        raise InterventionError(f"kinds={kinds!r}: expected some of {', '.join(get_args(Kind))}")
    if "neuron" in kinds and info.experts:
        raise InterventionError(
            f"the neurons of {info.name} belong to its {info.experts} experts and have no hook; expected other kinds, "
            "such as head, attn and mlp"
        )
    layer_nodes = [
        _Layer(kind, layer)
        for kind in kinds
        for layer in (range(info.n_layers) if layers is None else layers)
        if kind != "embed" or layer == 0
    ]
    values: dict[Node, Tensor] = {}
    for node, value in patch_values(model, pair, layer_nodes, reference, offset).items():
        if node.kind in ("head", "neuron"):
            values |= {Node(node.kind, node.layer, index): one for index, one in enumerate(value.unbind(1))}
        else:
            values[Node(node.kind, node.layer)] = value
    return values


def attribute(
    model: HookedModel,
    prompts: PromptSet,
    values: Mapping[Node, Float[Tensor, "batch ..."]],
    metric: Metric,
    steps: int = 0,
) -> Attribution:
    """Estimate for each node the effect of patching it alone at P0.

    This takes one forward and one backward pass for all nodes together; with `steps`, one more of each for every step
    and set. A backward pass needs the activations of all blocks, so rows are taken a few at a time. The model's
    parameters get no gradient, and the caller may be under `no_grad`.

    Args:
        model: a hooked model.
        prompts: the clean prompts.
        values: new values at P0 by node.
        metric: a metric with a gradient.
        steps: steps of integrated gradients; 0 for the gradient of the clean run.

    Returns:
        Estimates [node, batch], in units of the metric.

    Raises:
        InterventionError: no node or one that does not exist, a value of another shape or not finite, a negative
            number of steps, or a metric without a gradient (rates and other counts have none).
        ModelError: the model is in training mode, cannot read the prompts, or lacks a hook.
    """
    if steps < 0:
        raise InterventionError(f"steps={steps}: expected 0 (the gradient of the clean run) or a number of steps")
    if not values:
        raise InterventionError("no node to attribute anything to; expected at least one node with its value")
    metric.check(model)
    info, nodes = describe(model), tuple(nodes_of(tuple(values), model))
    for node in nodes:
        check_value(node, values, prompts.n, info)
    sets = _sets(nodes)
    device = device_of(model)
    clean, estimates = [], []
    # Tensors made in inference mode cannot take part in a backward pass; what is stacked or indexed here can.
    with torch.inference_mode(False), torch.enable_grad():
        targets = [torch.stack([values[node] for node in one_set], dim=1) for one_set in sets]
        for numbers in torch.arange(prompts.n).split(rows_with_gradients(info, prompts.length)):
            rows = Rows(*(part[numbers].to(device) for part in (prompts.ids, prompts.attention_mask, prompts.p0)))
            here = [target[numbers] for target in targets]
            value, first = _first_order(model, rows, sets, here, metric)
            if steps:
                by_set = zip(sets, here, first, strict=True)
                first = [_integrated(model, rows, *one, metric, steps, value) for one in by_set]
            clean.append(value)
            estimates.append(torch.cat(first, dim=1))
    by_node = dict(zip((node for one_set in sets for node in one_set), torch.cat(estimates).T.cpu(), strict=True))
    estimate = torch.stack([by_node[node] for node in nodes])
    return Attribution(metric.name, nodes, steps, torch.cat(clean).cpu(), estimate)


def attribute_and_check(
    model: HookedModel,
    prompts: PromptSet,
    values: Mapping[Node, Float[Tensor, "batch ..."]],
    metric: Metric,
    steps: int = 0,
    top: int = 50,
    sample: int | None = 50,
    seed: int = 0,
) -> CheckedAttribution:
    """Estimate the effects of all nodes, and patch the strongest and a random sample of the others exactly.

    Args:
        model: a hooked model.
        prompts: the clean prompts.
        values: new values at P0 by node.
        metric: a metric with a gradient.
        steps: steps of integrated gradients; 0 for the gradient of the clean run.
        top: number of the strongest nodes that are patched.
        sample: number of the others that are patched; all if None.
        seed: seed of the random sample.

    Returns:
        The estimates with their error.

    Raises:
        InterventionError: as `attribute`, or `top` or `sample` is below 1.
        ModelError: as `attribute`.
    """
    if top < 1 or (sample is not None and sample < 1):
        raise InterventionError(
            f"top={top}, sample={sample}: expected at least 1 of each, or nothing would be known of the error"
        )
    attribution = attribute(model, prompts, values, metric, steps)
    strongest, others = attribution.order[:top], attribution.order[top:]
    sampled = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[:sample]
    checked = torch.cat([strongest, others[sampled]])
    patches = [Patch(node, values[node]) for node in (attribution.nodes[number] for number in checked)]
    # Only values are put in, none is taken from another run: the prompts make a pair with themselves.
    grid = patch_grid(model, PromptPair(prompts, prompts, 0), patches, metric)
    return CheckedAttribution(attribution, checked, len(strongest), grid.patched - grid.base)


class _Layer(Node):
    """All heads or all neurons of a layer as one node, whose value is everything that their hook holds."""

    def check(self, info: ModelInfo) -> Node:
        if self.kind in ("head", "neuron"):
            Node(self.kind, self.layer, 0).check(info)
            return self
        return super().check(info)


def _sets(nodes: Sequence[Node]) -> list[list[Node]]:
    """The heads of each layer, its neurons, and each component alone: nodes whose values one hook holds."""
    sets: dict[tuple[Kind, int], list[Node]] = {}
    for node in nodes:
        sets.setdefault((node.kind, node.layer), []).append(node)
    return list(sets.values())


def _index(nodes: Sequence[Node], rows: Rows) -> tuple[Tensor, ...]:
    """Where the values of a set are in its hook's activation; so indexed, it gives [batch, node, *value]."""
    numbers, positions = (part[:, None] for part in rows.at(0))
    if nodes[0].index is None:
        return numbers, positions
    return numbers, positions, torch.tensor([node.index for node in nodes], device=positions.device)


def _first_order(
    model: HookedModel,
    rows: Rows,
    sets: Sequence[Sequence[Node]],
    targets: Sequence[Float[Tensor, "batch _ ..."]],
    metric: Metric,
    fraction: float = 0.0,
) -> tuple[Float[Tensor, " batch"], list[Float[Tensor, "batch _"]]]:
    """Steps 1 and 2, with all sets moved this fraction of the way to their targets: the metric, and the estimates."""
    moves: dict[int, Tensor] = {}
    ways: dict[int, Tensor] = {}
    readings: dict[int, Tensor] = {}

    def enter(activation: Tensor, hook: object, number: int) -> Tensor:
        index = _index(sets[number], rows)
        ways[number] = targets[number].to(activation) - activation.detach()[index]
        moves[number] = (fraction * ways[number]).requires_grad_()
        return activation.index_put(index, moves[number], accumulate=True)

    hooks: list[Hook] = [
        (one_set[0].hook, functools.partial(enter, number=number)) for number, one_set in enumerate(sets)
    ]
    hooks += reading_hooks(metric, rows, readings)
    with contextlib.suppress(Complete):
        stream = forward(model, rows.ids, rows.mask, hooks=hooks, stop_at_layer=metric.end(model))
        read_logits(model, metric, stream, rows, readings)
    value = metric.value(readings)
    # What the pass did not reach before the metric's last reading has no effect on it.
    estimates = [torch.zeros(target.shape[:2], device=value.device) for target in targets]
    if moves and not value.requires_grad:
        raise InterventionError(
            f"{metric.name} has no gradient: small changes do not move a rate or any other count; expected a smooth "
            "metric, such as the sink score in the place of the sink rate"
        )
    slopes = torch.autograd.grad(value.sum(), list(moves.values()), materialize_grads=True) if moves else ()
    for number, slope in zip(moves, slopes, strict=True):
        if not bool(torch.isfinite(slope).all()):
            raise InterventionError(
                f"the gradient of {metric.name} by {sets[number][0]} and its like is not finite; expected a metric "
                "that is smooth at the values of the run, which a root or a norm is not at 0"
            )
        # A sum of many products, in which half precision would lose the small ones.
        product = slope.to(torch.promote_types(slope.dtype, torch.float32)) * ways[number]
        estimates[number] = product.reshape(*product.shape[:2], -1).sum(-1)
    return value.detach(), estimates


def _integrated(
    model: HookedModel,
    rows: Rows,
    nodes: Sequence[Node],
    target: Float[Tensor, "batch _ ..."],
    first: Float[Tensor, "batch _"],
    metric: Metric,
    steps: int,
    value: Float[Tensor, " batch"],
) -> Float[Tensor, "batch _"]:
    """Step 3 for one set, going on from the metric and the estimates of the clean run."""
    estimate = torch.zeros_like(first)
    if metric.last_layer is not None and nodes[0].layer > metric.last_layer:
        return estimate
    for step in range(1, steps + 1):
        value_before, first_before = value, first
        value, (first,) = _first_order(model, rows, [nodes], [target], metric, step / steps)
        share = (first_before + first) / (2 * steps)
        missed = (value - value_before)[:, None] - share.sum(1, keepdim=True)
        sizes = share.abs().sum(1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
        estimate += share + missed * share.abs() / sizes
    return estimate


def rows_with_gradients(info: ModelInfo, length: int) -> int:
    """Return the number of rows for which a backward pass needs half a gigabyte; at least one.

    Args:
        info: description of the model.
        length: tokens of a row.
    """
    block = 10 * info.d_model + 5 * info.d_mlp + 5 * info.n_heads * length
    return max(1, BATCH_BYTES // (4 * length * (info.n_layers * block + 3 * info.vocab_size)))


def _ranks(values: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The rank of each value, where each counts by its weight and equal ones share the middle."""
    _, which = np.unique(values, return_inverse=True)
    share = np.bincount(which, weights)
    return (share.cumsum() - share / 2)[which]


def _correlation(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"]) -> float:
    a, b = (one - np.average(one, weights=weights) for one in (a, b))
    sizes = np.average(a * a, weights=weights) * np.average(b * b, weights=weights)
    return float(np.average(a * b, weights=weights) / np.sqrt(sizes)) if sizes else float("nan")
