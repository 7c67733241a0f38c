"""Edits of vectors and of attention, as pure functions: the mathematics of every ablation."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from p0circuit.sink import attention_to

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
    changed[row_indices(pattern), :, position] = one_hot(position, pattern.shape[-1])[:, None].to(pattern)
    return changed


def attending_as(
    pattern: Float[Tensor, "batch head query key"], position: Int[Tensor, " batch"], donor: Int[Tensor, " batch"]
) -> Float[Tensor, "batch head query key"]:
    """The query of one position attends as that of the donor does, to later keys too if the donor is later."""
    changed = pattern.clone()
    changed[row_indices(pattern), :, position] = pattern[row_indices(pattern), :, donor]
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


def row_indices(rows: Tensor) -> Int[Tensor, " batch"]:
    return torch.arange(len(rows), device=rows.device)


def at_least_float32(tensor: Tensor) -> Tensor:
    """At least float32, in which norms and means of half-precision values can be trusted."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
