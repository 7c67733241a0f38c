"""The metrics: pure functions on tensors, each a definition from the literature. This file imports nothing of ours.

Every function works per sample, so that intervals can be drawn over samples; averaging is the caller's last step.
Rows may be left-padded: `p0` is the index of the first real token of each row, `mask` is True at real tokens.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SINK_THRESHOLD = 0.3
"""eps of the sink rate (Gu et al. 2025, arXiv 2410.10781)."""
CIRCUIT_BLOCKS = (0, 1)
"""Blocks in which the paper finds the sink decided: claims about "blocks 0 and 1" are about these."""
CONTROL = 8
"""The position, counted from P0, whose score stands beside P0's: the excess score is the difference."""
TIMES_UNIFORM = 2
"""A sink exists where the excess is, beyond doubt, more than this many times that of uniform attention."""


def attention_to(
    pattern: Float[Tensor, "batch head query key"], position: Int[Tensor, " batch"]
) -> Float[Tensor, "batch head query"]:
    """The attention every query gives to one key position of its row."""
    index = position[:, None, None, None].expand(*pattern.shape[:3], 1)
    return pattern.gather(-1, index).squeeze(-1)


def sink_score(
    pattern: Float[Tensor, "batch head query key"],
    position: Int[Tensor, " batch"],
    mask: Bool[Tensor, "batch query"] | None = None,
) -> Float[Tensor, "batch head"]:
    """`alpha_k`: the mean attention that the queries at or after `position` give to it, itself included.

    With `position` at P0 this is the sink score (Gu et al. 2025, section 3).
    """
    return mean_over_queries(attention_to(pattern, position), position, mask)


def mean_over_queries(
    attention: Float[Tensor, "batch head query"],
    position: Int[Tensor, " batch"],
    mask: Bool[Tensor, "batch query"] | None = None,
) -> Float[Tensor, "batch head"]:
    """The mean over the real queries at or after `position` of the attention they give to it."""
    queries = torch.arange(attention.shape[-1], device=attention.device) >= position[:, None]
    if mask is not None:
        queries = queries & mask
    weights = queries[:, None].to(attention.dtype)
    return (attention * weights).sum(-1) / weights.sum(-1)


def sink_rate(
    scores: Float[Tensor, "batch layer head"], eps: float = SINK_THRESHOLD, from_layer: int = 0
) -> Float[Tensor, " batch"]:
    """`Sink_0^eps[from_layer:]` of every sample: the share of its heads whose sink score is above `eps`.

    The sink rate of a model is the mean over samples (Gu et al. 2025, section 3).

    Raises:
        ValueError: no layer is left from `from_layer` on.
    """
    if not 0 <= from_layer < scores.shape[1]:
        raise ValueError(
            f"from_layer={from_layer} leaves none of the {scores.shape[1]} layers; expected 0 to {scores.shape[1] - 1}"
        )
    return (scores[:, from_layer:] > eps).to(scores.dtype).mean((1, 2))


def ratio_to_others(
    sizes: Float[Tensor, "batch pos *rest"],
    p0: Int[Tensor, " batch"],
    mask: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "batch *rest"]:
    """A size at P0 over the median of that size at the other positions of the row.

    The median of an even number of positions is the mean of the middle two.
    """
    others = torch.arange(sizes.shape[1], device=sizes.device) != p0[:, None]
    if mask is not None:
        others = others & mask
    shape = (*others.shape, *[1] * (sizes.ndim - 2))
    rest = sizes.masked_fill(~others.view(shape), torch.nan).nanquantile(0.5, dim=1)
    return sizes[torch.arange(len(sizes), device=sizes.device), p0] / rest


def norm_ratio(
    residual: Float[Tensor, "batch pos d_model"],
    p0: Int[Tensor, " batch"],
    mask: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, " batch"]:
    """The norm of the residual stream at P0 over the median norm at the other positions."""
    return ratio_to_others(residual.float().norm(dim=-1), p0, mask)


