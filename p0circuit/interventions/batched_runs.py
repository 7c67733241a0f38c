"""The clean run and its patched variants as slots of one batch: the ground on which path patching stands.

1. The batch is `slots` copies of the same rows: slot 0 stays clean, slot 1 + i carries the value of sender i.
2. At its sender's hook a slot takes the sender's new value, at one position of each row.
3. Everything computed after the sender, attention outs and (unless they may carry the effect) MLP outs, is set back to
   what slot 0 computes: paths that are not asked for are cut. What is read at a receiver then came along the edge.

Because the clean values are computed in the same pass, nothing has to be cached, and rows of length 1 work like any
others: P0 attends to itself alone, so its stream is that of a sequence of one token.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.metrics import Complete, Metric, Rows, read_logits, reading_hooks
from p0circuit.interventions.nodes import InterventionError, Node
from p0circuit.models import describe, resume
from p0circuit.models.hooks import Hook

Through = Literal["direct", "mlps", "all"]
"""What may carry an effect from sender to receiver: the residual stream alone; MLPs as well; attention too."""


def sender_hooks(
    model: HookedModel,
    senders: Sequence[Node],
    values: Mapping[Node, Tensor],
    position: Int[Tensor, " batch"],
    through: Through = "direct",
    stop_at_layer: int | None = None,
) -> list[Hook]:
    """The hooks of steps 2 and 3, for a batch of (1 + senders) slots of `len(position)` rows.

    Raises:
        InterventionError: a sender has no value, its value does not fit or is not finite, or `through` is unknown.
    """
    if through not in ("direct", "mlps", "all"):
        raise InterventionError(f"through={through!r} is unknown; expected 'direct', 'mlps' or 'all'")
    info, batch = describe(model), len(position)
    for sender in senders:
        check_value(sender, values, batch, info)

    by_hook: dict[str, list[tuple[slice, Node]]] = {}
    for slot, sender in enumerate(senders, start=1):
        by_hook.setdefault(sender.hook, []).append((slice(slot * batch, (slot + 1) * batch), sender))

    def send(activation: Tensor, hook: Any, sent: Sequence[tuple[slice, Node]]) -> Tensor:
        changed = activation.clone()
        for rows, sender in sent:
            sender.put(changed, position, values[sender], rows)
        return changed

    def cut(activation: Tensor, hook: Any, depth: tuple[int, int]) -> Tensor | None:
        earlier = [slot for slot, sender in enumerate(senders, start=1) if sender.depth < depth]
        if not earlier:
            return None
        slots = by_slot(activation, 1 + len(senders)).clone()
        slots[earlier] = by_slot(activation, 1 + len(senders))[0]
        return slots.view_as(activation)

    hooks: list[Hook] = [(name, functools.partial(send, sent=sent)) for name, sent in by_hook.items()]
    first = min((sender.layer for sender in senders), default=0)
    for layer in range(first, info.n_layers if stop_at_layer is None else stop_at_layer):
        for node, carries in ((Node("attn", layer), "all"), (Node("mlp", layer), "mlps")):
            if through not in (carries, "all"):
                hooks.append((node.hook, functools.partial(cut, depth=node.depth)))
    return hooks


def measure_slots(
    model: HookedModel,
    rows: Rows,
    metric: Metric,
    below: tuple[Tensor | None, Mapping[int, Tensor]],
    layer: int,
    slots: int,
    hooks: Sequence[Hook],
) -> Float[Tensor, " slot_rows"]:
    """The metric of each row in `slots` slots, run on with hooks from a layer that all enter with what is `below`."""
    stream, found = below[0], {number: repeated(reading, slots) for number, reading in below[1].items()}
    if stream is None:
        return metric.value(found)
    copies = Rows(*(repeated(part, slots) for part in rows))
    every = [*hooks, *reading_hooks(metric, copies, found)]
    with contextlib.suppress(Complete):
        stop = metric.end(model)
        end = resume(model, repeated(stream, slots), layer, copies.mask, hooks=every, stop_at_layer=stop)
        read_logits(model, metric, end, copies, found, at_once=len(rows.ids))
    return metric.value(found)


def check_value(node: Node, values: Mapping[Node, Tensor], batch: int, info: Any) -> None:
    """Make sure that a node has a new value for each row, of its own shape and finite.

    Raises:
        InterventionError: it has not.
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


def repeated(tensor: Tensor, slots: int) -> Tensor:
    """`slots` copies of the rows, one slot after the other."""
    return tensor.repeat(slots, *[1] * (tensor.ndim - 1))


def by_slot(activation: Tensor, slots: int) -> Tensor:
    """A view of a side-by-side activation as [slot, row, ...]."""
    return activation.view(slots, -1, *activation.shape[1:])
