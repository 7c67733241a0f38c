"""The clean run and patched variants of it in one batch: what path patching is built on.

1. The batch holds several copies of the same prompts, called *variants*. Variant 0 stays clean; variant 1 + i carries
   the new value of sender i.
2. At the hook of its sender, a variant takes the sender's new value, at one position of each prompt.
3. What is computed after the sender is set back to what variant 0 computes: always attention outputs, and MLP outputs
   unless they may carry the effect. So only the wanted paths remain, and what a receiver reads came along the edge.

The clean values come from the same pass, so no activation has to be cached. Rows of one token work like any others: P0
attends to itself alone, so its stream is that of a sequence of one token.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.metrics import Complete, Metric, Rows, read_logits, reading_hooks
from p0circuit.interventions.nodes import InterventionError, Node
from p0circuit.models import ModelInfo, describe, resume
from p0circuit.models.hooks import Hook

Through = Literal["direct", "mlps", "all"]
"""What may carry an effect from sender to receiver: the residual stream alone; MLPs as well; attention too."""
TOKENS_AT_ONCE = 2**13
"""Number of tokens in a batch of variants."""


def sender_hooks(
    model: HookedModel,
    senders: Sequence[Node],
    values: Mapping[Node, Tensor],
    position: Int[Tensor, " batch"],
    through: Through = "direct",
    stop_at_layer: int | None = None,
) -> list[Hook]:
    """Make the hooks of steps 2 and 3, for a batch of 1 + len(senders) variants.

    Args:
        model: a hooked model.
        senders: one sender for each variant after the clean one.
        values: new values of the senders, one per prompt.
        position: index in each prompt of the position at which the values are put in.
        through: what may carry the effect onwards.
        stop_at_layer: first block that does not run; all run if None.

    Raises:
        InterventionError: a sender has no value, its value does not fit or is not finite, or `through` is unknown.
    """
    if through not in ("direct", "mlps", "all"):
        raise InterventionError(f"through={through!r} is unknown; expected 'direct', 'mlps' or 'all'")
    info, batch = describe(model), len(position)
    for sender in senders:
        check_value(sender, values, batch, info)

    by_hook: dict[str, list[tuple[slice, Node]]] = {}
    for variant, sender in enumerate(senders, start=1):
        by_hook.setdefault(sender.hook, []).append((slice(variant * batch, (variant + 1) * batch), sender))

    def send(activation: Tensor, hook: object, sent: Sequence[tuple[slice, Node]]) -> Tensor:
        patched = activation.clone()
        for rows, sender in sent:
            sender.put(patched, position, values[sender], rows)
        return patched

    def cut(activation: Tensor, hook: object, depth: tuple[int, int]) -> Tensor | None:
        after_sender = [variant for variant, sender in enumerate(senders, start=1) if sender.depth < depth]
        if not after_sender:
            return None
        variants = by_variant(activation, 1 + len(senders)).clone()
        variants[after_sender] = by_variant(activation, 1 + len(senders))[0]
        return variants.view_as(activation)

    hooks: list[Hook] = [(name, functools.partial(send, sent=sent)) for name, sent in by_hook.items()]
    first = min((sender.layer for sender in senders), default=0)
    for layer in range(first, info.n_layers if stop_at_layer is None else stop_at_layer):
        for node, carries in ((Node("attn", layer), "all"), (Node("mlp", layer), "mlps")):
            if through not in (carries, "all"):
                hooks.append((node.hook, functools.partial(cut, depth=node.depth)))
    return hooks


def measure_variants(
    model: HookedModel,
    rows: Rows,
    metric: Metric,
    below: tuple[Tensor | None, Mapping[int, Tensor]],
    layer: int,
    variants: int,
    hooks: Sequence[Hook],
) -> Float[Tensor, " variant_rows"]:
    """Measure variants that all start from the same residual stream.

    Args:
        model: a hooked model.
        rows: the prompts of one variant.
        metric: the metric.
        below: the residual stream before the layer, or None if the metric reads nothing from there on; and what the
            metric has read before, by the number of the reading.
        layer: the first block that runs.
        variants: number of variants.
        hooks: hooks that patch the variants, each in its own copy of the rows.

    Returns:
        The metric of every prompt, variant after variant.
    """
    stream, readings = below[0], {number: repeated(reading, variants) for number, reading in below[1].items()}
    if stream is None:
        return metric.value(readings)
    copies = Rows(*(repeated(part, variants) for part in rows))
    every = [*hooks, *reading_hooks(metric, copies, readings)]
    with contextlib.suppress(Complete):
        stop = metric.end(model)
        end = resume(model, repeated(stream, variants), layer, copies.mask, hooks=every, stop_at_layer=stop)
        read_logits(model, metric, end, copies, readings, at_once=len(rows.ids))
    return metric.value(readings)


def check_value(node: Node, values: Mapping[Node, Tensor], batch: int, info: ModelInfo) -> None:
    """Check that a node has a new value for each prompt, of the node's own shape and finite.

    Args:
        node: the node.
        values: new values by node.
        batch: number of prompts.
        info: description of the model.

    Raises:
        InterventionError: there is no value, or it has another shape or numbers that are not finite.
    """
    if node not in values:
        raise InterventionError(
            f"there is no value to put in the place of {node}; values are given for {[*map(str, values)]}"
        )
    shape = {"head": (batch, info.d_head), "neuron": (batch,)}.get(node.kind, (batch, info.d_model))
    if tuple(values[node].shape) != shape:
        raise InterventionError(f"the value for {node} has shape {list(values[node].shape)}; expected {list(shape)}")
    if not bool(torch.isfinite(values[node]).all()):
        raise InterventionError(f"the value for {node} holds numbers that are not finite; check where it was recorded")


def repeated(tensor: Tensor, variants: int) -> Tensor:
    """Repeat a batch, one variant after the other.

    Args:
        tensor: values of one batch [batch, ...].
        variants: number of copies.
    """
    return tensor.repeat(variants, *[1] * (tensor.ndim - 1))


def by_variant(activation: Tensor, variants: int) -> Tensor:
    """View an activation of several variants as [variant, batch, ...].

    Args:
        activation: activation of all variants, one after the other.
        variants: number of variants.
    """
    return activation.view(variants, -1, *activation.shape[1:])
