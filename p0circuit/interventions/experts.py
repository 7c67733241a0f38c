"""A mixture of experts: to which experts a position is routed, what each of them writes, and ablations of experts.

1. `route` runs the router of a block: the experts of each token and their weights. `written_by` computes what some of
   these experts add to the residual stream. The outputs of all experts of a token add up to the output of the MLP.
2. `experts_at` reads both at some positions, for every block, in one pass. `routing` records which experts every
   position is routed to.
3. `remove_experts` sets the output of experts to zero, at one position or at all. The other experts of a token keep
   their weights.

Source: super experts, Su et al. 2025 (arXiv 2507.23279); Oh et al. 2024 (arXiv 2410.01866).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
"""Tolerance of the sum of the experts' outputs against the output of the MLP, relative to its largest number.

It is the larger of `TOLERANCE` and `ROUNDINGS` times the resolution of the dtype. A shared expert, or a norm after the
mixture, exceeds it by far.
"""


@dataclass(frozen=True)
class Experts:
    """The outputs of the experts of one block at one position.

    Attributes:
        weights: weights of the router; 0 for experts that the position is not routed to.
        written: output of each expert times its weight.
        output: output of the MLP, to which the outputs of its experts add up.
        dtype: dtype of the computation.
    """

    weights: Float[Tensor, "sample expert"]
    written: Float[Tensor, "sample expert d_model"]
    output: Float[Tensor, "sample d_model"]
    dtype: torch.dtype

    @property
    def complete(self) -> bool:
        """Whether the experts add up to the output of the MLP; a shared expert or a norm after them prevents it."""
        tolerance = max(TOLERANCE, ROUNDINGS * torch.finfo(self.dtype).eps)
        return bool((self.written.sum(1) - self.output).abs().max() <= tolerance * self.output.abs().max())


def mixture_layers(model: HookedModel) -> list[int]:
    """List the blocks whose MLP is a mixture of experts that `route` supports.

    Args:
        model: a hooked model.
    """
    return [layer for layer, block in enumerate(model.blocks) if _is_mixture(model, block)]


def _is_mixture(model: HookedModel, block: object) -> bool:
    mlp = getattr(block, "mlp", None)
    if describe(model).backend == "hooked":
        return hasattr(mlp, "experts_per_token")
    own = getattr(mlp, "original_component", None)
    return hasattr(own, "gate") and hasattr(own, "experts")


def route(
    model: HookedModel, layer: int, read: Float[Tensor, "row d_model"]
) -> tuple[Int[Tensor, "row used"], Float[Tensor, "row used"]]:
    """Run the router of a block.

    Args:
        model: a hooked model.
        layer: the block.
        read: inputs of the MLP.

    Returns:
        The experts of each row, and their weights.

    Raises:
        InterventionError: the router has another form.
    """
    mlp = model.blocks[layer].mlp
    if describe(model).backend == "hooked":
        weights, experts = mlp.W_gate(read).softmax(-1, dtype=torch.float).topk(mlp.experts_per_token, dim=-1)
        if mlp.cfg.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return experts, weights.to(read)
    routing = mlp.original_component.gate(read)
    if not isinstance(routing, tuple) or len(routing) != 3:
        raise InterventionError(f"mlp.{layer}: its router gives {type(routing).__name__}, not logits, weights, experts")
    _, weights, experts = routing
    return experts, weights


def written_by(
    model: HookedModel,
    layer: int,
    read: Float[Tensor, "row d_model"],
    experts: Int[Tensor, "row used"],
    weights: Float[Tensor, "row used"],
) -> Float[Tensor, "row d_model"]:
    """Compute what experts add to the residual stream: the sum of their outputs times their weights.

    Args:
        model: a hooked model.
        layer: the block.
        read: inputs of the MLP.
        experts: experts of each row.
        weights: their weights.
    """
    mlp = model.blocks[layer].mlp
    if describe(model).backend != "hooked":
        return mlp.original_component.experts(read, experts, weights)
    total = torch.zeros_like(read)
    for number in experts.unique().tolist():
        rows, columns = (experts == number).nonzero(as_tuple=True)
        output = mlp.experts[number](read[rows]) * weights[rows, columns, None]
        total.index_add_(0, rows, output.to(total))
    return total


@torch.no_grad()
def experts_at_p0(model: HookedModel, prompts: PromptSet, layer: int) -> Experts | None:
    """Compute the outputs of the experts of a block at P0.

    Args:
        model: a hooked model.
        prompts: the prompts.
        layer: the block.

    Returns:
        The outputs; None if the MLP is no mixture, or if a shared expert or a norm prevents that the routed experts add
        up to its output.
    """
    if layer not in mixture_layers(model):
        return None
    first = prompts.ids[torch.arange(prompts.n), prompts.p0][:, None].repeat(1, 2)
    alone = PromptSet(first, torch.ones_like(first, dtype=torch.bool), prompts.description, prompts.seed)
    outputs: list[Experts] = []
    experts_at(model, alone, lambda block, offset, here: outputs.append(here), layers=[layer])
    return outputs[0] if outputs[0].complete else None


@torch.no_grad()
def experts_at(
    model: HookedModel,
    prompts: PromptSet,
    see: Callable[[int, int, Experts], None],
    offsets: Sequence[int] = (0,),
    layers: Sequence[int] | None = None,
) -> None:
    """Compute the outputs of the experts of each block at some positions, in one pass over all prompts at once.

    Args:
        model: a hooked model.
        prompts: the prompts; all of them are one batch.
        see: called with (layer, offset, experts) for every block and position; tensors are float32 on the CPU.
        offsets: positions, in tokens after P0.
        layers: the blocks; all mixtures if None.
    """
    layers = mixture_layers(model) if layers is None else layers
    positions = {offset: positions_of(prompts, offset) for offset in offsets}
    rows = torch.arange(prompts.n)

    def look(output: Tensor, read: Tensor, layer: int) -> None:
        for offset, position in positions.items():
            at = (rows.to(read.device), position.to(read.device))
            weights, written = _each(model, layer, read[at])
            see(layer, offset, Experts(weights, written, output[at].float().cpu(), output.dtype))

    hooks = [hook for layer in layers for hook in _around(model, layer, functools.partial(look, layer=layer))]
    forward(model, prompts.ids, prompts.attention_mask, hooks=hooks, stop_at_layer=max(layers) + 1)


def _each(model: HookedModel, layer: int, read: Tensor) -> tuple[Tensor, Tensor]:
    """The weight and output of every expert for each row; 0 where a row is not routed to it."""
    experts, weights = route(model, layer, read)
    rows = torch.arange(len(read))
    every = torch.zeros(len(read), describe(model).experts)
    written = torch.zeros(len(read), describe(model).experts, read.shape[-1])
    for column in range(experts.shape[1]):
        output = written_by(model, layer, read, experts[:, [column]], weights[:, [column]])
        every[rows, experts[:, column].cpu()] = weights[:, column].float().cpu()
        written[rows, experts[:, column].cpu()] = output.float().cpu()
    return every, written


@torch.no_grad()
def routing(model: HookedModel, prompts: PromptSet) -> Bool[Tensor, "sample pos layer expert"]:
    """Record which experts each position is routed to.

    Args:
        model: a hooked model.
        prompts: the prompts.

    Returns:
        Whether a position is routed to an expert; the axis `layer` counts the mixtures (`mixture_layers`).
    """
    layers, count = mixture_layers(model), describe(model).experts
    routed = torch.zeros(prompts.n, prompts.length, len(layers), count, dtype=torch.bool)

    def look(output: Tensor, read: Tensor, number: int, rows: slice) -> None:
        experts, _ = route(model, layers[number], read.flatten(0, 1))
        routed[rows, :, number] = one_hot(experts, count).any(1).view(*read.shape[:2], count).cpu()

    size = batch_size_for(model, prompts.length, with_logits=False)
    for start in range(0, prompts.n, size):
        rows = slice(start, start + size)
        hooks: list[Hook] = []
        for number, layer in enumerate(layers):
            hooks += _around(model, layer, functools.partial(look, number=number, rows=rows))
        forward(model, prompts.ids[rows], prompts.attention_mask[rows], hooks=hooks, stop_at_layer=max(layers) + 1)
    return routed


def remove_experts(
    model: HookedModel, prompts: PromptSet, experts: Sequence[tuple[int, int]], offset: Offset | None = None
) -> Intervention:
    """Set the output of experts to zero.

    This subtracts exactly their contribution, except in models with a norm after the mixture.

    Args:
        model: a hooked model.
        prompts: the prompts that will be run.
        experts: experts as (layer, number).
        offset: position, in tokens after P0; all positions if None.

    Raises:
        InterventionError: there is no such expert, or the position lies outside the prompts.
    """
    info, known = describe(model), mixture_layers(model)
    for layer, number in experts:
        if layer not in known or not 0 <= number < info.experts:
            raise InterventionError(
                f"expert {layer}.{number}: {info.name} has experts 0 to {info.experts - 1} in the layers {known}"
            )
    positions = None if offset is None else positions_of(prompts, offset)

    def keep(activation: Tensor, rows: slice, reads: Callable[[Tensor], Tensor], seen: list[Tensor]) -> None:
        seen[:] = [reads(activation)]

    def change(output: Tensor, rows: slice, layer: int, numbers: Tensor, seen: list[Tensor]) -> Tensor | None:
        read = seen.pop().flatten(0, 1)
        routed, weights = route(model, layer, read)
        without = torch.isin(routed, numbers.to(routed))
        if positions is not None:
            without = without & one_hot(positions[rows].to(routed), prompts.length).bool().flatten()[:, None]
        hit = without.any(1)
        if not bool(hit.any()):
            return None
        new = output.flatten(0, 1).clone()
        new[hit] -= written_by(model, layer, read[hit], routed[hit], weights[hit] * without[hit]).to(new)
        return new.view_as(output)

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
    """The hook that the input of the MLP is read at, and the function that computes it from the activation."""
    if describe(model).backend == "bridge":
        return f"blocks.{layer}.mlp.hook_in", lambda activation: activation
    norm = model.blocks[layer].ln2
    return f"blocks.{layer}.ln2.hook_normalized", lambda activation: activation.to(norm.w) * norm.w


def _around(model: HookedModel, layer: int, see: Callable[[Tensor, Tensor], Tensor | None]) -> list[Hook]:
    """Hooks that call `see` with the output of the MLP and its input."""
    name, reads = _reading(model, layer)
    seen: list[Tensor] = []

    def keep(activation: Tensor, hook: object) -> None:
        seen[:] = [reads(activation)]

    def both(activation: Tensor, hook: object) -> None:
        see(activation, seen.pop())

    return [(name, keep), (f"blocks.{layer}.hook_mlp_out", both)]
