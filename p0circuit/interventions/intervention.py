"""An intervention: edits tied to the nodes of a model, to prompts, and to a position in each of their rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.edits import at_least_float32, row_indices
from p0circuit.interventions.nodes import InterventionError, Node, nodes_of
from p0circuit.interventions.pairs import PromptPair, patch_values, values_at
from p0circuit.models import describe, forward
from p0circuit.models.hooks import Hook, hooked
from p0circuit.prompts import PromptSet

Change = Callable[[Tensor, slice], Tensor | None]
"""Function of an activation and of which prompts are in it; returns the new activation, or None for no change."""
Argument = Tensor | Mapping[Node, Tensor] | Callable[[Tensor, slice], Tensor]
"""An argument of a pure function besides the output of the node: a tensor with one row per prompt, the same for all
nodes or one per node; or a function of the activation at all positions and of which prompts are in it."""
Given = Literal["zero", "mean", "resample"] | Tensor | Mapping[Node, Tensor]
"""The new value of a node: "zero"; "mean" over the positions after P0 of the same prompt; "resample", the output at the
same position of the next prompt; a tensor [value] or [batch, value] for all nodes; or one per node, as `values_at` and
`patch_values` return them."""
Offset = int | Int[Tensor, " batch"]
"""A position in tokens after P0: one for all prompts, or one per prompt."""


@dataclass(frozen=True, eq=False)
class Intervention:
    """Changes of a model's activations, made for one set of prompts.

    Inside a `with` block its hooks are on the model, and expect all prompts in one batch. At the end of the block they
    are removed, also after an exception. `record(..., interventions=[...])` runs the prompts in batches of any size.

    Attributes:
        model: the model.
        prompts: the prompts it was made for.
        changes: hook points, each with the function that changes its activation.
    """

    model: HookedModel = field(repr=False)
    prompts: PromptSet
    changes: tuple[tuple[str, Change], ...] = field(repr=False)
    _entered: list[AbstractContextManager[None]] = field(default_factory=list, init=False, repr=False)

    def hooks(self, rows: slice = slice(None)) -> list[Hook]:
        """Return the hooks for a batch. In a batch of another shape they raise `InterventionError`.

        Args:
            rows: which of the prompts are in the batch.
        """
        return [(name, functools.partial(self._apply, name, change, rows)) for name, change in self.changes]

    def __enter__(self) -> Intervention:
        context = hooked(self.model, self.hooks())
        context.__enter__()
        self._entered.append(context)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return self._entered.pop().__exit__(kind, exception, traceback)

    def _apply(self, name: str, change: Change, rows: slice, activation: Tensor, hook: object) -> Tensor | None:
        expected = (len(range(self.prompts.n)[rows]), self.prompts.length)
        shape = (len(activation), activation.shape[2 if name.endswith(("pattern", "scores")) else 1])
        if shape != expected:
            raise InterventionError(
                f"an intervention made for {expected[0]} prompts of {expected[1]} tokens met {shape[0]} of {shape[1]}: "
                "make it for the prompts that are run; run them in one batch, or by record(..., interventions=[...])"
            )
        return change(activation, rows)


@torch.no_grad()
def p0_direction(model: HookedModel, prompts: PromptSet, layer: int) -> Float[Tensor, " d_model"]:
    """Compute the mean direction of the residual stream at P0, as a vector of norm 1.

    P0 attends only to itself, so prompts of one token give its residual stream exactly. The mean is that of unit
    vectors, as in `sink.direction_cosines`.

    Args:
        model: a hooked model.
        prompts: the prompts.
        layer: block before which the stream is read; the number of layers for the stream after the last block.
    """
    first = prompts.ids[row_indices(prompts.ids), prompts.p0]
    residual = forward(model, first[:, None], stop_at_layer=layer)[:, 0]
    return normalize(normalize(at_least_float32(residual), dim=-1).mean(0), dim=-1)


def positions_of(prompts: PromptSet, offset: Offset) -> Int[Tensor, " batch"]:
    """Return the index in each prompt of a position counted from P0.

    Args:
        prompts: the prompts.
        offset: position, in tokens after P0.

    Raises:
        InterventionError: the position lies outside the prompts.
    """
    offsets = torch.as_tensor(offset)
    if tuple(offsets.shape) not in ((), (prompts.n,)):
        raise InterventionError(f"expected one offset, or one for each of {prompts.n} rows, got {list(offsets.shape)}")
    positions = prompts.p0 + offsets
    if bool((offsets < 0).any()) or int(positions.max()) >= prompts.length:
        most = prompts.length - 1 - int(prompts.p0.max())
        raise InterventionError(f"position {offset} after P0 lies outside the prompts; expected 0 to {most}")
    return positions


def edit_nodes(
    model: HookedModel,
    prompts: PromptSet,
    nodes: Sequence[Node],
    positions: Int[Tensor, " batch"],
    change: Callable[..., Tensor],
    *arguments: Argument,
) -> Intervention:
    """Replace the output of each node at one position by `change(output, *arguments)`.

    Args:
        model: a hooked model.
        prompts: the prompts that will be run.
        nodes: the nodes.
        positions: index of the position in each prompt.
        change: function of the outputs [batch, value] and the arguments.
        *arguments: further arguments of `change`.
    """

    def argument_for(node: Node, argument: Argument, stream: Tensor, rows: slice) -> Tensor:
        if isinstance(argument, Mapping):
            argument = argument[node]
        value = argument[rows] if isinstance(argument, Tensor) else argument(stream, rows)
        return value.to(stream)

    def edit(activation: Tensor, rows: slice, group: list[Node]) -> Tensor:
        new = activation.clone()
        at: tuple[Any, ...] = (row_indices(activation), positions[rows].to(activation.device))
        for node in group:
            stream = at_least_float32(activation if node.index is None else activation[:, :, node.index])
            value = change(stream[at], *(argument_for(node, argument, stream, rows) for argument in arguments))
            new[at if node.index is None else (*at, node.index)] = value.to(new)
        return new

    # One hook per hook point, so that a hundred neurons of a layer need only one copy of its activation.
    groups: dict[str, list[Node]] = {}
    for node in nodes:
        groups.setdefault(node.hook, []).append(node)
    changes = [(hook, functools.partial(edit, group=group)) for hook, group in groups.items()]
    return Intervention(model, prompts, tuple(changes))


def edit_attention(
    model: HookedModel,
    prompts: PromptSet,
    names: Sequence[str | Node],
    point: Literal["hook_pattern", "hook_attn_scores"],
    change: Callable[..., Tensor],
    *positions: Int[Tensor, " batch"],
) -> Intervention:
    """Replace the attention of heads by `change(attention, *positions)`.

    Args:
        model: a hooked model.
        prompts: the prompts that will be run.
        names: heads, as nodes: `attn.LAYER` for all heads of a block, or `attn.LAYER.HEAD`.
        point: hook point: attention weights, or scores before the softmax.
        change: function of the attention [batch, head, query, key] and the positions.
        *positions: index of a position in each prompt.
    """

    def edit(attention: Tensor, rows: slice, heads: list[int]) -> Tensor:
        new = attention.clone()
        new[:, heads] = change(attention[:, heads], *(position[rows].to(attention.device) for position in positions))
        return new

    by_layer = heads_by_layer(names, model)
    changes = [(f"blocks.{layer}.attn.{point}", functools.partial(edit, heads=by_layer[layer])) for layer in by_layer]
    return Intervention(model, prompts, tuple(changes))


def heads_by_layer(names: Sequence[str | Node], model: HookedModel) -> dict[int, list[int]]:
    """List the numbers of heads by layer.

    Args:
        names: heads, as nodes: `attn.LAYER` for all heads of a block, or `attn.LAYER.HEAD`.
        model: a hooked model.

    Raises:
        InterventionError: a node is not attention, or does not exist.
    """
    numbers: dict[int, set[int]] = {}
    for node in nodes_of(names, model):
        if node.kind not in ("attn", "head"):
            raise InterventionError(f"{node} has no attention; expected attn.LAYER or attn.LAYER.HEAD")
        heads = range(describe(model).n_heads) if node.index is None else [node.index]
        numbers.setdefault(node.layer, set()).update(heads)
    return {layer: sorted(heads) for layer, heads in numbers.items()}


def vector_nodes(names: Sequence[str | Node], model: HookedModel) -> list[Node]:
    """Parse the names of nodes whose output is a vector.

    Args:
        names: names or nodes.
        model: a hooked model.

    Raises:
        InterventionError: a node is a neuron, or does not exist.
    """
    nodes = nodes_of(names, model)
    for node in nodes:
        if node.kind == "neuron":
            raise InterventionError(f"{node} is a number and has neither norm nor direction; use ablate")
    return nodes


def resolve_values(
    model: HookedModel, prompts: PromptSet, nodes: Sequence[Node], given: Given, positions: Int[Tensor, " batch"]
) -> dict[Node, Float[Tensor, "batch ..."]]:
    """Turn the new value of nodes into one tensor per node, with one row per prompt.

    Args:
        model: a hooked model.
        prompts: the prompts.
        nodes: the nodes.
        given: the new value, of any form that `Given` allows.
        positions: index in each prompt of the position that is changed.

    Raises:
        InterventionError: there is no second prompt to resample from, or values are missing, not finite or of another
            shape.
    """
    if given == "mean":
        return patch_values(model, PromptPair(prompts, prompts, 0), nodes, "mean")
    if given == "resample":
        if prompts.n == 1:
            raise InterventionError("there is no other row to resample from; expected at least 2 prompts")
        return {node: value.roll(-1, 0) for node, value in values_at(model, prompts, nodes, positions).items()}
    if isinstance(given, str) and given != "zero":
        raise InterventionError(f"cannot replace by {given!r}; expected zero, mean, resample or a tensor")
    info = describe(model)
    values = {}
    for node in nodes:
        shape = {"neuron": (), "head": (info.d_head,)}.get(node.kind, (info.d_model,))
        if isinstance(given, Mapping) and node not in given:
            raise InterventionError(f"no value was given for {node}, only for {', '.join(map(str, given))}")
        value = torch.zeros(shape) if given == "zero" else given[node] if isinstance(given, Mapping) else given
        values[node] = one_per_row(str(node), value, prompts.n, shape)
    return values


def resolve_directions(
    model: HookedModel, prompts: PromptSet, nodes: Sequence[Node], given: Given, positions: Int[Tensor, " batch"]
) -> dict[Node, Float[Tensor, "batch ..."]]:
    """Turn the direction for nodes into one tensor per node, as `resolve_values` does.

    Args:
        model: a hooked model.
        prompts: the prompts.
        nodes: the nodes.
        given: the direction, of any form that `Given` allows.
        positions: index in each prompt of the position that is changed.

    Raises:
        InterventionError: as `resolve_values`, or a direction is the zero vector.
    """
    directions = resolve_values(model, prompts, nodes, given, positions)
    for node, value in directions.items():
        if not bool(value.any(dim=-1).all()):
            raise InterventionError(f"{node}: the given direction is the zero vector, which points nowhere")
    return directions


def one_per_row(name: str, given: float | Tensor, n: int, shape: tuple[int, ...] = ()) -> Float[Tensor, "batch ..."]:
    """Expand a number or tensor to one row per prompt.

    Args:
        name: name of the value, for the error.
        given: a value for all prompts, or one per prompt.
        n: number of prompts.
        shape: shape of the value of one prompt.

    Raises:
        InterventionError: the tensor has another shape, or is not finite.
    """
    value = given if isinstance(given, Tensor) else torch.tensor(float(given))
    if tuple(value.shape) not in (shape, (n, *shape)):
        raise InterventionError(
            f"{name}: expected a tensor of shape {list(shape)} or, one per row, {[n, *shape]}, got {list(value.shape)}"
        )
    if not bool(torch.isfinite(value).all()):
        raise InterventionError(f"{name}: the given values hold NaN or infinity")
    return value.expand(n, *shape)
