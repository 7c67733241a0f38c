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

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.edits import (
    median_norm_of_others,
    row_indices,
    with_added,
    with_component,
    with_direction,
    with_norm,
    with_orthogonal,
    with_statistics,
)
from p0circuit.interventions.intervention import (
    Given,
    Intervention,
    Offset,
    edit_nodes,
    one_per_row,
    positions_of,
    resolve_directions,
    resolve_values,
    vector_nodes,
)
from p0circuit.interventions.nodes import InterventionError, Node, nodes_of
from p0circuit.prompts import PromptSet

# Interventions on what nodes say


def ablate(
    model: HookedModel, prompts: PromptSet, nodes: Sequence[str | Node], to: Given = "zero", offset: Offset = 0
) -> Intervention:
    """Replace what nodes say at one position: by zero, their mean, another row's value or a given one.

    A whole block is its `attn` and its `mlp`.

    Raises:
        InterventionError: a node that does not exist, a position outside the prompts, no second row to resample from,
            or values that are not finite or do not fit. Likewise in all functions below.
    """
    place, checked = positions_of(prompts, offset), nodes_of(nodes, model)
    values = resolve_values(model, prompts, checked, to, place)
    return edit_nodes(model, prompts, checked, place, lambda value, new: new, values)


def replace_direction(
    model: HookedModel, prompts: PromptSet, nodes: Sequence[str | Node], direction: Given, offset: Offset = 0
) -> Intervention:
    """Norm-preserving: give what nodes say at one position another direction and leave it its norm."""
    place, checked = positions_of(prompts, offset), vector_nodes(nodes, model)
    directions = resolve_directions(model, prompts, checked, direction, place)
    return edit_nodes(model, prompts, checked, place, with_direction, directions)


def replace_norm(
    model: HookedModel,
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

    norms = median if norm is None else one_per_row("norm", norm, prompts.n)
    if isinstance(norms, Tensor) and bool((norms < 0).any()):
        raise InterventionError(f"a norm is at least 0, got {float(norms.min())}")
    return edit_nodes(model, prompts, vector_nodes(nodes, model), place, with_norm, norms)


def match_statistics(
    model: HookedModel,
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
        value = stream[row_indices(stream), source[rows].to(stream.device)]
        return value.norm(dim=-1) if only_norm else value

    change = with_norm if only_norm else with_statistics
    return edit_nodes(model, prompts, vector_nodes(nodes, model), place, change, at_donor)


def set_component(
    model: HookedModel,
    prompts: PromptSet,
    nodes: Sequence[str | Node],
    direction: Given,
    size: float | Float[Tensor, "*batch"] = 0.0,
    offset: Offset = 0,
) -> Intervention:
    """Fixed-direction projection: remove a direction from what nodes say at one position, or set how much is in it.

    `size` is the component along the unit direction that is left, in the units of the stream.
    """
    place, checked = positions_of(prompts, offset), vector_nodes(nodes, model)
    directions = resolve_directions(model, prompts, checked, direction, place)
    return edit_nodes(model, prompts, checked, place, with_component, directions, one_per_row("size", size, prompts.n))


def add_component(
    model: HookedModel,
    prompts: PromptSet,
    nodes: Sequence[str | Node],
    direction: Given,
    size: float | Float[Tensor, "*batch"],
    offset: Offset = 0,
) -> Intervention:
    """Insert a direction: add `size` times its unit vector to what nodes say at one position."""
    place, checked = positions_of(prompts, offset), vector_nodes(nodes, model)
    directions = resolve_directions(model, prompts, checked, direction, place)
    return edit_nodes(model, prompts, checked, place, with_added, directions, one_per_row("size", size, prompts.n))


def replace_orthogonal(
    model: HookedModel,
    prompts: PromptSet,
    nodes: Sequence[str | Node],
    direction: Given,
    to: Given = "resample",
    offset: Offset = 0,
) -> Intervention:
    """Keep what nodes say at one position along a direction, and replace everything orthogonal to it."""
    place, checked = positions_of(prompts, offset), vector_nodes(nodes, model)
    others = resolve_values(model, prompts, checked, to, place)
    directions = resolve_directions(model, prompts, checked, direction, place)
    return edit_nodes(model, prompts, checked, place, with_orthogonal, others, directions)
