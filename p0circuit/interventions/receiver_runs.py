"""Two kinds of batched runs for edges into one block: read what its receivers are given, and patch them with it.

What a receiver is given is read in the form in which one query head's share of it can be patched: for K of a head, its
scores at that key with clean queries; for Q, its scores of that query with clean keys; for V, the change of the value
vector; for an MLP, its output; and the residual stream itself. So K and V of a single query head can be patched where
heads share a key/value head (grouped-query attention): `attn.2.1.k` is K of one query head, `attn.2.kv0.k` that of all
heads of the group.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.batched_runs import Through, by_variant, repeated, sender_hooks
from p0circuit.interventions.closed_form import key_hook, query_hook
from p0circuit.interventions.metrics import Complete, Rows
from p0circuit.interventions.nodes import Node
from p0circuit.interventions.receivers import Kind, Receiver
from p0circuit.models import device_of, forward
from p0circuit.models.hooks import Hook
from p0circuit.prompts import PromptSet


def rows_at(model: HookedModel, prompts: PromptSet, position: Int[Tensor, " batch"] | None = None) -> Rows:
    """Make one batch of prompts, on the device of a model.

    Args:
        model: a hooked model.
        prompts: the prompts.
        position: index in each prompt of the position that is patched; P0 if None.

    Raises:
        InterventionError: a position lies outside the prompts.
    """
    device, position = device_of(model), prompts.p0 if position is None else position
    rows = Rows(*(part.to(device) for part in (prompts.ids, prompts.attention_mask, position)))
    rows.at(0)  # refuses a position outside the prompts
    return rows


def read_receiver_inputs(
    model: HookedModel,
    rows: Rows,
    senders: Sequence[Node],
    values: Mapping[Node, Tensor],
    receivers: Sequence[Receiver],
    through: Through,
) -> dict[Kind, Float[Tensor, "sender batch ..."]]:
    """Read what receivers of one block are given at the position of the rows, with each sender's new value in turn.

    Args:
        model: a hooked model.
        rows: the clean prompts, with the position at which senders are patched.
        senders: the senders.
        values: new values of the senders, one per prompt.
        receivers: receivers of the same block.
        through: what may carry the effect from sender to receiver.

    Returns:
        By kind of receiver, its input for every sender: scores [head, query] for K, scores [head, key] for Q, the
        change of the value [kv_head, d_head] for V, the output of the MLP or the stream [d_model] otherwise.

    Raises:
        InterventionError: as `sender_hooks`.
    """
    layer, variants = receivers[0].layer, 1 + len(senders)
    ids, mask, position = (repeated(part, variants) for part in rows)
    index = torch.arange(len(ids), device=ids.device)
    kinds_to_read: set[Kind] = {receiver.kind for receiver in receivers}
    inputs: dict[Kind, Tensor] = {}

    def restore(activation: Tensor, hook: object) -> Tensor:
        return repeated(by_variant(activation, variants)[0], variants)

    def read(activation: Tensor, hook: object, kind: Kind, kinds: set[Kind]) -> None:
        if kind == "k":
            at_position = activation[index, :, :, position]
        elif kind == "q":
            at_position = activation[index, :, position]
        else:
            at_position = activation[index, position]
        # For a value the change is read; everything else takes the place of the clean input.
        by_sender = by_variant(at_position, variants)
        inputs[kind] = by_sender[1:] - by_sender[0] if kind == "v" else by_sender[1:].clone()
        if inputs.keys() >= kinds:
            raise Complete

    scores = f"blocks.{layer}.attn.hook_attn_scores"
    hook_of: dict[Kind, str] = {
        "resid_pre": Node("resid_pre", layer).hook,
        "v": f"blocks.{layer}.attn.hook_v",
        "k": scores,
        "q": scores,
        "resid_mid": Node("resid_mid", layer).hook,
        "mlp": Node("mlp", layer).hook,
        "resid_post": Node("resid_post", layer).hook,
    }
    # Q and K are each read with the other one clean, and so in separate passes. The restored one changes nothing but
    # the attention output, which is cut: all other kinds are read in the pass for K.
    passes = ((kinds_to_read - {"q"}, query_hook(model, layer)), (kinds_to_read & {"q"}, key_hook(model, layer)))
    for kinds, restored in passes:
        if not kinds:
            continue
        hooks: list[Hook] = [(restored, restore)] if kinds & {"q", "k"} else []
        # Before the cut at the same hook: an MLP as receiver is read before it is set back to its clean output.
        hooks += [(hook_of[kind], functools.partial(read, kind=kind, kinds=kinds)) for kind in kinds]
        hooks += sender_hooks(model, senders, values, rows.position, through, layer + 1)
        with contextlib.suppress(Complete):
            forward(model, ids, mask, hooks=hooks, stop_at_layer=layer + 1)
    return inputs


def patch_receivers(
    inputs: Sequence[tuple[Receiver, Float[Tensor, "batch ..."]]], layer: int, rows: Rows
) -> list[Hook]:
    """Make hooks that patch receivers of one block, each in its own variant of a batched run.

    Args:
        inputs: one receiver for each variant, with its new input as `read_receiver_inputs` returns it for a sender.
        layer: the block.
        rows: the prompts of one variant, with the position that is patched.
    """
    batch, position = len(rows.ids), rows.position
    index = torch.arange(batch, device=position.device)
    by_kind: dict[Kind, list[tuple[slice, tuple[int, ...], Tensor]]] = {}
    for variant, (receiver, new) in enumerate(inputs):
        part = slice(variant * batch, (variant + 1) * batch)
        by_kind.setdefault(receiver.kind, []).append((part, receiver.heads, new))

    def put_scores(scores: Tensor, hook: object) -> Tensor:
        patched = scores.clone()
        for part, heads, new in by_kind.get("k", []):
            for head in heads:
                patched[part][index, head, :, position] = new[:, head]
        for part, heads, new in by_kind.get("q", []):
            for head in heads:
                patched[part][index, head, position] = new[:, head]
        return patched

    attention: list[Tensor] = []

    def read_attention(pattern: Tensor, hook: object) -> None:
        every = torch.arange(len(pattern), device=position.device)
        attention.append(pattern[every, :, :, position.repeat(len(inputs))])

    def add_values(z: Tensor, hook: object) -> Tensor:
        patched = z.clone()
        for part, heads, new in by_kind["v"]:
            group = z.shape[2] // new.shape[1]
            for head in heads:
                patched[part][:, :, head] += attention[0][part][:, head, :, None] * new[:, None, head // group]
        return patched

    def put(activation: Tensor, hook: object, kind: Kind) -> Tensor:
        patched = activation.clone()
        for part, _, new in by_kind[kind]:
            patched[part][index, position] = new
        return patched

    hooks: list[Hook] = []
    if by_kind.keys() & {"k", "q"}:
        hooks.append((f"blocks.{layer}.attn.hook_attn_scores", put_scores))
    if "v" in by_kind:
        hooks.append((f"blocks.{layer}.attn.hook_pattern", read_attention))
        hooks.append((f"blocks.{layer}.attn.hook_z", add_values))
    for kind in by_kind:
        if kind not in ("q", "k", "v"):
            hooks.append((Node(kind, layer).hook, functools.partial(put, kind=kind)))
    return hooks
