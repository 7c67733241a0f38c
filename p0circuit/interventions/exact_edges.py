"""Exact effects of edges at P0 on a metric, each from a run of its own: step 6 of the edge search (`edge_search`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.metrics import Metric, Rows
from p0circuit.interventions.nodes import Node
from p0circuit.interventions.receiver_inputs import (
    InputPatch,
    InputsAtP0,
    Variant,
    clean_streams,
    measure_inputs,
    read_at_p0,
)
from p0circuit.interventions.receivers import NodeEdge, Receiver, Targets
from p0circuit.models import describe, device_of
from p0circuit.models.memory import return_freed_memory
from p0circuit.prompts import PromptSet


@dataclass(eq=False)
class ExactEdges:
    """Edges that are patched each in a run of its own, on all rows, while the budget of passes lasts.

    Attributes:
        model: a hooked model.
        prompts: the clean prompts.
        metric: the metric.
        nodes: the senders.
        values: new values of the senders at P0.
        targets: receivers by name.
        budget: passes over the prompts that may be run.
        spent: passes that have been run.
        effects: effects by edge.
    """

    model: HookedModel
    prompts: PromptSet
    metric: Metric
    nodes: Sequence[Node]
    values: Mapping[Node, Tensor]
    targets: Targets
    budget: float
    spent: float = 0.0
    effects: dict[NodeEdge, Float[Tensor, " batch"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device = device_of(self.model)
        parts = (self.prompts.ids, self.prompts.attention_mask, self.prompts.p0)
        self.rows = Rows(*(part.to(device) for part in parts))
        end = self.metric.end(self.model)
        self.below = dict(clean_streams(self.model, self.rows, self.metric, range(end + 1)))
        self.clean = self.metric.value(self.below[end][1])

    def cost(self, pair: NodeEdge | None) -> float:
        """Return the passes that an edge takes, from its first receiver to the metric's last block.

        Args:
            pair: the edge; if None, one through half of the blocks.
        """
        end, layers = self.metric.end(self.model), describe(self.model).n_layers
        start = end / 2 if pair is None else min(member.layer for member in self.targets[pair[1]])
        return max(0.0, end - start) / layers

    def run(self, pairs: Sequence[NodeEdge], reserve: float, at_least: int = 0) -> list[NodeEdge]:
        """Patch edges that were not patched yet, in their order, while the budget lasts.

        Args:
            pairs: the edges.
            reserve: passes of the budget that are left over.
            at_least: number of edges that are patched whatever they take.

        Returns:
            The edges that were patched.
        """
        to_run = []
        for pair in pairs:
            if pair in self.effects:
                continue
            cost = self.cost(pair)
            if self.spent + cost > self.budget - reserve and len(to_run) >= at_least:
                break
            self.spent += cost
            to_run.append(pair)
        if not to_run:
            return []
        used = [node for node in self.nodes if any(node == sender for sender, _ in to_run)]
        end = 1 + max(member.layer for _, name in to_run for member in self.targets[name])
        tokens = self.rows.ids[torch.arange(self.prompts.n, device=self.rows.position.device), self.rows.position]
        inputs = read_at_p0(self.model, tokens, used, self.values, end)
        variants = [_variant(inputs, 1 + used.index(sender), self.targets[name]) for sender, name in to_run]
        return_freed_memory()
        effects = measure_inputs(self.model, self.rows, self.metric, variants, self.below) - self.clean
        self.effects |= dict(zip(to_run, effects.cpu(), strict=True))
        return to_run


def _variant(inputs: InputsAtP0, number: int, members: Sequence[Receiver]) -> Variant:
    """What each member of a receiver is given from a sender, as patches of one run."""
    patches = []
    for member in members:
        if member.kind == "k":
            new = inputs.key[number, :, member.layer]
        elif member.kind == "v":
            new = inputs.value[number, :, member.layer] - inputs.value[0, :, member.layer]
        else:
            new = inputs.mlp[number, :, member.layer]
        patches.append(InputPatch(member.kind, member.layer, member.heads, new))  # pyright: ignore[reportArgumentType]
    return patches
