"""Edits of vectors and of attention: pure functions, the mathematics of every intervention."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from p0circuit.sink import attention_to

# Vectors


def with_norm(value: Float[Tensor, "*rows d"], norm: Float[Tensor, "*#rows"]) -> Float[Tensor, "*rows d"]:
    """Change the norm of vectors, keeping their direction; a zero vector stays zero.

    Args:
        value: vectors.
        norm: the new norms.
    """
    size = value.norm(dim=-1, keepdim=True)
    return torch.where(size > 0, value * (norm[..., None] / size), value)


def with_direction(value: Float[Tensor, "*rows d"], direction: Float[Tensor, "*#rows d"]) -> Float[Tensor, "*rows d"]:
    """Change the direction of vectors, keeping their norm.

    Args:
        value: vectors.
        direction: the new directions, of any norm but zero.
    """
    return with_norm(direction.expand_as(value), value.norm(dim=-1))


def with_statistics(value: Float[Tensor, "*rows d"], like: Float[Tensor, "*#rows d"]) -> Float[Tensor, "*rows d"]:
    """Change the mean and variance over channels to those of other vectors.

    Args:
        value: vectors.
        like: the vectors whose mean and variance are used.
    """
    size = value.std(dim=-1, keepdim=True)
    scale = torch.where(size > 0, like.std(dim=-1, keepdim=True) / size, 0)
    return value * scale + (like.mean(dim=-1, keepdim=True) - value.mean(dim=-1, keepdim=True) * scale)


def component(value: Float[Tensor, "*rows d"], direction: Float[Tensor, "*#rows d"]) -> Float[Tensor, "*rows"]:
    """Compute the component of vectors along a direction: the signed length of the projection.

    Args:
        value: vectors.
        direction: the direction, of any norm but zero.
    """
    return (value * normalize(direction, dim=-1)).sum(-1)


def with_component(
    value: Float[Tensor, "*rows d"], direction: Float[Tensor, "*#rows d"], size: Float[Tensor, "*#rows"]
) -> Float[Tensor, "*rows d"]:
    """Set the component of vectors along a direction.

    Args:
        value: vectors.
        direction: the direction, of any norm but zero.
        size: the new component; 0 removes the direction.
    """
    return with_added(value, direction, size - component(value, direction))


def with_added(
    value: Float[Tensor, "*rows d"], direction: Float[Tensor, "*#rows d"], size: Float[Tensor, "*#rows"]
) -> Float[Tensor, "*rows d"]:
    """Add a multiple of the unit vector of a direction.

    Args:
        value: vectors.
        direction: the direction, of any norm but zero.
        size: the multiple.
    """
    return value + size[..., None] * normalize(direction, dim=-1)


def with_orthogonal(
    value: Float[Tensor, "*rows d"], other: Float[Tensor, "*rows d"], direction: Float[Tensor, "*#rows d"]
) -> Float[Tensor, "*rows d"]:
    """Combine the component of one vector along a direction with the orthogonal part of another vector.

    Args:
        value: vectors whose component along the direction is used.
        other: vectors whose orthogonal part is used.
        direction: the direction, of any norm but zero.
    """
    return with_component(other, direction, component(value, direction))


def median_norm_of_others(
    stream: Float[Tensor, "batch pos d"], position: Int[Tensor, " batch"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    """Compute the median norm over the real positions of each prompt except one.

    Args:
        stream: vectors at all positions.
        position: index of the position that is left out.
        mask: real tokens.
    """
    others = mask & (torch.arange(stream.shape[1], device=stream.device) != position[:, None])
    return stream.norm(dim=-1).masked_fill(~others, torch.nan).nanquantile(0.5, dim=1)


# Attention


def attending_to_itself(
    pattern: Float[Tensor, "batch head query key"], position: Int[Tensor, " batch"]
) -> Float[Tensor, "batch head query key"]:
    """Let the query of one position attend only to that position, as P0 does.

    Args:
        pattern: attention weights.
        position: index of the position in each prompt.
    """
    new = pattern.clone()
    new[row_indices(pattern), :, position] = one_hot(position, pattern.shape[-1])[:, None].to(pattern)
    return new


def attending_as(
    pattern: Float[Tensor, "batch head query key"], position: Int[Tensor, " batch"], donor: Int[Tensor, " batch"]
) -> Float[Tensor, "batch head query key"]:
    """Copy the attention row of a donor to another query, including later keys if the donor is later.

    Args:
        pattern: attention weights.
        position: index of the query that receives the row.
        donor: index of the query whose row is copied.
    """
    new = pattern.clone()
    new[row_indices(pattern), :, position] = pattern[row_indices(pattern), :, donor]
    return new


def without_key(
    scores: Float[Tensor, "batch head query key"], position: Int[Tensor, " batch"]
) -> Float[Tensor, "batch head query key"]:
    """Mask a key for all later queries.

    Args:
        scores: attention scores before the softmax.
        position: index of the key in each prompt.
    """
    later = torch.arange(scores.shape[-2], device=scores.device) > position[:, None]
    hidden = one_hot(position, scores.shape[-1]).bool()
    return scores.masked_fill(later[:, None, :, None] & hidden[:, None, None, :], -torch.inf)


def redirected(
    pattern: Float[Tensor, "batch head query key"], position: Int[Tensor, " batch"], target: Int[Tensor, " batch"]
) -> Float[Tensor, "batch head query key"]:
    """Move the attention to one key to another key, for queries from that other key on.

    Args:
        pattern: attention weights.
        position: index of the key that loses attention.
        target: index of the key that receives it.
    """
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
    """Compute the output of heads with a zero value at one position, keeping the attention weights.

    Args:
        z: output of the heads.
        pattern: attention weights.
        values: value vectors, one head per query head.
        position: index of the value in each prompt.
    """
    hidden = one_hot(position, pattern.shape[-1]).bool()
    mixed = torch.einsum("bhqk,bkhd->bqhd", pattern.masked_fill(hidden[:, None, None], 0).to(values), values)
    reached = torch.arange(z.shape[1], device=z.device) >= position[:, None]
    return torch.where(reached[..., None, None], mixed.to(z), z)


def with_zero_logit(
    pattern: Float[Tensor, "batch head query key"], scores: Float[Tensor, "batch head query key"]
) -> Float[Tensor, "batch head query key"]:
    """Compute attention with an additional logit 0: `exp(s) / (1 + sum exp(s))`.

    Args:
        pattern: the softmax of the scores.
        scores: the scores.
    """
    # The factor 1 - 1 / (1 + S), with S = sum exp(s), is the sigmoid of log S, which does not overflow.
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return pattern * wide.logsumexp(-1, keepdim=True).sigmoid().to(pattern)


def row_indices(rows: Tensor) -> Int[Tensor, " batch"]:
    """Number the rows of a tensor, to index its first axis together with a position per row.

    Args:
        rows: any tensor [batch, ...].
    """
    return torch.arange(len(rows), device=rows.device)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Convert half precision to float32, in which norms and means are accurate; other dtypes stay.

    Args:
        tensor: any tensor.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
