"""Path patching: the effect of one edge, from a sender to the input of a receiver, with every other path cut.

After Wang et al. 2022 (arXiv 2211.00593). For a sender, a receiver and the sender's new value at one position:

1. *Send.* Run the clean prompts with the new value in place of the sender's output. What is computed between sender and
   receiver keeps its clean value (MLPs may be let through), so what changes at the receiver came along the edge.
2. *Receive.* Read what the receiver is given in this run (`receiver_runs`).
3. *Measure.* Run the clean prompts once more from the receiver's block on, with only this input patched, and measure.

One pass does steps 1 and 2 for all senders and all receivers of a block, and one more for Q; step 3 does many edges in
one batch. An edge into K at P0 needs no runs if no head of the metric comes after the receiver's block: the closed form
gives its exact effect (`closed_form`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.batched_runs import TOKENS_AT_ONCE, check_value, measure_variants
from p0circuit.interventions.circuit import owner
from p0circuit.interventions.closed_form import NotOfTheClosedForm, key_edges
from p0circuit.interventions.edge_effects import Edge, PathEffects
from p0circuit.interventions.metrics import Metric, measure, measure_rows, run_up_to
from p0circuit.interventions.nodes import InterventionError, Node, components, nodes_of
from p0circuit.interventions.pairs import PromptPair, patch_values
from p0circuit.interventions.receiver_runs import patch_receivers, read_receiver_inputs, rows_at
from p0circuit.interventions.receivers import Receiver, check_receivers
from p0circuit.log import progress_bar
from p0circuit.models import ModelInfo, describe
from p0circuit.prompts import PromptSet


@torch.no_grad()
def path_patch(
    model: HookedModel,
    pair: PromptPair,
    metric: Metric,
    receivers: Sequence[str],
    senders: Literal["components", "heads"] | Sequence[str | Node] = "components",
    through: Literal["direct", "mlps"] = "direct",
) -> PathEffects:
    """Patch every edge at P0 from a sender to a receiver that is computed after it, one edge at a time.

    Each sender takes the value that it has in the shifted run, at the same token. Edges whose effect has a closed form
    are computed with it; the others are run.

    Args:
        model: a hooked model.
        pair: clean and shifted prompts.
        metric: the metric.
        receivers: names of receivers, such as `attn.12.k`, `attn.12.3.q`, `mlp.1` or `resid_pre.2`.
        senders: names or nodes; "components" for embedding, attention outputs and MLPs of all blocks before the last
            receiver, "heads" for the same with heads in place of attention outputs.
        through: "direct": only the residual stream may carry the effect from sender to receiver. "mlps": MLPs between
            them as well.

    Returns:
        Effects of the edges [edge, sample], by receiver's block, sender and receiver.

    Raises:
        InterventionError: a name that the model does not have, no receiver, a receiver that comes before every sender,
            or `through` of another kind.
        ModelError: the model does not have a hook that the metric reads.

    Example:
        edges = p0circuit.path_patch(model, pair, metric, receivers=["attn.3.k", "mlp.1"])
        edges.to_dataframe()  # sender, receiver, effect, low, high, n
        edges.circuit(threshold=0.05).plot()
    """
    info, prompts = describe(model), pair.clean
    metric.check(model)
    targets = [Receiver.parse(name, info) for name in receivers]
    nodes = _senders(model, senders, targets)
    _check_edges(targets, nodes, through, info)
    values = patch_values(model, pair, nodes)
    exact = _by_closed_form(model, prompts, metric, targets, nodes, values, through)
    remaining = [receiver.name for receiver in targets if receiver.name not in {name for _, name in exact}]
    if remaining:
        runs = patch_edges(model, prompts, nodes, remaining, values, metric, through=through)
        clean, patched = runs.clean.cpu(), dict(zip(runs.edges, runs.patched.cpu(), strict=True))
    else:
        clean, patched = measure(model, prompts, metric), {}
    patched |= {edge: clean + effect.to(clean) for edge, effect in exact.items()}
    edges = [
        (str(sender), receiver.name)
        for layer in sorted({receiver.layer for receiver in targets})
        for sender in nodes
        for receiver in targets
        if receiver.layer == layer and receiver.comes_after(sender, info)
    ]
    return PathEffects(
        edges=tuple(edges),
        clean=clean,
        patched=torch.stack([patched[edge] for edge in edges]),
        metric=metric.name,
        through=through,
        shifted=measure(model, pair.shifted, metric, pair.position),
        ends=_measured_components(metric, targets, info),
        closed_form=frozenset(exact),
    )


@torch.no_grad()
def patch_edges(
    model: HookedModel,
    prompts: PromptSet,
    senders: Sequence[str | Node],
    receivers: Sequence[str],
    values: Mapping[Node, Tensor],
    metric: Metric,
    position: Int[Tensor, " batch"] | None = None,
    through: Literal["direct", "mlps"] = "direct",
) -> PathEffects:
    """Patch edges with any values, at any position, each edge in a run of its own.

    An edge changes the input of its receiver at one position only: K and V there are read by the queries at and after
    it, Q by the query at it. An edge into Q at P0 has no effect and is not run, because P0's query sees P0 alone.

    Args:
        model: a hooked model.
        prompts: the clean prompts.
        senders: the senders.
        receivers: names of receivers.
        values: new values of the senders at `position`.
        metric: the metric, measured at `position`.
        position: index in each prompt of the position that is patched; P0 if None.
        through: what may carry the effect from sender to receiver.

    Returns:
        Effects of the edges [edge, sample]. The metric of another run is not measured, so there are no relative ones.

    Raises:
        InterventionError: as `path_patch`, or a value does not fit, or a position lies outside the prompts.
        ModelError: the model does not have a hook that the metric reads.
    """
    info = describe(model)
    nodes = nodes_of(senders, model)
    targets = [Receiver.parse(name, info) for name in receivers]
    _check_edges(targets, nodes, through, info)
    for sender in nodes:
        check_value(sender, values, prompts.n, info)
    metric.check(model)
    rows = rows_at(model, prompts, position)
    at_p0 = bool((rows.position.cpu() == prompts.p0).all())
    per_batch = max(1, TOKENS_AT_ONCE // rows.ids.numel())
    clean = measure_rows(model, rows, metric)
    edges: list[Edge] = []
    patched: list[Tensor] = []
    for layer in progress_bar(sorted({receiver.layer for receiver in targets}), "path patching"):
        here = [receiver for receiver in targets if receiver.layer == layer]
        # P0's query sees P0 alone: its attention does not depend on the query.
        acting = [receiver for receiver in here if not (at_p0 and receiver.kind == "q")]
        below = run_up_to(model, rows, metric, layer) if acting else (None, {})
        for batch in (nodes[start : start + per_batch] for start in range(0, len(nodes), per_batch)):
            pairs = [(s, r) for s in batch for r in here if r.comes_after(s, info)]
            to_run = [(s, r) for s, r in pairs if r in acting]
            inputs = read_receiver_inputs(model, rows, batch, values, acting, through) if to_run else {}
            measured: dict[tuple[Node, Receiver], Tensor] = {}
            for first in range(0, len(to_run), per_batch):
                part = to_run[first : first + per_batch]
                new = [(receiver, inputs[receiver.kind][batch.index(sender)]) for sender, receiver in part]
                hooks = patch_receivers(new, layer, rows)
                metrics = measure_variants(model, rows, metric, below, layer, len(new), hooks)
                measured |= dict(zip(part, metrics.split(prompts.n), strict=True))
            patched += [measured.get(pair, clean) for pair in pairs]
            edges += [(str(sender), receiver.name) for sender, receiver in pairs]
    return PathEffects(tuple(edges), clean, torch.stack(patched), metric.name, through)


def _check_edges(receivers: Sequence[Receiver], senders: Sequence[Node], through: str, info: ModelInfo) -> None:
    if through not in ("direct", "mlps"):
        raise InterventionError(f"through={through!r}: between sender and receiver expected 'direct' or 'mlps'")
    if not receivers:
        raise InterventionError("there is no receiver to patch; expected at least one, such as attn.LAYER.k")
    check_receivers(receivers, senders, info)


def _senders(
    model: HookedModel, senders: Literal["components", "heads"] | Sequence[str | Node], receivers: Sequence[Receiver]
) -> list[Node]:
    if not isinstance(senders, str):
        return nodes_of(senders, model)
    if senders not in ("components", "heads"):
        raise InterventionError(f"senders={senders!r}: expected 'components', 'heads' or a list of names of nodes")
    info, last = describe(model), max((receiver.layer for receiver in receivers), default=-1)
    nodes = components(model, range(last + 1), heads=senders == "heads")
    return [node for node in nodes if any(receiver.comes_after(node, info) for receiver in receivers)]


def _measured_heads(metric: Metric, info: ModelInfo) -> list[tuple[int, int]]:
    """The heads whose mean sink score the metric is; none for other metrics."""
    heads = [(layer, range(info.n_heads) if head is None else [head]) for layer, head in metric.heads]
    return [(layer, head) for layer, numbers in heads for head in numbers]


def _measured_components(metric: Metric, receivers: Sequence[Receiver], info: ModelInfo) -> tuple[str, ...]:
    """The owners of receivers that contain heads of the metric."""
    heads = _measured_heads(metric, info)
    names = [owner(r.name) for r in receivers if any(layer == r.layer and head in r.heads for layer, head in heads)]
    return tuple(dict.fromkeys(names))


def _by_closed_form(
    model: HookedModel,
    prompts: PromptSet,
    metric: Metric,
    receivers: Sequence[Receiver],
    senders: Sequence[Node],
    values: Mapping[Node, Tensor],
    through: Literal["direct", "mlps"],
) -> dict[Edge, Float[Tensor, " sample"]]:
    """Effects of the edges into K at P0 that change no head of the metric but the receiver's own."""
    info = describe(model)
    heads = _measured_heads(metric, info)
    last = max((layer for layer, _ in heads), default=info.n_layers)
    exact = [receiver for receiver in receivers if receiver.kind == "k" and receiver.layer >= last]
    effects: dict[Edge, Tensor] = {}
    if not exact:
        return effects
    with contextlib.suppress(NotOfTheClosedForm):
        every = key_edges(
            model, prompts, senders, values, through, 1 + max(receiver.layer for receiver in exact)
        ).effect
        for receiver in exact:
            own = [head for layer, head in heads if layer == receiver.layer and head in receiver.heads]
            for number, sender in enumerate(senders):
                if receiver.comes_after(sender, info):
                    change = every[number, :, receiver.layer, own].sum(-1) / len(heads)
                    effects[str(sender), receiver.name] = change
    return effects