def value_norm_ratio(
    values: Float[Tensor, "batch pos kv_head d_head"],
    p0: Int[Tensor, " batch"],
    mask: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "batch kv_head"]:
    """The norm of P0's value vector over the median of the others, per key/value head.

    Below 1 is the value-state drain of Guo et al. 2024 (arXiv 2410.13835).
    """
    return ratio_to_others(values.float().norm(dim=-1), p0, mask)


def direction_cosines(vectors: Float[Tensor, "batch *layer d_model"]) -> Float[Tensor, "batch *layer"]:
    """The cosine of each sample's vector with the mean direction of all samples.

    The mean over samples is the direction consistency: 1 when every sample has the same direction, about
    1 / sqrt(samples) for independent directions. The mean direction is the mean of unit vectors, so that no sample
    counts for more because its norm is larger.
    """
    units = torch.nn.functional.normalize(vectors.float(), dim=-1)
    return (units * torch.nn.functional.normalize(units.mean(0, keepdim=True), dim=-1)).sum(-1)


def key_query_cosine(
    queries: Float[Tensor, "batch query head d_head"],
    keys: Float[Tensor, "batch key kv_head d_head"],
    position: Int[Tensor, " batch"],
    mask: Bool[Tensor, "batch query"] | None = None,
) -> Float[Tensor, "batch head"]:
    """The mean cosine between the key at `position` and the queries after it, per query head.

    Queries and keys as they enter the scores, that is after rotation. Under grouped-query attention each query head
    is paired with the key head of its group.
    """
    key = keys[torch.arange(len(keys), device=keys.device), position]
    key = key.repeat_interleave(queries.shape[2] // keys.shape[2], dim=1)
    cosines = torch.nn.functional.cosine_similarity(queries.float(), key[:, None].float(), dim=-1)
    after = torch.arange(queries.shape[1], device=queries.device) > position[:, None]
    if mask is not None:
        after = after & mask
    weights = after[..., None].to(cosines.dtype)
    return (cosines * weights).sum(1) / weights.sum(1)


def uniform_score(length: int) -> float:
    """The sink score of heads that attend to all they see alike, on prompts of this length: high on short ones."""
    return float((1 / torch.arange(1, length + 1, dtype=torch.float64)).mean())


def shortest_for(eps: float = SINK_THRESHOLD) -> int:
    """The fewest tokens at which uniform attention scores no more than `eps`, so that a sink rate means something."""
    length = 1
    while uniform_score(length) > eps:
        length += 1
    return length


def uniform_excess(length: int) -> float:
    """The excess score of heads that attend to all they see alike, on prompts of this length."""
    weights = 1 / torch.arange(1, length + 1, dtype=torch.float64)
    return float(weights.mean() - weights[CONTROL:].mean())


def least_excess(length: int) -> float:
    """What an excess score has to be above, beyond doubt, for there to be a sink on prompts of this length."""
    return TIMES_UNIFORM * uniform_excess(length)


FALLBACK_HEADS = 3


def sink_heads(
    scores: Float[Tensor, "sample layer head"], eps: float = SINK_THRESHOLD, fallback: int = FALLBACK_HEADS
) -> list[tuple[int, int]]:
    """The heads whose mean sink score is above `eps`, as (layer, head); if there are none, the highest `fallback`."""
    means = scores.double().mean(0)
    if any_sink_head(scores, eps):
        return [(int(layer), int(head)) for layer, head in (means > eps).nonzero()]
    highest = means.flatten().topk(min(fallback, means.numel())).indices.tolist()
    return sorted(divmod(number, means.shape[1]) for number in highest)


def any_sink_head(scores: Float[Tensor, "sample layer head"], eps: float = SINK_THRESHOLD) -> bool:
    """Whether any head's mean sink score is above `eps`."""
    return bool((scores.double().mean(0) > eps).any())
