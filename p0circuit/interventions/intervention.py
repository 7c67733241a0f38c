"""An intervention: edits tied to the nodes of a model, to prompts, and to a position in each of their rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
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
"""Gets an activation and which rows of the prompts it holds; returns what takes its place, None for no change."""
Argument = Tensor | Mapping[Node, Tensor] | Callable[[Tensor, slice], Tensor]
"""What a pure function needs beside a node's value: a row for every prompt, the same for all nodes or for each, or
found in the pass from the values at all positions and which rows these are."""
Given = Literal["zero", "mean", "resample"] | Tensor | Mapping[Node, Tensor]
"""What to put somewhere: "zero"; "mean" over the row's positions after P0; "resample", the next row's value at the
same place; a tensor [value] or [batch, value] for all nodes; or one per node, as `values_at` and `patch_values` give.
"""
Offset = int | Int[Tensor, " batch"]
"""A position counted from P0, for all rows or for each."""


@dataclass(frozen=True, eq=False)
class Intervention:
    """ArchitectureEdits to what a model computes, made for the rows of one set of prompts.

    Under `with` its hooks stand on the model and expect all rows of the prompts in one batch; leaving the block takes
    them off, exceptions included. `record(..., interventions=[...])` takes the prompts in batches of any size.
    """

    model: HookedModel = field(repr=False)
    prompts: PromptSet
    changes: tuple[tuple[str, Change], ...] = field(repr=False)
    _entered: list[AbstractContextManager[None]] = field(default_factory=list, init=False, repr=False)

    def hooks(self, rows: slice = slice(None)) -> list[Hook]:
        """The hooks for a batch of these rows of the prompts.

        Raises:
            InterventionError: from the hooks, when they meet a batch of another shape.
        """
        return [(name, functools.partial(self._apply, name, change, rows)) for name, change in self.changes]

    def __enter__(self) -> Intervention:
        context = hooked(self.model, self.hooks())
        context.__enter__()
        self._entered.append(context)
        return self

    def __exit__(self, *exception: Any) -> bool | None:
        return self._entered.pop().__exit__(*exception)

    def _apply(self, name: str, change: Change, rows: slice, activation: Tensor, hook: Any) -> Tensor | None:
        expected = (len(range(self.prompts.n)[rows]), self.prompts.length)
        met = (len(activation), activation.shape[2 if name.endswith(("pattern", "scores")) else 1])
        if met != expected:
            raise InterventionError(
                f"an intervention made for {expected[0]} prompts of {expected[1]} tokens met {met[0]} of {met[1]}: "
                "make it for the prompts that are run; run them in one batch, or by record(..., interventions=[...])"
            )
        return change(activation, rows)


# What they share


@torch.no_grad()
def p0_direction(model: HookedModel, prompts: PromptSet, layer: int) -> Float[Tensor, " d_model"]:
    """The mean direction, of norm 1, of the residual stream at P0 before block `layer`.

    P0 sees itself alone, so rows of one token give its stream exactly. `layer` equal to the number of layers is the
    stream after the last block. The mean is that of unit vectors, as in `sink.direction_cosines`.
    """
    first = prompts.ids[row_indices(prompts.ids), prompts.p0]
    residual = forward(model, first[:, None], stop_at_layer=layer)[:, 0]
    return normalize(normalize(at_least_float32(residual), dim=-1).mean(0), dim=-1)


def positions_of(prompts: PromptSet, offset: Offset) -> Int[Tensor, " batch"]:
    """The index in each row of the position `offset` places after P0.

    Raises:
        InterventionError: it lies outside the prompts.
    """
    offsets = torch.as_tensor(offset)
    if tuple(offsets.shape) not in ((), (prompts.n,)):
        raise InterventionError(f"expected one offset, or one for each of {prompts.n} rows, got {list(offsets.shape)}")
    place = prompts.p0 + offsets
    if bool((offsets < 0).any()) or int(place.max()) >= prompts.length:
        most = prompts.length - 1 - int(prompts.p0.max())
        raise InterventionError(f"position {offset} after P0 lies outside the prompts; expected 0 to {most}")
    return place


def edit_nodes(
    model: HookedModel,
    prompts: PromptSet,
    nodes: Sequence[Node],
    place: Int[Tensor, " batch"],
    change: Callable[..., Tensor],
    *arguments: Argument,
) -> Intervention:
    """Put `change(value, *arguments)` in the place of each node's value at one position."""

    def argument_for(node: Node, argument: Argument, stream: Tensor, rows: slice) -> Tensor:
        if isinstance(argument, Mapping):
            argument = argument[node]
        found = argument[rows] if isinstance(argument, Tensor) else argument(stream, rows)
        return found.to(stream)

    def changed(activation: Tensor, rows: slice, group: list[Node]) -> Tensor:
        new = activation.clone()
        at: tuple[Any, ...] = (row_indices(activation), place[rows].to(activation.device))
        for node in group:
            stream = at_least_float32(activation if node.index is None else activation[:, :, node.index])
            value = change(stream[at], *(argument_for(node, argument, stream, rows) for argument in arguments))
            new[at if node.index is None else (*at, node.index)] = value.to(new)
        return new

    # One hook per hook point: a hundred neurons of a layer cost one copy of its activation.
    groups: dict[str, list[Node]] = {}
    for node in nodes:
        groups.setdefault(node.hook, []).append(node)
    changes = [(hook, functools.partial(changed, group=group)) for hook, group in groups.items()]
    return Intervention(model, prompts, tuple(changes))


