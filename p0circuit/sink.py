"""The metrics of an attention sink: pure functions on tensors, each a definition from the literature.

Every function works per sample, so that intervals can be computed over samples; averaging is the caller's last step.
Prompts may be padded on the left: `p0` is the index of the first real token of each prompt, and `mask` is true where a
token is real. This module imports nothing else of the package.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SINK_THRESHOLD = 0.3
"""eps of the sink rate (Gu et al. 2025, arXiv 2410.10781)."""
CIRCUIT_BLOCKS = (0, 1)
"""Blocks whose effect on the sink the paper claims: claims about "blocks 0 and 1" are about these."""
CONTROL = 8
"""The control position, in tokens after P0. The excess score is the score of P0 minus the score of this position."""
TIMES_UNIFORM = 2
"""Criterion for a sink: the excess score is more than this many times that of uniform attention."""
FALLBACK_HEADS = 3
"""Number of heads that `sink_heads` returns if no head passes the threshold."""


def attention_to(
    pattern: Float[Tensor, "batch head query key"], position: Int[Tensor, " batch"]
) -> Float[Tensor, "batch head query"]:
    """Select the attention that every query gives to one key position of its prompt.

    Args:
        pattern: attention weights.
        position: index of the key in each prompt.
    """
    index = position[:, None, None, None].expand(*pattern.shape[:3], 1)
    return pattern.gather(-1, index).squeeze(-1)


def sink_score(
    pattern: Float[Tensor, "batch head query key"],
    position: Int[Tensor, " batch"],
    mask: Bool[Tensor, "batch query"] | None = None,
) -> Float[Tensor, "batch head"]:
    """Compute the sink score `alpha_k`: the mean attention to `position` of the queries from `position` on.

    The query at `position` itself is included. With `position` at P0 this is the sink score of Gu et al. 2025
    (arXiv 2410.10781, section 3).

    Args:
        pattern: attention weights.
        position: index of the key in each prompt.
        mask: real tokens; all if None.

    Returns:
        Sink scores, from 0 to 1.
    """
    return mean_over_queries(attention_to(pattern, position), position, mask)


def mean_over_queries(
    attention: Float[Tensor, "batch head query"],
    position: Int[Tensor, " batch"],
    mask: Bool[Tensor, "batch query"] | None = None,
) -> Float[Tensor, "batch head"]:
    """Average attention to a position over the real queries from that position on.

    Args:
        attention: attention to the position, as `attention_to` returns it.
        position: index of the position in each prompt.
        mask: real tokens; all if None.
    """
    queries = torch.arange(attention.shape[-1], device=attention.device) >= position[:, None]
    if mask is not None:
        queries = queries & mask
    weights = queries[:, None].to(attention.dtype)
    return (attention * weights).sum(-1) / weights.sum(-1)


def sink_rate(
    scores: Float[Tensor, "batch layer head"], eps: float = SINK_THRESHOLD, from_layer: int = 0
) -> Float[Tensor, " batch"]:
    """Compute the sink rate `Sink_0^eps` of every sample: the share of heads whose sink score is above `eps`.

    The sink rate of a model is the mean over samples (Gu et al. 2025, section 3).

    Args:
        scores: sink scores.
        eps: threshold.
        from_layer: first layer that counts.

    Returns:
        Shares, from 0 to 1.

    Raises:
        ValueError: there is no layer from `from_layer` on.
    """
    if not 0 <= from_layer < scores.shape[1]:
        raise ValueError(
            f"from_layer={from_layer} leaves none of the {scores.shape[1]} layers; expected 0 to {scores.shape[1] - 1}"
        )
    return (scores[:, from_layer:] > eps).to(scores.dtype).mean((1, 2))


def sink_heads(
    scores: Float[Tensor, "sample layer head"], eps: float = SINK_THRESHOLD, fallback: int = FALLBACK_HEADS
) -> list[tuple[int, int]]:
    """Select the heads whose mean sink score is above `eps`; if there are none, those with the highest scores.

    Args:
        scores: sink scores, as `record(model, prompts, SINK_SCORE)` returns them.
        eps: threshold.
        fallback: number of heads to return if none is above the threshold (`any_sink_head` tells).

    Returns:
        Heads as (layer, head), in order.

    Example:
        scores = p0circuit.record(model, prompts, p0circuit.SINK_SCORE)
        metric = p0circuit.sink_score_of(p0circuit.sink_heads(scores))
    """
    means = scores.double().mean(0)
    if any_sink_head(scores, eps):
        return [(int(layer), int(head)) for layer, head in (means > eps).nonzero()]
    highest = means.flatten().topk(min(fallback, means.numel())).indices.tolist()
    return sorted(divmod(number, means.shape[1]) for number in highest)


def any_sink_head(scores: Float[Tensor, "sample layer head"], eps: float = SINK_THRESHOLD) -> bool:
    """Return whether any head has a mean sink score above `eps`.

    Args:
        scores: sink scores.
        eps: threshold.
    """
    return bool((scores.double().mean(0) > eps).any())


def ratio_to_others(
    sizes: Float[Tensor, "batch pos *rest"],
    p0: Int[Tensor, " batch"],
    mask: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "batch *rest"]:
    """Divide a size at P0 by its median over the other positions of the prompt.

    The median of an even number of positions is the mean of the middle two.

    Args:
        sizes: what is compared, such as norms.
        p0: index of P0 in each prompt.
        mask: real tokens; all if None.
    """
    others = torch.arange(sizes.shape[1], device=sizes.device) != p0[:, None]
    if mask is not None:
        others = others & mask
    shape = (*others.shape, *[1] * (sizes.ndim - 2))
    median = sizes.masked_fill(~others.view(shape), torch.nan).nanquantile(0.5, dim=1)
    return sizes[torch.arange(len(sizes), device=sizes.device), p0] / median


def norm_ratio(
    residual: Float[Tensor, "batch pos d_model"],
    p0: Int[Tensor, " batch"],
    mask: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, " batch"]:
    """Divide the norm of the residual stream at P0 by its median norm at the other positions.

    Args:
        residual: the residual stream.
        p0: index of P0 in each prompt.
        mask: real tokens; all if None.
    """
    return ratio_to_others(residual.float().norm(dim=-1), p0, mask)


def value_norm_ratio(
    values: Float[Tensor, "batch pos kv_head d_head"],
    p0: Int[Tensor, " batch"],
    mask: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "batch kv_head"]:
    """Divide the norm of P0's value vector by the median norm of the others, per key/value head.

    A ratio below 1 is the value-state drain of Guo et al. 2024 (arXiv 2410.13835).

    Args:
        values: value vectors.
        p0: index of P0 in each prompt.
        mask: real tokens; all if None.
    """
    return ratio_to_others(values.float().norm(dim=-1), p0, mask)


def direction_cosines(vectors: Float[Tensor, "batch *layer d_model"]) -> Float[Tensor, "batch *layer"]:
    """Compute the cosine of each sample's vector with the mean direction of all samples.

    The mean of these cosines over samples is the direction consistency: 1 if every sample has the same direction, about
    1 / sqrt(samples) for independent directions. The mean direction is the mean of unit vectors, so that a sample with
    a large norm does not count for more.

    Args:
        vectors: one vector per sample (and layer), such as the residual stream at P0.
    """
    units = torch.nn.functional.normalize(vectors.float(), dim=-1)
    return (units * torch.nn.functional.normalize(units.mean(0, keepdim=True), dim=-1)).sum(-1)


def key_query_cosine(
    queries: Float[Tensor, "batch query head d_head"],
    keys: Float[Tensor, "batch key kv_head d_head"],
    position: Int[Tensor, " batch"],
    mask: Bool[Tensor, "batch query"] | None = None,
) -> Float[Tensor, "batch head"]:
    """Compute the mean cosine between the key at `position` and the queries after it, per query head.

    Under grouped-query attention each query head is paired with the key head of its group.

    Args:
        queries: queries as they enter the scores, that is after rotation.
        keys: keys as they enter the scores.
        position: index of the key in each prompt.
        mask: real tokens; all if None.
    """
    key = keys[torch.arange(len(keys), device=keys.device), position]
    key = key.repeat_interleave(queries.shape[2] // keys.shape[2], dim=1)
    cosines = torch.nn.functional.cosine_similarity(queries.float(), key[:, None].float(), dim=-1)
    after = torch.arange(queries.shape[1], device=queries.device) > position[:, None]
    if mask is not None:
        after = after & mask
    weights = after[..., None].to(cosines.dtype)
    return (cosines * weights).sum(1) / weights.sum(1)


# Uniform attention, the reference


def uniform_score(length: int) -> float:
    """Compute the sink score of a head that attends uniformly to all positions up to its own.

    It is high on short prompts.

    Args:
        length: tokens per prompt.
    """
    return float((1 / torch.arange(1, length + 1, dtype=torch.float64)).mean())


def shortest_for(eps: float = SINK_THRESHOLD) -> int:
    """Find the smallest prompt length at which the sink rate has a meaning: uniform attention scores at most `eps`.

    Args:
        eps: threshold of the sink rate.

    Returns:
        Tokens per prompt.
    """
    length = 1
    while uniform_score(length) > eps:
        length += 1
    return length


def uniform_excess(length: int) -> float:
    """Compute the excess score of a head that attends uniformly to all positions up to its own.

    Args:
        length: tokens per prompt.
    """
    weights = 1 / torch.arange(1, length + 1, dtype=torch.float64)
    return float(weights.mean() - weights[CONTROL:].mean())


def least_excess(length: int) -> float:
    """Return the excess score that the lower end of the interval must exceed for a sink to exist.

    Args:
        length: tokens per prompt.
    """
    return TIMES_UNIFORM * uniform_excess(length)
