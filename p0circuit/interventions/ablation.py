"""Ablations and surgery: change what a component says at P0 (or elsewhere), and see what becomes of the sink.

1. The mathematics is pure functions: of vectors (`with_norm`, `with_direction`, `with_statistics`, `with_component`),
   and of attention (`attending_to_itself`, `attending_as`, `without_key`, `redirected`, `without_value`,
   `with_zero_logit`).
2. An `Intervention` ties such a function to the nodes of a model, to prompts, and to a position in each of their rows.
   Whatever differs from row to row (positions, replacement values) is found when it is made.
3. What depends on the run (the norm of other positions, the attention of a donor) is read in the pass itself, inside
   the hook, so that several interventions act on each other as they would in the model.

Two ways to use one:

    record(model, prompts, SINK_SCORE, interventions=[ablate(model, prompts, ["attn.0"])])  # in batches of any size
    with ablate(model, prompts, ["attn.0"]):  # all rows in one batch
        logits = forward(model, prompts.ids, prompts.attention_mask)

Positions are counted from P0: `offset` 0 is P0 itself, 8 the eighth token after it; one for all rows, or one per row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from p0circuit.interventions.contrast import Contrast, replacements, values_at
from p0circuit.interventions.nodes import InterventionError, Node, nodes_of
from p0circuit.models import describe, forward
from p0circuit.models.forward import Hook, hooked
from p0circuit.prompts import PromptSet
from p0circuit.sink import attention_to

Change = Callable[[Tensor, slice], Tensor | None]
"""Gets an activation and which rows of the prompts it holds; returns what takes its place, None for no change."""
Argument = Tensor | Mapping[Node, Tensor] | Callable[[Tensor, slice], Tensor]
"""What a pure function needs beside a node's value: a row for every prompt, the same for all nodes or for each, or
found in the pass from the values at all positions and which rows these are."""
Given = Literal["zero", "mean", "resample"] | Tensor | Mapping[Node, Tensor]
"""What to put somewhere: "zero"; "mean" over the row's positions after P0; "resample", the next row's value at the
same place; a tensor [value] or [batch, value] for all nodes; or one per node, as `values_at` and `replacements` give.
"""
Offset = int | Int[Tensor, " batch"]
"""A position counted from P0, for all rows or for each."""


@dataclass(frozen=True, eq=False)
class Intervention:
    """Changes to what a model computes, made for the rows of one set of prompts.

    Under `with` its hooks stand on the model and expect all rows of the prompts in one batch; leaving the block takes
    them off, exceptions included. `record(..., interventions=[...])` takes the prompts in batches of any size.
    """

    model: Any = field(repr=False)
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


# Vectors


def with_norm(value: Float[Tensor, "*rows d"], norm: Float[Tensor, "*#rows"]) -> Float[Tensor, "*rows d"]:
    """The same direction with another norm; a zero vector has no direction and stays zero."""
    size = value.norm(dim=-1, keepdim=True)
    return torch.where(size > 0, value * (norm[..., None] / size), value)


def with_direction(value: Float[Tensor, "*rows d"], direction: Float[Tensor, "*#rows d"]) -> Float[Tensor, "*rows d"]:
    """The same norm in another direction, which may have any norm but zero."""
    return with_norm(direction.expand_as(value), value.norm(dim=-1))


def with_statistics(value: Float[Tensor, "*rows d"], like: Float[Tensor, "*#rows d"]) -> Float[Tensor, "*rows d"]:
    """Standardised over its channels, then given the mean and variance that `like` has over its own."""
    size = value.std(dim=-1, keepdim=True)
    scale = torch.where(size > 0, like.std(dim=-1, keepdim=True) / size, 0)
    return value * scale + (like.mean(dim=-1, keepdim=True) - value.mean(dim=-1, keepdim=True) * scale)


def component(value: Float[Tensor, "*rows d"], direction: Float[Tensor, "*#rows d"]) -> Float[Tensor, "*rows"]:
    """The signed length of the projection on a direction, which may have any norm but zero."""
    return (value * normalize(direction, dim=-1)).sum(-1)


def with_component(
    value: Float[Tensor, "*rows d"], direction: Float[Tensor, "*#rows d"], size: Float[Tensor, "*#rows"]
) -> Float[Tensor, "*rows d"]:
    """The same vector with its component along a direction set to `size`, 0 to remove it."""
    return with_added(value, direction, size - component(value, direction))


def with_added(
    value: Float[Tensor, "*rows d"], direction: Float[Tensor, "*#rows d"], size: Float[Tensor, "*#rows"]
) -> Float[Tensor, "*rows d"]:
    """`size` times the unit vector of a direction, added."""
    return value + size[..., None] * normalize(direction, dim=-1)


def with_orthogonal(
    value: Float[Tensor, "*rows d"], other: Float[Tensor, "*rows d"], direction: Float[Tensor, "*#rows d"]
) -> Float[Tensor, "*rows d"]:
    """`value` along the direction and `other` in everything orthogonal to it."""
    return with_component(other, direction, component(value, direction))


def median_norm_of_others(
    stream: Float[Tensor, "batch pos d"], position: Int[Tensor, " batch"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    """The median norm over the real positions of a row, one left out."""
    others = mask & (torch.arange(stream.shape[1], device=stream.device) != position[:, None])
    return stream.norm(dim=-1).masked_fill(~others, torch.nan).nanquantile(0.5, dim=1)


# Attention


def attending_to_itself(
    pattern: Float[Tensor, "batch head query key"], position: Int[Tensor, " batch"]
) -> Float[Tensor, "batch head query key"]:
    """The query of one position attends to that position alone, as P0 must."""
    changed = pattern.clone()
    changed[_numbers(pattern), :, position] = one_hot(position, pattern.shape[-1])[:, None].to(pattern)
    return changed


def attending_as(
    pattern: Float[Tensor, "batch head query key"], position: Int[Tensor, " batch"], donor: Int[Tensor, " batch"]
) -> Float[Tensor, "batch head query key"]:
    """The query of one position attends as that of the donor does, to later keys too if the donor is later."""
    changed = pattern.clone()
    changed[_numbers(pattern), :, position] = pattern[_numbers(pattern), :, donor]
    return changed


def without_key(
    scores: Float[Tensor, "batch head query key"], position: Int[Tensor, " batch"]
) -> Float[Tensor, "batch head query key"]:
    """Scores before the softmax in which queries after a position do not see its key: the rest takes its share."""
    later = torch.arange(scores.shape[-2], device=scores.device) > position[:, None]
    hidden = one_hot(position, scores.shape[-1]).bool()
    return scores.masked_fill(later[:, None, :, None] & hidden[:, None, None, :], -torch.inf)


def redirected(
    pattern: Float[Tensor, "batch head query key"], position: Int[Tensor, " batch"], target: Int[Tensor, " batch"]
) -> Float[Tensor, "batch head query key"]:
    """What queries at or after `target` gave to `position` they give to `target` as well."""
    keys = pattern.shape[-1]
    queries = torch.arange(pattern.shape[-2], device=pattern.device) >= target[:, None]
    moved = attention_to(pattern, position) * queries[:, None]
    direction = one_hot(target, keys) - one_hot(position, keys)
    return pattern + moved[..., None] * direction[:, None, None].to(pattern)


def without_value(
    z: Float[Tensor, "batch query head d_head"],
    pattern: Float[Tensor, "batch head query key"],
    values: Float[Tensor, "batch key head d_head"],
    position: Int[Tensor, " batch"],
) -> Float[Tensor, "batch query head d_head"]:
    """What heads read if the value of one position is zero while its key, and so all attention, stays."""
    hidden = one_hot(position, pattern.shape[-1]).bool()
    mixed = torch.einsum("bhqk,bkhd->bqhd", pattern.masked_fill(hidden[:, None, None], 0).to(values), values)
    reached = torch.arange(z.shape[1], device=z.device) >= position[:, None]
    return torch.where(reached[..., None, None], mixed.to(z), z)


def with_zero_logit(
    pattern: Float[Tensor, "batch head query key"], scores: Float[Tensor, "batch head query key"]
) -> Float[Tensor, "batch head query key"]:
    """Attention `exp(s) / (1 + sum exp(s))`, from its softmax and the scores: what nobody needs may go nowhere."""
    # 1 - 1 / (1 + S) is the sigmoid of log S, which no large score overflows.
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return pattern * wide.logsumexp(-1, keepdim=True).sigmoid().to(pattern)


# Interventions on what nodes say


def ablate(
    model: Any, prompts: PromptSet, nodes: Sequence[str | Node], to: Given = "zero", offset: Offset = 0
) -> Intervention:
    """Replace what nodes say at one position: by zero, their mean, another row's value or a given one.

    A whole block is its `attn` and its `mlp`.

    Raises:
        InterventionError: a node that does not exist, a position outside the prompts, no second row to resample from,
            or values that are not finite or do not fit. Likewise in all functions below.
    """
    place, checked = positions_of(prompts, offset), nodes_of(nodes, model)
    values = _given(model, prompts, checked, to, place)
    return _on_nodes(model, prompts, checked, place, lambda value, new: new, values)


def replace_direction(
    model: Any, prompts: PromptSet, nodes: Sequence[str | Node], direction: Given, offset: Offset = 0
) -> Intervention:
    """Norm-preserving: give what nodes say at one position another direction and leave it its norm."""
    place, checked = positions_of(prompts, offset), _vectors(nodes, model)
    directions = _directions(model, prompts, checked, direction, place)
    return _on_nodes(model, prompts, checked, place, with_direction, directions)


def replace_norm(
    model: Any,
    prompts: PromptSet,
    nodes: Sequence[str | Node],
    norm: float | Float[Tensor, "*batch"] | None = None,
    offset: Offset = 0,
) -> Intervention:
    """Direction-preserving: give what nodes say at one position another norm and leave it its direction.

    Without `norm` it is the median over the other real positions of the row, in the same pass.
    """
    place = positions_of(prompts, offset)

    def median(stream: Tensor, rows: slice) -> Tensor:
        position, mask = place[rows].to(stream.device), prompts.attention_mask[rows].to(stream.device)
        return median_norm_of_others(stream, position, mask)

    norms = median if norm is None else _for_rows("norm", norm, prompts.n)
    if isinstance(norms, Tensor) and bool((norms < 0).any()):
        raise InterventionError(f"a norm is at least 0, got {float(norms.min())}")
    return _on_nodes(model, prompts, _vectors(nodes, model), place, with_norm, norms)


def match_statistics(
    model: Any,
    prompts: PromptSet,
    nodes: Sequence[str | Node],
    donor: Offset,
    offset: Offset,
    only_norm: bool = False,
) -> Intervention:
    """Give what nodes say at `offset` the mean and variance over channels (or only the norm) they have at `donor`.

    The donor is read in the same pass. From P0 to t: does t become a sink? From t to P0: does P0 stop being one?
    """
    place, source = positions_of(prompts, offset), positions_of(prompts, donor)

    def at_donor(stream: Tensor, rows: slice) -> Tensor:
        value = stream[_numbers(stream), source[rows].to(stream.device)]
        return value.norm(dim=-1) if only_norm else value

    change = with_norm if only_norm else with_statistics
    return _on_nodes(model, prompts, _vectors(nodes, model), place, change, at_donor)


def set_component(
    model: Any,
    prompts: PromptSet,
    nodes: Sequence[str | Node],
    direction: Given,
    size: float | Float[Tensor, "*batch"] = 0.0,
    offset: Offset = 0,
) -> Intervention:
    """Fixed-direction projection: remove a direction from what nodes say at one position, or set how much is in it.

    `size` is the component along the unit direction that is left, in the units of the stream.
    """
    place, checked = positions_of(prompts, offset), _vectors(nodes, model)
    directions = _directions(model, prompts, checked, direction, place)
    return _on_nodes(model, prompts, checked, place, with_component, directions, _for_rows("size", size, prompts.n))


def add_component(
    model: Any,
    prompts: PromptSet,
    nodes: Sequence[str | Node],
    direction: Given,
    size: float | Float[Tensor, "*batch"],
    offset: Offset = 0,
) -> Intervention:
    """Insert a direction: add `size` times its unit vector to what nodes say at one position."""
    place, checked = positions_of(prompts, offset), _vectors(nodes, model)
    directions = _directions(model, prompts, checked, direction, place)
    return _on_nodes(model, prompts, checked, place, with_added, directions, _for_rows("size", size, prompts.n))


def replace_orthogonal(
    model: Any,
    prompts: PromptSet,
    nodes: Sequence[str | Node],
    direction: Given,
    to: Given = "resample",
    offset: Offset = 0,
) -> Intervention:
    """Keep what nodes say at one position along a direction, and replace everything orthogonal to it."""
    place, checked = positions_of(prompts, offset), _vectors(nodes, model)
    others = _given(model, prompts, checked, to, place)
    directions = _directions(model, prompts, checked, direction, place)
    return _on_nodes(model, prompts, checked, place, with_orthogonal, others, directions)


def remove_heads(model: Any, prompts: PromptSet, heads: Sequence[str | Node]) -> Intervention:
    """Take what heads add to the residual stream away at every position, as the paper does to a head of layer 0.

    Exactly a subtraction, except where a norm after attention rescales what the other heads leave (OLMo 2, Gemma 2).
    Source: Peng et al., arXiv 2603.06591.
    """

    def change(z: Tensor, rows: slice, chosen: list[int]) -> Tensor:
        changed = z.clone()
        changed[:, :, chosen] = 0
        return changed

    by_layer = _heads_by_layer(heads, model)
    changes = [(f"blocks.{layer}.attn.hook_z", functools.partial(change, chosen=by_layer[layer])) for layer in by_layer]
    return Intervention(model, prompts, tuple(changes))


# Interventions on attention: `heads` are nodes, `attn.LAYER` for all heads of a block or `attn.LAYER.HEAD` for one.


def isolate(model: Any, prompts: PromptSet, heads: Sequence[str | Node], offset: Offset) -> Intervention:
    """Mask surgery: let one position attend to itself alone, as if it were first."""
    return _on_attention(model, prompts, heads, "hook_pattern", attending_to_itself, positions_of(prompts, offset))


def mix(model: Any, prompts: PromptSet, heads: Sequence[str | Node], donor: Offset, offset: Offset = 0) -> Intervention:
    """Mask surgery: give P0 (or another position) the attention output that the donor has, the donor's mix of values.

    The donor's attention weights of the same row and pass are applied to the values of all positions up to the donor,
    which breaks the causal mask for this one query on purpose.
    """
    place, source = positions_of(prompts, offset), positions_of(prompts, donor)
    return _on_attention(model, prompts, heads, "hook_pattern", attending_as, place, source)


def mask_key(model: Any, prompts: PromptSet, heads: Sequence[str | Node], offset: Offset = 0) -> Intervention:
    """Hide one position from the later queries of heads; the softmax gives its share to the other keys."""
    return _on_attention(model, prompts, heads, "hook_attn_scores", without_key, positions_of(prompts, offset))


def redirect(
    model: Any, prompts: PromptSet, heads: Sequence[str | Node], target: Offset, offset: Offset = 0
) -> Intervention:
    """Move the sink: what queries at or after the target attend to P0 (or another position) goes to the target."""
    place, goal = positions_of(prompts, offset), positions_of(prompts, target)
    return _on_attention(model, prompts, heads, "hook_pattern", redirected, place, goal)


def zero_value(model: Any, prompts: PromptSet, heads: Sequence[str | Node], offset: Offset = 0) -> Intervention:
    """Let heads read a zero value at one position and leave its key, and so their attention, as it is.

    Exact per query head under grouped-query attention too, where the heads of a group share one value: what changes
    is what each head reads of it.
    """
    place = positions_of(prompts, offset)

    def keep(activation: Tensor, rows: slice, name: str, seen: dict[str, Tensor]) -> None:
        seen[name] = activation

    def change(z: Tensor, rows: slice, chosen: list[int], seen: dict[str, Tensor]) -> Tensor:
        pattern, values = seen.pop("pattern"), seen.pop("values")
        values = values.repeat_interleave(pattern.shape[1] // values.shape[2], dim=2)
        changed, position = z.clone(), place[rows].to(z.device)
        changed[:, :, chosen] = without_value(z[:, :, chosen], pattern[:, chosen], values[:, :, chosen], position)
        return changed

    changes: list[tuple[str, Change]] = []
    for layer, chosen in _heads_by_layer(heads, model).items():
        attention, seen = f"blocks.{layer}.attn.", {}
        changes += [
            (attention + "hook_v", functools.partial(keep, name="values", seen=seen)),
            (attention + "hook_pattern", functools.partial(keep, name="pattern", seen=seen)),
            (attention + "hook_z", functools.partial(change, chosen=chosen, seen=seen)),
        ]
    return Intervention(model, prompts, tuple(changes))


def zero_logit(model: Any, prompts: PromptSet, heads: Sequence[str | Node]) -> Intervention:
    """Give heads one more logit, 0, whose value is nothing, at every query: a softmax that may attend nowhere.

    The scores are those of a model that was trained without it, and a softmax does not tell their level: how much goes
    nowhere depends on a level that training left open. Source: Miller 2023, "Attention is off by one"; as a key with a
    zero value: Gu et al. 2025, arXiv 2410.10781.
    """

    def keep(scores: Tensor, rows: slice, seen: dict[str, Tensor]) -> None:
        seen["scores"] = scores

    def change(pattern: Tensor, rows: slice, chosen: list[int], seen: dict[str, Tensor]) -> Tensor:
        changed, scores = pattern.clone(), seen.pop("scores")
        changed[:, chosen] = with_zero_logit(pattern[:, chosen], scores[:, chosen])
        return changed

    changes: list[tuple[str, Change]] = []
    for layer, chosen in _heads_by_layer(heads, model).items():
        attention, seen = f"blocks.{layer}.attn.", {}
        changes += [
            (attention + "hook_attn_scores", functools.partial(keep, seen=seen)),
            (attention + "hook_pattern", functools.partial(change, chosen=chosen, seen=seen)),
        ]
    return Intervention(model, prompts, tuple(changes))


# What they share


@torch.no_grad()
def p0_direction(model: Any, prompts: PromptSet, layer: int) -> Float[Tensor, " d_model"]:
    """The mean direction, of norm 1, of the residual stream at P0 before block `layer`.

    P0 sees itself alone, so rows of one token give its stream exactly. `layer` equal to the number of layers is the
    stream after the last block. The mean is that of unit vectors, as in `sink.direction_cosines`.
    """
    first = prompts.ids[_numbers(prompts.ids), prompts.p0]
    residual = forward(model, first[:, None], stop_at_layer=layer)[:, 0]
    return normalize(normalize(_wide(residual), dim=-1).mean(0), dim=-1)


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


def _on_nodes(
    model: Any,
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
        at: tuple[Any, ...] = (_numbers(activation), place[rows].to(activation.device))
        for node in group:
            stream = _wide(activation if node.index is None else activation[:, :, node.index])
            value = change(stream[at], *(argument_for(node, argument, stream, rows) for argument in arguments))
            new[at if node.index is None else (*at, node.index)] = value.to(new)
        return new

    # One hook per hook point: a hundred neurons of a layer cost one copy of its activation.
    groups: dict[str, list[Node]] = {}
    for node in nodes:
        groups.setdefault(node.hook, []).append(node)
    changes = [(hook, functools.partial(changed, group=group)) for hook, group in groups.items()]
    return Intervention(model, prompts, tuple(changes))


def _on_attention(
    model: Any,
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

    by_layer = _heads_by_layer(names, model)
    changes = [
        (f"blocks.{layer}.attn.{point}", functools.partial(changed, chosen=by_layer[layer])) for layer in by_layer
    ]
    return Intervention(model, prompts, tuple(changes))


def _heads_by_layer(names: Sequence[str | Node], model: Any) -> dict[int, list[int]]:
    found: dict[int, set[int]] = {}
    for node in nodes_of(names, model):
        if node.kind not in ("attn", "head"):
            raise InterventionError(f"{node} has no attention; expected attn.LAYER or attn.LAYER.HEAD")
        heads = range(describe(model).heads) if node.index is None else [node.index]
        found.setdefault(node.layer, set()).update(heads)
    return {layer: sorted(heads) for layer, heads in found.items()}


def _vectors(names: Sequence[str | Node], model: Any) -> list[Node]:
    nodes = nodes_of(names, model)
    for node in nodes:
        if node.kind == "neuron":
            raise InterventionError(f"{node} is a number and has neither norm nor direction; use ablate")
    return nodes


def _given(
    model: Any, prompts: PromptSet, nodes: Sequence[Node], given: Given, place: Int[Tensor, " batch"]
) -> dict[Node, Float[Tensor, "batch ..."]]:
    """What was given as one tensor per node, with a row for every prompt."""
    if given == "mean":
        return replacements(model, Contrast(prompts, prompts, 0), nodes, "mean")
    if given == "resample":
        if prompts.n == 1:
            raise InterventionError("there is no other row to resample from; expected at least 2 prompts")
        return {node: value.roll(-1, 0) for node, value in values_at(model, prompts, nodes, place).items()}
    if isinstance(given, str) and given != "zero":
        raise InterventionError(f"cannot replace by {given!r}; expected zero, mean, resample or a tensor")
    info = describe(model)
    found = {}
    for node in nodes:
        shape = {"neuron": (), "head": (info.head_size,)}.get(node.kind, (info.d_model,))
        if isinstance(given, Mapping) and node not in given:
            raise InterventionError(f"no value was given for {node}, only for {', '.join(map(str, given))}")
        value = torch.zeros(shape) if given == "zero" else given[node] if isinstance(given, Mapping) else given
        found[node] = _for_rows(str(node), value, prompts.n, shape)
    return found


def _directions(*args: Any) -> dict[Node, Float[Tensor, "batch ..."]]:
    given = _given(*args)
    for node, value in given.items():
        if not bool(value.any(dim=-1).all()):
            raise InterventionError(f"{node}: the given direction is the zero vector, which points nowhere")
    return given


def _for_rows(name: str, given: float | Tensor, n: int, shape: tuple[int, ...] = ()) -> Float[Tensor, "batch ..."]:
    value = given if isinstance(given, Tensor) else torch.tensor(float(given))
    if tuple(value.shape) not in (shape, (n, *shape)):
        raise InterventionError(
            f"{name}: expected a tensor of shape {list(shape)} or, one per row, {[n, *shape]}, got {list(value.shape)}"
        )
    if not bool(torch.isfinite(value).all()):
        raise InterventionError(f"{name}: the given values hold NaN or infinity")
    return value.expand(n, *shape)


def _numbers(rows: Tensor) -> Int[Tensor, " batch"]:
    return torch.arange(len(rows), device=rows.device)


def _wide(tensor: Tensor) -> Tensor:
    """At least float32, in which norms and means of half-precision values can be trusted."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
