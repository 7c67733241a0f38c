"""Edges whose metric is the sink score of the receiver's own heads: their effects need no run for each edge.

A new key changes each query's score at that key, a new query all scores of that query. The attention after the change
follows from the clean scores. At P0 the closed form gives all edges into keys (`edges_into_keys`); at any position
`own_scores` computes them from the scores that the receivers are given.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.batched_runs import TOKENS_AT_ONCE, Through, by_variant, check_value, repeated
from p0circuit.interventions.closed_form import KeyEdges, NotOfTheClosedForm, attention_with_key, key_edges
from p0circuit.interventions.metrics import Rows
from p0circuit.interventions.nodes import InterventionError, Node, nodes_of
from p0circuit.interventions.receiver_runs import patch_receivers, read_receiver_inputs, rows_at
from p0circuit.interventions.receivers import Receiver, check_receivers
from p0circuit.models import describe, forward, resume
from p0circuit.prompts import PromptSet
from p0circuit.sink import attention_to, mean_over_queries, sink_score


@torch.no_grad()
def edges_into_keys(
    model: HookedModel,
    prompts: PromptSet,
    senders: Sequence[str | Node],
    values: Mapping[Node, Tensor],
    through: Literal["direct", "mlps"] = "direct",
    method: Literal["auto", "closed form", "hooks"] = "auto",
) -> KeyEdges:
    """Compute the effect of each sender at P0 on every head's own sink score, through the head's key of P0.

    Args:
        model: a hooked model.
        prompts: the clean prompts.
        senders: the senders.
        values: new values of the senders at P0, as `pairs.patch_values` returns them.
        through: what may carry the effect from sender to receiver.
        method: "auto" uses the closed form where it is exact, and runs with hooks otherwise.

    Returns:
        The effects; `KeyEdges.method` names the method that was used.

    Raises:
        InterventionError: the method is unknown, or as `closed_form.key_edges`.
        NotOfTheClosedForm: the method is "closed form", and the model's attention is of another kind.

    Example:
        values = patch_values(model, pair, ["mlp.0", "mlp.1"])
        edges_into_keys(model, pair.clean, ["mlp.0", "mlp.1"], values).effect.mean(1)  # [sender, layer, head]
    """
    if method not in ("auto", "closed form", "hooks"):
        raise InterventionError(f"method={method!r} is unknown; expected 'auto', 'closed form' or 'hooks'")
    if method == "closed form":
        return key_edges(model, prompts, senders, values, through)
    if method == "auto":
        with contextlib.suppress(NotOfTheClosedForm):
            return key_edges(model, prompts, senders, values, through)
    return _key_edges_by_hooks(model, prompts, nodes_of(senders, model), values, through)


@dataclass(frozen=True, eq=False)
class OwnScores:
    """The sink score of every receiver's own heads, with one edge patched and in the clean run.

    Attributes:
        edges: names of sender and receiver, in the order of the first axis of the others.
        clean: mean sink score of the receiver's heads in the clean run.
        patched: the same with the edge patched.
    """

    edges: tuple[tuple[str, str], ...]
    clean: Float[Tensor, "edge sample"]
    patched: Float[Tensor, "edge sample"]

    @property
    def effect(self) -> Float[Tensor, "edge sample"]:
        """Change of the score: negative if the edge carries the sink."""
        return self.patched - self.clean


@torch.no_grad()
def own_scores(
    model: HookedModel,
    prompts: PromptSet,
    senders: Sequence[str | Node],
    receivers: Sequence[str],
    values: Mapping[Node, Tensor],
    position: Int[Tensor, " batch"] | None = None,
    through: Literal["direct", "mlps"] = "direct",
) -> OwnScores:
    """Compute what edges into K and Q at any position do to the sink score of the receiver's own heads.

    Args:
        model: a hooked model.
        prompts: the clean prompts.
        senders: the senders.
        receivers: names of receivers, K or Q of heads.
        values: new values of the senders at `position`.
        position: index in each prompt of the position that is patched; P0 if None.
        through: what may carry the effect from sender to receiver.

    Raises:
        InterventionError: a receiver is neither K nor Q of heads, or as `path_patching.patch_edges`.
    """
    info = describe(model)
    nodes = nodes_of(senders, model)
    targets = [Receiver.parse(name, info) for name in receivers]
    for receiver in targets:
        if receiver.kind not in ("k", "q"):
            raise InterventionError(f"{receiver.name} does not enter its heads' own scores; expected K or Q of heads")
    check_receivers(targets, nodes, info)
    for sender in nodes:
        check_value(sender, values, prompts.n, info)
    rows = rows_at(model, prompts, position)
    p0, index = prompts.p0.to(rows.position.device), torch.arange(prompts.n, device=rows.position.device)
    clean: dict[int, Tensor] = {}

    def read(scores: Tensor, hook: object, layer: int) -> None:
        clean[layer] = scores.clone()

    layers = sorted({receiver.layer for receiver in targets})
    hooks = [(f"blocks.{layer}.attn.hook_attn_scores", functools.partial(read, layer=layer)) for layer in layers]
    forward(model, rows.ids, rows.mask, hooks=hooks, stop_at_layer=max(layers) + 1)
    per_batch = max(1, TOKENS_AT_ONCE // rows.ids.numel())
    edges: list[tuple[str, str]] = []
    before: list[Tensor] = []
    after: list[Tensor] = []
    for layer in layers:
        here = [receiver for receiver in targets if receiver.layer == layer]
        attention = attention_to(clean[layer].softmax(-1), p0)
        own = mean_over_queries(attention, p0, rows.mask)
        for batch in (nodes[start : start + per_batch] for start in range(0, len(nodes), per_batch)):
            inputs = read_receiver_inputs(model, rows, batch, values, here, through)
            for number, sender in enumerate(batch):
                for receiver in (receiver for receiver in here if receiver.comes_after(sender, info)):
                    new = inputs[receiver.kind][number]
                    if receiver.kind == "k":
                        patched = attention_with_key(clean[layer], rows.position, new, p0)
                    else:
                        patched = attention.clone()
                        patched[index, :, rows.position] = attention_to(new.softmax(-1)[:, :, None], p0)[..., 0]
                    heads = list(receiver.heads)
                    after.append(mean_over_queries(patched, p0, rows.mask)[:, heads].mean(1))
                    before.append(own[:, heads].mean(1))
                    edges.append((str(sender), receiver.name))
    return OwnScores(tuple(edges), torch.stack(before), torch.stack(after))


def _key_edges_by_hooks(
    model: HookedModel, prompts: PromptSet, senders: Sequence[Node], values: Mapping[Node, Tensor], through: Through
) -> KeyEdges:
    """`key_edges` by runs: the keys of every block are read for every sender, and patched to measure its own scores."""
    info = describe(model)
    rows = rows_at(model, prompts)
    per_batch = max(1, TOKENS_AT_ONCE // rows.ids.numel())
    scores = []
    for layer in range(info.n_layers):
        every = Receiver("k", layer, tuple(range(info.n_heads)), f"attn.{layer}.k")
        stream = forward(model, rows.ids, rows.mask, stop_at_layer=layer)
        parts = [_scores_of_layer(model, rows, stream, layer, [])]
        for start in range(0, len(senders), per_batch):
            inputs = read_receiver_inputs(model, rows, senders[start : start + per_batch], values, [every], through)
            parts.append(_scores_of_layer(model, rows, stream, layer, [(every, new) for new in inputs["k"]]))
        scores.append(by_variant(torch.cat(parts), 1 + len(senders)))
    stacked = torch.stack(scores, dim=2)
    return KeyEdges(tuple(senders), stacked[0], stacked[1:], "hooks", 0.0)


def _scores_of_layer(
    model: HookedModel, rows: Rows, stream: Tensor, layer: int, inputs: Sequence[tuple[Receiver, Tensor]]
) -> Float[Tensor, "variant_rows head"]:
    """A layer's sink scores when it starts from `stream`, with each receiver patched in a variant of its own."""
    variants = max(1, len(inputs))
    _, mask, position = (repeated(part, variants) for part in rows)
    scores: list[Tensor] = []

    def read(pattern: Tensor, hook: object) -> None:
        scores.append(sink_score(pattern, position, mask))

    hooks = [*patch_receivers(inputs, layer, rows), (f"blocks.{layer}.attn.hook_pattern", read)]
    resume(model, repeated(stream, variants), layer, mask, hooks=hooks, stop_at_layer=layer + 1)
    return scores[0]
