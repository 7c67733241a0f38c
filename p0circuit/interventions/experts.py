"""A mixture of experts at P0: which experts it is routed to, and what each of them writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from p0circuit.interventions.contrast import values_at
from p0circuit.interventions.nodes import Node
from p0circuit.models import describe, forward
from p0circuit.prompts import PromptSet

TOLERANCE = 1e-3
"""How far the sum of what the experts write may be from the MLP's output, relative to its largest number."""


@dataclass(frozen=True)
class Experts:
    """What the experts of one block write at P0.

    Attributes:
        weights: of the router, 0 where P0 is not routed to an expert.
        written: the expert's output times its weight.
        output: the MLP's own output; its experts' outputs add up to it.
    """

    weights: Float[Tensor, "sample expert"]
    written: Float[Tensor, "sample expert d_model"]
    output: Float[Tensor, "sample d_model"]


@torch.no_grad()
def experts_at_p0(model: Any, prompts: PromptSet, layer: int) -> Experts | None:
    """Run P0's own stream through the router and every expert of a block; None where its MLP is no plain mixture.

    A mixture with a shared expert, or a norm after it, does not add up to its routed experts and gives None.
    """
    count = describe(model).experts
    mlp = model.blocks[layer].mlp
    read: list[Tensor] = []
    handle = mlp.register_forward_pre_hook(lambda module, given: read.append(given[0][:, 0]))
    first = prompts.ids[torch.arange(prompts.n), prompts.p0][:, None]
    try:
        forward(model, first, stop_at_layer=layer + 1)
    finally:
        handle.remove()
    routed = _hooked(mlp, read[0]) if describe(model).backend == "hooked" else _bridged(mlp, read[0])
    if routed is None:
        return None
    weights = torch.zeros(prompts.n, count)
    written = torch.zeros(prompts.n, count, read[0].shape[-1])
    rows = torch.arange(prompts.n)
    for chosen, weight, out in routed:
        weights[rows, chosen.cpu()] = weight.float().cpu()
        written[rows, chosen.cpu()] = out.float().cpu()
    one = PromptSet(first.repeat(1, 2), torch.ones(prompts.n, 2, dtype=torch.bool), prompts.description, prompts.seed)
    output = values_at(model, one, [Node("mlp", layer)])[Node("mlp", layer)].float().cpu()
    error = (written.sum(1) - output).abs().max()
    return Experts(weights, written, output) if error <= TOLERANCE * output.abs().max() else None


def _hooked(mlp: Any, read: Tensor) -> list[tuple[Tensor, Tensor, Tensor]] | None:
    """For each of the experts a row is routed to: which it is, its weight, and what it writes."""
    if not hasattr(mlp, "experts_per_token"):
        return None
    weights, chosen = mlp.W_gate(read).softmax(-1, dtype=torch.float).topk(mlp.experts_per_token, dim=-1)
    if mlp.cfg.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    said = torch.stack([expert(read) for expert in mlp.experts], dim=1)
    rows = torch.arange(len(read), device=read.device)
    routed = zip(chosen.T, weights.T.to(read), strict=True)
    return [(expert, weight, said[rows, expert] * weight[:, None]) for expert, weight in routed]


def _bridged(mlp: Any, read: Tensor) -> list[tuple[Tensor, Tensor, Tensor]] | None:
    own = mlp.original_component
    if not hasattr(own, "gate") or not hasattr(own, "experts"):
        return None
    routing = own.gate(read)
    if not isinstance(routing, tuple) or len(routing) != 3:
        return None
    _, weights, chosen = routing
    return [
        (chosen[:, place], weights[:, place], own.experts(read, chosen[:, [place]], weights[:, [place]]))
        for place in range(chosen.shape[1])
    ]