def edit_attention(
    model: HookedModel,
    prompts: PromptSet,
    names: Sequence[str | Node],
    point: Literal["hook_pattern", "hook_attn_scores"],
    change: Callable[..., Tensor],
    *positions: Int[Tensor, " batch"],
) -> Intervention:
    """Put `change(attention of the heads, *positions)` in its place."""

    def changed(attention: Tensor, rows: slice, chosen: list[int]) -> Tensor:
        new = attention.clone()
        new[:, chosen] = change(attention[:, chosen], *(place[rows].to(attention.device) for place in positions))
        return new

    by_layer = heads_by_layer(names, model)
    changes = [
        (f"blocks.{layer}.attn.{point}", functools.partial(changed, chosen=by_layer[layer])) for layer in by_layer
    ]
    return Intervention(model, prompts, tuple(changes))


def heads_by_layer(names: Sequence[str | Node], model: HookedModel) -> dict[int, list[int]]:
    found: dict[int, set[int]] = {}
    for node in nodes_of(names, model):
        if node.kind not in ("attn", "head"):
            raise InterventionError(f"{node} has no attention; expected attn.LAYER or attn.LAYER.HEAD")
        heads = range(describe(model).n_heads) if node.index is None else [node.index]
        found.setdefault(node.layer, set()).update(heads)
    return {layer: sorted(heads) for layer, heads in found.items()}


def vector_nodes(names: Sequence[str | Node], model: HookedModel) -> list[Node]:
    nodes = nodes_of(names, model)
    for node in nodes:
        if node.kind == "neuron":
            raise InterventionError(f"{node} is a number and has neither norm nor direction; use ablate")
    return nodes


def resolve_values(
    model: HookedModel, prompts: PromptSet, nodes: Sequence[Node], given: Given, place: Int[Tensor, " batch"]
) -> dict[Node, Float[Tensor, "batch ..."]]:
    """What was given as one tensor per node, with a row for every prompt."""
    if given == "mean":
        return patch_values(model, PromptPair(prompts, prompts, 0), nodes, "mean")
    if given == "resample":
        if prompts.n == 1:
            raise InterventionError("there is no other row to resample from; expected at least 2 prompts")
        return {node: value.roll(-1, 0) for node, value in values_at(model, prompts, nodes, place).items()}
    if isinstance(given, str) and given != "zero":
        raise InterventionError(f"cannot replace by {given!r}; expected zero, mean, resample or a tensor")
    info = describe(model)
    found = {}
    for node in nodes:
        shape = {"neuron": (), "head": (info.d_head,)}.get(node.kind, (info.d_model,))
        if isinstance(given, Mapping) and node not in given:
            raise InterventionError(f"no value was given for {node}, only for {', '.join(map(str, given))}")
        value = torch.zeros(shape) if given == "zero" else given[node] if isinstance(given, Mapping) else given
        found[node] = one_per_row(str(node), value, prompts.n, shape)
    return found


def resolve_directions(*args: Any) -> dict[Node, Float[Tensor, "batch ..."]]:
    given = resolve_values(*args)
    for node, value in given.items():
        if not bool(value.any(dim=-1).all()):
            raise InterventionError(f"{node}: the given direction is the zero vector, which points nowhere")
    return given


def one_per_row(name: str, given: float | Tensor, n: int, shape: tuple[int, ...] = ()) -> Float[Tensor, "batch ..."]:
    value = given if isinstance(given, Tensor) else torch.tensor(float(given))
    if tuple(value.shape) not in (shape, (n, *shape)):
        raise InterventionError(
            f"{name}: expected a tensor of shape {list(shape)} or, one per row, {[n, *shape]}, got {list(value.shape)}"
        )
    if not bool(torch.isfinite(value).all()):
        raise InterventionError(f"{name}: the given values hold NaN or infinity")
    return value.expand(n, *shape)
