"""Interventions on attention: self-attention only, a copied row, a masked key, redirection, a zero value or logit.

Offsets are counted in tokens after P0, one number for all prompts or one per prompt. All functions raise
`InterventionError` if a head does not exist or a position lies outside the prompts.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.edits import (
    attending_as,
    attending_to_itself,
    redirected,
    with_zero_logit,
    without_key,
    without_value,
)
from p0circuit.interventions.intervention import (
    Change,
    Intervention,
    Offset,
    edit_attention,
    heads_by_layer,
    positions_of,
)
from p0circuit.interventions.nodes import Node
from p0circuit.prompts import PromptSet


def remove_heads(model: HookedModel, prompts: PromptSet, heads: Sequence[str | Node]) -> Intervention:
    """Set the output of heads to zero at every position, as the paper does to a head of layer 0.

    This subtracts exactly their contribution to the residual stream, except in models with a norm after attention,
    which rescales the output of the other heads (OLMo 2, Gemma 2). Source: Peng et al., arXiv 2603.06591.

    Args:
        model: a hooked model.
        prompts: the prompts that will be run.
        heads: nodes: `attn.LAYER` for all heads of a block, or `attn.LAYER.HEAD` for one.
    """

    def change(z: Tensor, rows: slice, heads: list[int]) -> Tensor:
        new = z.clone()
        new[:, :, heads] = 0
        return new

    by_layer = heads_by_layer(heads, model)
    changes = [(f"blocks.{layer}.attn.hook_z", functools.partial(change, heads=by_layer[layer])) for layer in by_layer]
    return Intervention(model, prompts, tuple(changes))


def attend_to_self_only(
    model: HookedModel, prompts: PromptSet, heads: Sequence[str | Node], offset: Offset
) -> Intervention:
    """Let one position attend only to itself, as P0 does.

    Args:
        model: a hooked model.
        prompts: the prompts that will be run.
        heads: nodes: `attn.LAYER` for all heads of a block, or `attn.LAYER.HEAD` for one.
        offset: position, in tokens after P0.
    """
    return edit_attention(model, prompts, heads, "hook_pattern", attending_to_itself, positions_of(prompts, offset))


def copy_attention_row(
    model: HookedModel, prompts: PromptSet, heads: Sequence[str | Node], donor: Offset, offset: Offset = 0
) -> Intervention:
    """Give one position the attention row of a donor position, and so the donor's attention output.

    The attention weights of the donor, in the same prompt and pass, are applied to the values of all positions up to
    the donor. This violates the causal mask for this one query on purpose.

    Args:
        model: a hooked model.
        prompts: the prompts that will be run.
        heads: nodes: `attn.LAYER` for all heads of a block, or `attn.LAYER.HEAD` for one.
        donor: position whose row is copied, in tokens after P0.
        offset: position that receives it, in tokens after P0.
    """
    positions, sources = positions_of(prompts, offset), positions_of(prompts, donor)
    return edit_attention(model, prompts, heads, "hook_pattern", attending_as, positions, sources)


def mask_key(model: HookedModel, prompts: PromptSet, heads: Sequence[str | Node], offset: Offset = 0) -> Intervention:
    """Mask one key for the later queries of heads; the softmax distributes its attention over the other keys.

    Args:
        model: a hooked model.
        prompts: the prompts that will be run.
        heads: nodes: `attn.LAYER` for all heads of a block, or `attn.LAYER.HEAD` for one.
        offset: position of the key, in tokens after P0.
    """
    return edit_attention(model, prompts, heads, "hook_attn_scores", without_key, positions_of(prompts, offset))


def redirect_attention(
    model: HookedModel, prompts: PromptSet, heads: Sequence[str | Node], target: Offset, offset: Offset = 0
) -> Intervention:
    """Move the sink: redirect the attention to one position to a target, for queries from the target on.

    Args:
        model: a hooked model.
        prompts: the prompts that will be run.
        heads: nodes: `attn.LAYER` for all heads of a block, or `attn.LAYER.HEAD` for one.
        target: position that receives the attention, in tokens after P0.
        offset: position that loses it, in tokens after P0.
    """
    positions, targets = positions_of(prompts, offset), positions_of(prompts, target)
    return edit_attention(model, prompts, heads, "hook_pattern", redirected, positions, targets)


def zero_value(model: HookedModel, prompts: PromptSet, heads: Sequence[str | Node], offset: Offset = 0) -> Intervention:
    """Set the value vector at one position to zero for some heads, keeping its key and so all attention weights.

    This is exact per query head also under grouped-query attention, where the heads of a group share one value: the
    output of each query head is computed again without it.

    Args:
        model: a hooked model.
        prompts: the prompts that will be run.
        heads: nodes: `attn.LAYER` for all heads of a block, or `attn.LAYER.HEAD` for one.
        offset: position of the value, in tokens after P0.
    """
    positions = positions_of(prompts, offset)

    def keep(activation: Tensor, rows: slice, name: str, seen: dict[str, Tensor]) -> None:
        seen[name] = activation

    def change(z: Tensor, rows: slice, numbers: list[int], seen: dict[str, Tensor]) -> Tensor:
        pattern, values = seen.pop("pattern"), seen.pop("values")
        values = values.repeat_interleave(pattern.shape[1] // values.shape[2], dim=2)
        new, position = z.clone(), positions[rows].to(z.device)
        new[:, :, numbers] = without_value(z[:, :, numbers], pattern[:, numbers], values[:, :, numbers], position)
        return new

    changes: list[tuple[str, Change]] = []
    for layer, numbers in heads_by_layer(heads, model).items():
        attention, seen = f"blocks.{layer}.attn.", {}
        changes += [
            (attention + "hook_v", functools.partial(keep, name="values", seen=seen)),
            (attention + "hook_pattern", functools.partial(keep, name="pattern", seen=seen)),
            (attention + "hook_z", functools.partial(change, numbers=numbers, seen=seen)),
        ]
    return Intervention(model, prompts, tuple(changes))


def zero_logit(model: HookedModel, prompts: PromptSet, heads: Sequence[str | Node]) -> Intervention:
    """Add a key with logit 0 and a zero value to the softmax of heads, so that they may attend to nothing.

    A model trained without this key has scores of arbitrary level, because a softmax does not depend on it; how much
    attention the new key receives depends on that level. Source: Miller 2023, "Attention is off by one"; as a key with
    a zero value: Gu et al. 2025, arXiv 2410.10781.

    Args:
        model: a hooked model.
        prompts: the prompts that will be run.
        heads: nodes: `attn.LAYER` for all heads of a block, or `attn.LAYER.HEAD` for one.
    """

    def keep(scores: Tensor, rows: slice, seen: dict[str, Tensor]) -> None:
        seen["scores"] = scores

    def change(pattern: Tensor, rows: slice, numbers: list[int], seen: dict[str, Tensor]) -> Tensor:
        new, scores = pattern.clone(), seen.pop("scores")
        new[:, numbers] = with_zero_logit(pattern[:, numbers], scores[:, numbers])
        return new

    changes: list[tuple[str, Change]] = []
    for layer, numbers in heads_by_layer(heads, model).items():
        attention, seen = f"blocks.{layer}.attn.", {}
        changes += [
            (attention + "hook_attn_scores", functools.partial(keep, seen=seen)),
            (attention + "hook_pattern", functools.partial(change, numbers=numbers, seen=seen)),
        ]
    return Intervention(model, prompts, tuple(changes))
