"""Interventions on attention: self-attention only, a copied row, a masked key, redirection, a zero value or logit."""

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
    """Take what heads add to the residual stream away at every position, as the paper does to a head of layer 0.

    Exactly a subtraction, except where a norm after attention rescales what the other heads leave (OLMo 2, Gemma 2).
    Source: Peng et al., arXiv 2603.06591.
    """

    def change(z: Tensor, rows: slice, chosen: list[int]) -> Tensor:
        changed = z.clone()
        changed[:, :, chosen] = 0
        return changed

    by_layer = heads_by_layer(heads, model)
    changes = [(f"blocks.{layer}.attn.hook_z", functools.partial(change, chosen=by_layer[layer])) for layer in by_layer]
    return Intervention(model, prompts, tuple(changes))


# Interventions on attention: `heads` are nodes, `attn.LAYER` for all heads of a block or `attn.LAYER.HEAD` for one.


def attend_to_self_only(
    model: HookedModel, prompts: PromptSet, heads: Sequence[str | Node], offset: Offset
) -> Intervention:
    """Mask surgery: let one position attend to itself alone, as if it were first."""
    return edit_attention(model, prompts, heads, "hook_pattern", attending_to_itself, positions_of(prompts, offset))


def copy_attention_row(
    model: HookedModel, prompts: PromptSet, heads: Sequence[str | Node], donor: Offset, offset: Offset = 0
) -> Intervention:
    """Mask surgery: give P0 (or another position) the attention output that the donor has, the donor's mix of values.

    The donor's attention weights of the same row and pass are applied to the values of all positions up to the donor,
    which breaks the causal mask for this one query on purpose.
    """
    place, source = positions_of(prompts, offset), positions_of(prompts, donor)
    return edit_attention(model, prompts, heads, "hook_pattern", attending_as, place, source)


def mask_key(model: HookedModel, prompts: PromptSet, heads: Sequence[str | Node], offset: Offset = 0) -> Intervention:
    """Hide one position from the later queries of heads; the softmax gives its share to the other keys."""
    return edit_attention(model, prompts, heads, "hook_attn_scores", without_key, positions_of(prompts, offset))


def redirect_attention(
    model: HookedModel, prompts: PromptSet, heads: Sequence[str | Node], target: Offset, offset: Offset = 0
) -> Intervention:
    """Move the sink: what queries at or after the target attend to P0 (or another position) goes to the target."""
    place, goal = positions_of(prompts, offset), positions_of(prompts, target)
    return edit_attention(model, prompts, heads, "hook_pattern", redirected, place, goal)


def zero_value(model: HookedModel, prompts: PromptSet, heads: Sequence[str | Node], offset: Offset = 0) -> Intervention:
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
    for layer, chosen in heads_by_layer(heads, model).items():
        attention, seen = f"blocks.{layer}.attn.", {}
        changes += [
            (attention + "hook_v", functools.partial(keep, name="values", seen=seen)),
            (attention + "hook_pattern", functools.partial(keep, name="pattern", seen=seen)),
            (attention + "hook_z", functools.partial(change, chosen=chosen, seen=seen)),
        ]
    return Intervention(model, prompts, tuple(changes))


def zero_logit(model: HookedModel, prompts: PromptSet, heads: Sequence[str | Node]) -> Intervention:
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
    for layer, chosen in heads_by_layer(heads, model).items():
        attention, seen = f"blocks.{layer}.attn.", {}
        changes += [
            (attention + "hook_attn_scores", functools.partial(keep, seen=seen)),
            (attention + "hook_pattern", functools.partial(change, chosen=chosen, seen=seen)),
        ]
    return Intervention(model, prompts, tuple(changes))
