"""Ablations and edits of node outputs at P0 (or another position), whose effect on the sink is then measured.

1. The mathematics are pure functions of vectors (edits.py): `with_norm`, `with_direction`, `with_statistics`,
   `with_component`.
2. An `Intervention` applies such a function to nodes of a model, on given prompts, at one position of each prompt.
   Values that differ between prompts (positions, replacement values) are computed when it is made.
3. Values that depend on the run itself (the norm of other positions, the output at a donor position) are read in the
   same pass, inside the hook, so that several interventions act on each other as they would in the model.

There are two ways to use an intervention:

    record(model, prompts, SINK_SCORE, interventions=[ablate(model, prompts, ["attn.0"])])  # in batches of any size
    with ablate(model, prompts, ["attn.0"]):  # all prompts in one batch
        logits = forward(model, prompts.ids, prompts.attention_mask)

Positions are counted from P0: `offset` 0 is P0 itself, 8 the eighth token after it. An offset is one number for all
prompts, or one per prompt.
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


def ablate(
    model: HookedModel, prompts: PromptSet, nodes: Sequence[str | Node], to: Given = "zero", offset: Offset = 0
) -> Intervention:
    """Replace the output of nodes at one position.

    To ablate a block, give its `attn` and its `mlp`.

    Args:
        model: a hooked model.
        prompts: the prompts that will be run.
        nodes: names or nodes.
        to: "zero"; "mean" (over the positions after P0 of the same prompt); "resample" (the output at the same position
            of the next prompt); a tensor [value] or [batch, value] for all nodes; or one tensor per node.
        offset: position, in tokens after P0.

    Returns:
        The intervention, for `with` or for `record(..., interventions=[...])`.

    Raises:
        InterventionError: a node does not exist, the position lies outside the prompts, there is no second prompt to
            resample from, or values are not finite or have another shape. Likewise in all functions below.

    Example:
        with p0circuit.ablate(model, prompts, ["mlp.0", "attn.1.3"], to="resample"):
            scores = p0circuit.record(model, prompts, p0circuit.SINK_SCORE)
    """
    positions, checked = positions_of(prompts, offset), nodes_of(nodes, model)
    values = resolve_values(model, prompts, checked, to, positions)
    return edit_nodes(model, prompts, checked, positions, lambda value, new: new, values)


def replace_direction(
    model: HookedModel, prompts: PromptSet, nodes: Sequence[str | Node], direction: Given, offset: Offset = 0
) -> Intervention:
    """Change the direction of the output of nodes at one position, keeping its norm.

    Args:
        model: a hooked model.
        prompts: the prompts that will be run.
        nodes: names or nodes.
        direction: the new direction, given as the values of `ablate`; its norm does not matter.
        offset: position, in tokens after P0.
    """
    positions, checked = positions_of(prompts, offset), vector_nodes(nodes, model)
    directions = resolve_directions(model, prompts, checked, direction, positions)
    return edit_nodes(model, prompts, checked, positions, with_direction, directions)


def replace_norm(
    model: HookedModel,
    prompts: PromptSet,
    nodes: Sequence[str | Node],
    norm: float | Float[Tensor, "*batch"] | None = None,
    offset: Offset = 0,
) -> Intervention:
    """Change the norm of the output of nodes at one position, keeping its direction.

    Args:
        model: a hooked model.
        prompts: the prompts that will be run.
        nodes: names or nodes.
        norm: the new norm, one number or one per prompt; if None, the median norm at the other real positions of the
            prompt, in the same pass.
        offset: position, in tokens after P0.
    """
    positions = positions_of(prompts, offset)

    def median(stream: Tensor, rows: slice) -> Tensor:
        position, mask = positions[rows].to(stream.device), prompts.attention_mask[rows].to(stream.device)
        return median_norm_of_others(stream, position, mask)

    norms = median if norm is None else one_per_row("norm", norm, prompts.n)
    if isinstance(norms, Tensor) and bool((norms < 0).any()):
        raise InterventionError(f"a norm is at least 0, got {float(norms.min())}")
    return edit_nodes(model, prompts, vector_nodes(nodes, model), positions, with_norm, norms)


def match_statistics(
    model: HookedModel,
    prompts: PromptSet,
    nodes: Sequence[str | Node],
    donor: Offset,
    offset: Offset,
    only_norm: bool = False,
) -> Intervention:
    """Give the output of nodes at one position the mean and variance over channels (or only the norm) of a donor.

    The donor position is read in the same pass. With P0 as donor this tests whether another position becomes a sink;
    with P0 as `offset`, whether P0 stops being one.

    Args:
        model: a hooked model.
        prompts: the prompts that will be run.
        nodes: names or nodes.
        donor: position whose statistics are used, in tokens after P0.
        offset: position that is changed, in tokens after P0.
        only_norm: whether to match only the norm.
    """
    positions, source = positions_of(prompts, offset), positions_of(prompts, donor)

    def at_donor(stream: Tensor, rows: slice) -> Tensor:
        value = stream[row_indices(stream), source[rows].to(stream.device)]
        return value.norm(dim=-1) if only_norm else value

    change = with_norm if only_norm else with_statistics
    return edit_nodes(model, prompts, vector_nodes(nodes, model), positions, change, at_donor)


def set_component(
    model: HookedModel,
    prompts: PromptSet,
    nodes: Sequence[str | Node],
    direction: Given,
    size: float | Float[Tensor, "*batch"] = 0.0,
    offset: Offset = 0,
) -> Intervention:
    """Set the component of the output of nodes along a direction, at one position; 0 removes the direction.

    Args:
        model: a hooked model.
        prompts: the prompts that will be run.
        nodes: names or nodes.
        direction: the direction, given as the values of `ablate`; its norm does not matter.
        size: the new component along the unit vector, one number or one per prompt, in the units of the output.
        offset: position, in tokens after P0.
    """
    positions, checked = positions_of(prompts, offset), vector_nodes(nodes, model)
    directions = resolve_directions(model, prompts, checked, direction, positions)
    return edit_nodes(
        model, prompts, checked, positions, with_component, directions, one_per_row("size", size, prompts.n)
    )


def add_component(
    model: HookedModel,
    prompts: PromptSet,
    nodes: Sequence[str | Node],
    direction: Given,
    size: float | Float[Tensor, "*batch"],
    offset: Offset = 0,
) -> Intervention:
    """Add a multiple of a direction's unit vector to the output of nodes at one position.

    Args:
        model: a hooked model.
        prompts: the prompts that will be run.
        nodes: names or nodes.
        direction: the direction, given as the values of `ablate`; its norm does not matter.
        size: the multiple, one number or one per prompt, in the units of the output.
        offset: position, in tokens after P0.
    """
    positions, checked = positions_of(prompts, offset), vector_nodes(nodes, model)
    directions = resolve_directions(model, prompts, checked, direction, positions)
    return edit_nodes(model, prompts, checked, positions, with_added, directions, one_per_row("size", size, prompts.n))


def replace_orthogonal(
    model: HookedModel,
    prompts: PromptSet,
    nodes: Sequence[str | Node],
    direction: Given,
    to: Given = "resample",
    offset: Offset = 0,
) -> Intervention:
    """Replace the part of the output of nodes that is orthogonal to a direction, at one position.

    Args:
        model: a hooked model.
        prompts: the prompts that will be run.
        nodes: names or nodes.
        direction: the direction whose component is kept, given as the values of `ablate`.
        to: the output whose orthogonal part is used, as in `ablate`.
        offset: position, in tokens after P0.
    """
    positions, checked = positions_of(prompts, offset), vector_nodes(nodes, model)
    others = resolve_values(model, prompts, checked, to, positions)
    directions = resolve_directions(model, prompts, checked, direction, positions)
    return edit_nodes(model, prompts, checked, positions, with_orthogonal, others, directions)
