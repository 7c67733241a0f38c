"""Estimates for the effects of all edges at P0: steps 1 to 5 of the edge search (`edge_search`)."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.batched_runs import by_variant, repeated
from p0circuit.interventions.closed_form import ROWS_AT_ONCE, key_hook
from p0circuit.interventions.edge_gradients import POINTS, CleanLayer, attention_outputs, clean_side, values_together
from p0circuit.interventions.metrics import Rows
from p0circuit.interventions.nodes import Node
from p0circuit.interventions.receiver_inputs import InputsAtP0, read_at_p0
from p0circuit.interventions.receivers import NodeEdge, Receiver, Targets
from p0circuit.models import ModelInfo, describe, device_of, resume
from p0circuit.models.hooks import Hook
from p0circuit.prompts import PromptSet


@dataclass(eq=False)
class EdgeEstimates:
    """Both estimates of every edge.

    Attributes:
        by_edge: the estimates of an edge.
    """

    by_edge: dict[NodeEdge, Float[Tensor, "point batch"]]

    def update(self, more: Mapping[NodeEdge, Float[Tensor, "point batch"]]) -> None:
        """Add estimates of more edges, or replace them by better ones.

        Args:
            more: estimates by edge.
        """
        self.by_edge |= more

    def from_size(self, least: float) -> list[NodeEdge]:
        """List the edges with a large estimate, the largest first.

        Args:
            least: smallest size of the larger one of both mean estimates.
        """
        sizes = {pair: float(both.mean(1).abs().max()) for pair, both in self.by_edge.items()}
        return [pair for pair in sorted(sizes, key=lambda pair: -sizes[pair]) if sizes[pair] >= least]

    def from_rank(self, least: float, targets: Targets) -> list[NodeEdge]:
        """List the edges with a large estimate, where sizes for V, the least exact ones, are doubled.

        Args:
            least: smallest size, after doubling.
            targets: receivers by name.
        """
        pairs = self.from_size(least / 2)
        ranks = {pair: float(self.by_edge[pair].mean(1).abs().max()) for pair in pairs}
        ranks = {pair: size * (1 + (targets[pair[1]][0].kind == "v")) for pair, size in ranks.items()}
        return [pair for pair in sorted(pairs, key=lambda pair: -ranks[pair]) if ranks[pair] >= least]


@dataclass(eq=False)
class EdgeEstimator:
    """What estimates for edges are computed from: steps 1 to 5 of the search on some rows.

    Attributes:
        model: a hooked model.
        info: its description.
        nodes: the senders.
        inputs: what receivers are given at P0.
        layers: the blocks of the clean run.
        slope_mlp: gradient of the metric by the MLP outputs at P0.
        least: smallest estimate of a group whose members are estimated.
        groups: by layer, all heads that send from it as one sender.
        senders: `nodes`, then the groups: variant 1 + i of `inputs` belongs to sender i.
        one_token_variants: number of variants of rows of one token that were run.
        group_sizes: by member edge, the size of its group's larger mean estimate.
    """

    model: HookedModel
    info: ModelInfo
    nodes: Sequence[Node]
    inputs: InputsAtP0
    layers: dict[int, CleanLayer]
    slope_mlp: Float[Tensor, "point batch layer d_model"]
    least: float
    groups: dict[int, Node]
    senders: list[Node]
    one_token_variants: int = 0
    group_sizes: dict[NodeEdge, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: HookedModel,
        prompts: PromptSet,
        nodes: Sequence[Node],
        values: Mapping[Node, Tensor],
        heads: Sequence[tuple[int, int]],
        least: float,
    ) -> EdgeEstimator:
        """Run what the estimates need.

        Args:
            model: a hooked model.
            prompts: the clean prompts.
            nodes: the senders.
            values: new values of the senders at P0.
            heads: (layer, head) whose mean sink score is the metric.
            least: smallest estimate of a group whose members are estimated.

        Raises:
            NotOfTheClosedForm: the model's attention is of another kind.
        """
        info, device = describe(model), device_of(model)
        end = 1 + max(layer for layer, _ in heads)
        rows = Rows(*(part.to(device) for part in (prompts.ids, prompts.attention_mask, prompts.p0)))
        tokens = rows.ids[torch.arange(prompts.n, device=device), rows.position]
        sending: dict[int, list[Node]] = {}
        for node in nodes:
            if node.kind == "head":
                sending.setdefault(node.layer, []).append(node)
        together = attention_outputs(model, tokens, sending, values)
        groups = {layer: Node("attn", layer) for layer in together}
        senders = [*nodes, *groups.values()]
        every = {**values, **{groups[layer]: value for layer, value in together.items()}}
        inputs = read_at_p0(model, tokens, senders, every, end)
        moved_values = values_together(model, tokens, nodes, values, end)
        layers, slope_mlp = clean_side(model, prompts, rows, heads, end, moved_values)
        return cls(model, info, nodes, inputs, layers, slope_mlp, least, groups, senders, len(senders))

    def estimates(
        self, targets: Targets, only: Collection[NodeEdge] | None = None
    ) -> dict[NodeEdge, Float[Tensor, "point batch"]]:
        """Estimate every edge that can have an effect.

        Args:
            targets: receivers by name.
            only: edges to estimate; all if None, groups of heads first.
        """
        inputs, layers = self.inputs, self.layers
        # Step 4, for all senders, blocks and heads; where a sender comes later the key is the clean one.
        keys = {layer: side.effect(inputs.key[1:, :, layer], None) for layer, side in layers.items()}
        changes = inputs.value[1:] - inputs.value[0]
        first_v, first_mlp = {}, {}
        for layer, side in layers.items():
            weighted = torch.einsum("pbqhd,bhq->pbhd", side.slope, side.attention)
            change = changes[:, :, layer].repeat_interleave(self.info.n_heads // self.info.n_kv_heads, dim=2)
            first_v[layer] = torch.einsum("pbhd,sbhd->spbh", weighted, change)
            move = inputs.mlp[1:, :, layer] - inputs.mlp[0, :, layer]
            first_mlp[layer] = torch.einsum("pbd,sbd->spb", self.slope_mlp[:, :, layer], move)

        number = {node: index for index, node in enumerate(self.nodes)}
        estimates: dict[NodeEdge, Tensor] = {}
        singles: list[tuple[int, Receiver]] = []
        groups: dict[tuple[Node, tuple[str, int]], list[NodeEdge]] = {}
        for name, members in targets.items():
            kind = members[0].kind
            for node in self.nodes:
                reached = [m for m in members if m.comes_after(node, self.info) and m.layer in layers]
                # Q at P0 has no effect, nor has anything that no sink head comes after.
                if kind == "q" or not reached:
                    continue
                if only is not None and (node, name) not in only:
                    continue
                variant, total = number[node], torch.zeros(POINTS, inputs.key.shape[1], device=inputs.key.device)
                for member in reached:
                    if kind == "k":
                        total = total + keys[member.layer][variant][..., list(member.heads)].sum(-1)
                    elif kind == "v":
                        total = total + first_v[member.layer][variant][..., list(member.heads)].sum(-1)
                    else:
                        total = total + first_mlp[member.layer][variant]
                estimates[node, name] = total
                if kind in ("v", "mlp") and len(members) == 1 and reached:
                    group = self.groups.get(node.layer, node) if node.kind == "head" else node
                    groups.setdefault((group, (kind, members[0].layer)), []).append((node, name))
        if only is not None:
            asked = [pair for edges in groups.values() for pair in edges]
            singles = [(number[node], targets[name][0]) for node, name in asked]
            return estimates | dict(zip(asked, self._through_p0(singles, changes), strict=True))
        # Step 5: groups first.
        sender_number = {node: index for index, node in enumerate(self.senders)}
        heads_of: dict[tuple[str, int], set[int]] = {}
        for _, members in targets.items():
            if len(members) == 1:
                heads_of.setdefault((members[0].kind, members[0].layer), set()).update(members[0].heads)
        coarse = [
            (group, Receiver(kind, layer, tuple(sorted(heads_of[kind, layer])), f"{kind}.{layer}"))  # pyright: ignore[reportArgumentType]
            for group, (kind, layer) in groups
        ]
        by_group = self._through_p0([(sender_number[group], receiver) for group, receiver in coarse], changes)
        pursued: list[NodeEdge] = []
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
        singles = [(sender_number[node], targets[name][0]) for node, name in pursued]
        estimates |= dict(zip(pursued, self._through_p0(singles, changes), strict=True))
        return estimates

    def members_of(self, least: float) -> list[NodeEdge]:
        """List the edges whose group has a large estimate.

        Args:
            least: smallest size of the larger one of both mean estimates of the group.
        """
        return [pair for pair, size in self.group_sizes.items() if size >= least]

    def _through_p0(
        self, edges: Sequence[tuple[int, Receiver]], changes: Float[Tensor, "variant batch layer kv_head d_head"]
    ) -> list[Float[Tensor, "point batch"]]:
        """Estimates of edges into V and MLPs: P0's stream runs on from the receiver, and every later key is scored."""
        inputs, batch, end = self.inputs, self.inputs.key.shape[1], max(self.layers, default=-1) + 1
        self.one_token_variants += len(edges)
        estimates: dict[int, Tensor] = {}
        per_pass = max(1, ROWS_AT_ONCE // batch)
        for layer in sorted({receiver.layer for _, receiver in edges}):
            mine = [number for number, (_, receiver) in enumerate(edges) if receiver.layer == layer]
            for start in range(0, len(mine), per_pass):
                numbers = mine[start : start + per_pass]
                total = torch.zeros(len(numbers), POINTS, batch, device=inputs.key.device)
                for variant, number in enumerate(numbers):
                    sender, receiver = edges[number]
                    if receiver.kind == "v" and layer in self.layers:
                        # What later positions read of P0's new value, with its old key.
                        total[variant] = self._read_value(layer, receiver.heads, changes[sender, :, layer])
                keys, values = self._stream_from(layer, [edges[number] for number in numbers], changes, end)
                for later in range(layer + 1, end):
                    total += self.layers[later].effect(keys[later], values[later]).sum(-1)
                estimates |= dict(zip(numbers, total, strict=True))
        return [estimates[number] for number in range(len(edges))]

    def _read_value(self, layer: int, heads: Sequence[int], change: Tensor) -> Float[Tensor, "point batch"]:
        side = self.layers[layer]
        change = change.repeat_interleave(self.info.n_heads // self.info.n_kv_heads, dim=1)
        along = torch.einsum("pbqhd,bhd->pbhq", side.slope, change) * side.attention * side.later[:, None]
        return along[:, :, list(heads)].sum((2, 3))

    def _stream_from(
        self, layer: int, edges: Sequence[tuple[int, Receiver]], changes: Tensor, end: int
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Keys and values of P0 after a block in which each edge's receiver has its new input."""
        inputs, batch, variants = self.inputs, self.inputs.key.shape[1], len(edges)
        keys: dict[int, Tensor] = {}
        values: dict[int, Tensor] = {}

        def put_mlp(activation: Tensor, hook: object) -> Tensor:
            patched = activation.clone()
            for variant, (sender, receiver) in enumerate(edges):
                if receiver.kind == "mlp":
                    patched[variant * batch : (variant + 1) * batch, 0] = inputs.mlp[1 + sender, :, layer].to(patched)
            return patched

        def put_value(z: Tensor, hook: object) -> Tensor:
            patched = z.clone()
            group = z.shape[2] // changes.shape[3]
            for variant, (sender, receiver) in enumerate(edges):
                if receiver.kind == "v":
                    for head in receiver.heads:
                        # P0 attends to itself alone: what a head reads there is its value.
                        patched[variant * batch : (variant + 1) * batch, 0, head] += changes[
                            sender, :, layer, head // group
                        ]
            return patched

        def note(activation: Tensor, hook: object, into: dict[int, Tensor], at: int) -> None:
            into[at] = by_variant(activation[:, 0], variants).clone()

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
        stream = repeated(inputs.stream[:, layer, None], variants)
        resume(self.model, stream, layer, hooks=hooks, stop_at_layer=end)
        return keys, values
