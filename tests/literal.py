"""The metrics once more, in plain loops over one row without padding: what the tests hold the package against."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def run_with_cache(model: Any, ids: Tensor) -> tuple[Tensor, Any]:
    """Logits and all activations of one row without padding, by TransformerLens's own means."""
    with torch.no_grad():
        return model.run_with_cache(ids[None])


def norm(vector: Tensor) -> float:
    return math.sqrt(sum(x * x for x in vector.tolist()))


def median(values: list[float]) -> float:
    values, middle = sorted(values), len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2


def over_others(vectors: Tensor) -> float:
    return norm(vectors[0]) / median([norm(vector) for vector in vectors[1:]])


def score(pattern: Tensor, offset: int) -> list[float]:
    """The mean attention to a position from itself and all later queries, by head."""
    length = pattern.shape[-1]
    return [sum(float(head[query, offset]) for query in range(offset, length)) / (length - offset) for head in pattern]


def cosine(queries: Tensor, keys: Tensor, offset: int) -> list[float]:
    """The mean cosine of the key at a position with all later queries, by query head."""
    length, heads = queries.shape[:2]
    found = []
    for head in range(heads):
        key = keys[offset, head * keys.shape[1] // heads]
        pairs = [(queries[query, head], key) for query in range(offset + 1, length)]
        found.append(sum(float(q @ k) / norm(q) / norm(k) for q, k in pairs) / len(pairs))
    return found


def loss(logits: Tensor, ids: Tensor) -> list[float]:
    exact = logits.double()
    return [float(exact[t].exp().sum().log() - exact[t, ids[t + 1]]) for t in range(len(ids) - 1)]


def direction_cosines(vectors: list[Tensor]) -> list[float]:
    """The cosine of each vector with the mean of all unit vectors."""
    units = [vector / norm(vector) for vector in vectors]
    mean = sum(units[1:], units[0]) / len(units)
    return [float(unit @ mean) / norm(mean) for unit in units]
