"""A mixture of experts: which experts a position is routed to, what each of them writes there, and runs without some.

1. `route` asks a block's router for the experts of each token and their weights; `written_by` gives what chosen ones
   among them add to the stream. What all of a token's experts write adds up to the MLP's output.
2. `experts_at` reads both at some positions, for every block, in one pass; `routing` counts who is routed where.
3. `remove_experts` takes what experts write away, at one position or at all: their output is zero, and those that a
   token is routed to beside them keep their weights.

Source: super experts, Su et al. 2025 (arXiv 2507.23279); Oh et al. 2024 (arXiv 2410.01866).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.intervention import Change, Intervention, Offset, positions_of
from p0circuit.interventions.nodes import InterventionError
from p0circuit.models import describe, forward
from p0circuit.models.hooks import Hook
from p0circuit.prompts import PromptSet
from p0circuit.recording.batch_size import batch_size_for

TOLERANCE, ROUNDINGS = 1e-3, 4
"""How far the sum of what the experts write may be from the MLP's output, relative to its largest number: this, or so
many roundings in the model's dtype, whichever is more. A shared expert, or a norm, makes it differ by far more."""


@dataclass(frozen=True)
class Experts:
    """What the experts of one block write at one position.

    Attributes:
        weights: of the router, 0 where the position is not routed to an expert.
        written: the expert's output times its weight.
        output: the MLP's own output; its experts' outputs add up to it.
        dtype: in which all this was computed.
    """

    weights: Float[Tensor, "sample expert"]
    written: Float[Tensor, "sample expert d_model"]
    output: Float[Tensor, "sample d_model"]
    dtype: torch.dtype

    @property
    def complete(self) -> bool:
        """Whether the experts add up to the MLP's output: not with a shared expert, nor with a norm after them."""
        tolerance = max(TOLERANCE, ROUNDINGS * torch.finfo(self.dtype).eps)
        return bool((self.written.sum(1) - self.output).abs().max() <= tolerance * self.output.abs().max())


def mixture_layers(model: HookedModel) -> list[int]:
    """The blocks whose MLP is a mixture of experts that `route` knows how to ask."""
    return [layer for layer, block in enumerate(model.blocks) if _is_mixture(model, block)]


def _is_mixture(model: HookedModel, block: Any) -> bool:
    mlp = getattr(block, "mlp", None)
    if describe(model).backend == "hooked":
        return hasattr(mlp, "experts_per_token")
    own = getattr(mlp, "original_component", None)
    return hasattr(own, "gate") and hasattr(own, "experts")


def route(
    model: HookedModel, layer: int, read: Float[Tensor, "row d_model"]
) -> tuple[Int[Tensor, "row used"], Float[Tensor, "row used"]]:
    """The experts that a block's router chooses for what its MLP reads, and their weights."""
    mlp = model.blocks[layer].mlp
    if describe(model).backend == "hooked":
        weights, chosen = mlp.W_gate(read).softmax(-1, dtype=torch.float).topk(mlp.experts_per_token, dim=-1)
        if mlp.cfg.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return chosen, weights.to(read)
    routing = mlp.original_component.gate(read)
    if not isinstance(routing, tuple) or len(routing) != 3:
        raise InterventionError(f"mlp.{layer}: its router gives {type(routing).__name__}, not logits, weights, experts")
    _, weights, chosen = routing
    return chosen, weights


def written_by(
    model: HookedModel,
    layer: int,
    read: Float[Tensor, "row d_model"],
    chosen: Int[Tensor, "row used"],
    weights: Float[Tensor, "row used"],
) -> Float[Tensor, "row d_model"]:
    """What experts add to the stream: the sum over those chosen for a row of their output times their weight."""
    mlp = model.blocks[layer].mlp
    if describe(model).backend != "hooked":
        return mlp.original_component.experts(read, chosen, weights)
    total = torch.zeros_like(read)
    for number in chosen.unique().tolist():
        rows, places = (chosen == number).nonzero(as_tuple=True)
        said = mlp.experts[number](read[rows]) * weights[rows, places, None]
        total.index_add_(0, rows, said.to(total))
    return total


@torch.no_grad()
def experts_at_p0(model: HookedModel, prompts: PromptSet, layer: int) -> Experts | None:
    """Run P0's own stream through the router and every expert of a block; None where its MLP is no plain mixture.

    A mixture with a shared expert, or a norm after it, does not add up to its routed experts and gives None.
    """
    if layer not in mixture_layers(model):
        return None
    first = prompts.ids[torch.arange(prompts.n), prompts.p0][:, None].repeat(1, 2)
    alone = PromptSet(first, torch.ones_like(first, dtype=torch.bool), prompts.description, prompts.seed)
    found: list[Experts] = []
    experts_at(model, alone, lambda block, offset, here: found.append(here), layers=[layer])
    return found[0] if found[0].complete else None


@torch.no_grad()
def experts_at(
    model: HookedModel,
    prompts: PromptSet,
    see: Callable[[int, int, Experts], None],
    offsets: Sequence[int] = (0,),
    layers: Sequence[int] | None = None,
) -> None:
    """Show `see(layer, offset, experts)` what the experts of each block write at some positions, in one pass.

    All rows are run in one batch: for a few prompts. What is shown is float32 and on the CPU.
    """
    layers = mixture_layers(model) if layers is None else layers
    places = {offset: positions_of(prompts, offset) for offset in offsets}
    rows = torch.arange(prompts.n)

    def look(output: Tensor, read: Tensor, layer: int) -> None:
        for offset, place in places.items():
            at = (rows.to(read.device), place.to(read.device))
            weights, written = _each(model, layer, read[at])
            see(layer, offset, Experts(weights, written, output[at].float().cpu(), output.dtype))

    hooks = [hook for layer in layers for hook in _around(model, layer, functools.partial(look, layer=layer))]
    forward(model, prompts.ids, prompts.attention_mask, hooks=hooks, stop_at_layer=max(layers) + 1)


def _each(model: HookedModel, layer: int, read: Tensor) -> tuple[Tensor, Tensor]:
    """The weight of every expert for each row, and what it writes; 0 where a row is not routed to it."""
    chosen, weights = route(model, layer, read)
    rows = torch.arange(len(read))
    every = torch.zeros(len(read), describe(model).experts)
    written = torch.zeros(len(read), describe(model).experts, read.shape[-1])
    for place in range(chosen.shape[1]):
        said = written_by(model, layer, read, chosen[:, [place]], weights[:, [place]])
        every[rows, chosen[:, place].cpu()] = weights[:, place].float().cpu()
        written[rows, chosen[:, place].cpu()] = said.float().cpu()
    return every, written


@torch.no_grad()
def routing(model: HookedModel, prompts: PromptSet) -> Bool[Tensor, "sample pos layer expert"]:
    """Which experts each position is routed to; `layer` counts the mixtures (`mixture_layers`)."""
    layers, count = mixture_layers(model), describe(model).experts
    found = torch.zeros(prompts.n, prompts.length, len(layers), count, dtype=torch.bool)

    def look(output: Tensor, read: Tensor, number: int, rows: slice) -> None:
        chosen, _ = route(model, layers[number], read.flatten(0, 1))
        found[rows, :, number] = one_hot(chosen, count).any(1).view(*read.shape[:2], count).cpu()

    size = batch_size_for(model, prompts.length, with_logits=False)
    for start in range(0, prompts.n, size):
        rows = slice(start, start + size)
        hooks: list[Hook] = []
        for number, layer in enumerate(layers):
            hooks += _around(model, layer, functools.partial(look, number=number, rows=rows))
        forward(model, prompts.ids[rows], prompts.attention_mask[rows], hooks=hooks, stop_at_layer=max(layers) + 1)
    return found


def remove_experts(
    model: HookedModel, prompts: PromptSet, experts: Sequence[tuple[int, int]], offset: Offset | None = None
) -> Intervention:
    """Take what experts, given as (layer, number), write away: at the position `offset` after P0, or at all of them.

    Exactly their contribution, except where a norm stands after the mixture.

    Raises:
        InterventionError: there is no such expert, or the position lies outside the prompts.
    """
    info, known = describe(model), mixture_layers(model)
    for layer, number in experts:
        if layer not in known or not 0 <= number < info.experts:
            raise InterventionError(
                f"expert {layer}.{number}: {info.name} has experts 0 to {info.experts - 1} in the layers {known}"
            )
    place = None if offset is None else positions_of(prompts, offset)

    def keep(activation: Tensor, rows: slice, reads: Callable[[Tensor], Tensor], seen: list[Tensor]) -> None:
        seen[:] = [reads(activation)]

    def change(output: Tensor, rows: slice, layer: int, numbers: Tensor, seen: list[Tensor]) -> Tensor | None:
        read = seen.pop().flatten(0, 1)
        chosen, weights = route(model, layer, read)
        without = torch.isin(chosen, numbers.to(chosen))
        if place is not None:
            without = without & one_hot(place[rows].to(chosen), prompts.length).bool().flatten()[:, None]
        hit = without.any(1)
        if not bool(hit.any()):
            return None
        changed = output.flatten(0, 1).clone()
        changed[hit] -= written_by(model, layer, read[hit], chosen[hit], weights[hit] * without[hit]).to(changed)
        return changed.view_as(output)

    changes: list[tuple[str, Change]] = []
    for layer in sorted({layer for layer, _ in experts}):
        numbers, seen = torch.tensor([number for block, number in experts if block == layer]), []
        name, reads = _reading(model, layer)
        changes += [
            (name, functools.partial(keep, reads=reads, seen=seen)),
            (f"blocks.{layer}.hook_mlp_out", functools.partial(change, layer=layer, numbers=numbers, seen=seen)),
        ]
    return Intervention(model, prompts, tuple(changes))


def _reading(model: HookedModel, layer: int) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The hook from which the MLP's input can be had, and how."""
    if describe(model).backend == "bridge":
        return f"blocks.{layer}.mlp.hook_in", lambda activation: activation
    norm = model.blocks[layer].ln2
    return f"blocks.{layer}.ln2.hook_normalized", lambda activation: activation.to(norm.w) * norm.w


def _around(model: HookedModel, layer: int, see: Callable[[Tensor, Tensor], Tensor | None]) -> list[Hook]:
    """Hooks that show the MLP's output together with its input."""
    name, reads = _reading(model, layer)
    seen: list[Tensor] = []

    def keep(activation: Tensor, hook: Any) -> None:
        seen[:] = [reads(activation)]

    def both(activation: Tensor, hook: Any) -> None:
        see(activation, seen.pop())

    return [(name, keep), (f"blocks.{layer}.hook_mlp_out", both)]
