"""Decoding with a sliding window and sink tokens (StreamingLLM), exactly and in one forward pass.

1. *Cache.* The cache of query t holds its last `window` keys, its own included, and the keys of the sink positions,
   however old. Every layer has such a cache, so evicted tokens act only through what they passed on before.
2. *One pass.* Decoding token by token computes each query once, from keys that do not change afterwards. A causal pass
   whose scores are masked to the caches computes the same, all queries at once.
3. *Positions in the cache.* Rotary positions are counted inside the cache: sink tokens that have left the window stand
   right before it. The distance of a query to the keys of its window is the same as in the text; only the scores of the
   sink tokens change. Query and key are rotated back from their positions in the text to those in the cache, and their
   score is computed again.
4. *Rotation of a layer.* It is measured: random vectors take the place of the keys, the same at all positions, and the
   angles are computed from the rotated vectors. Scaled, partial and per-layer rotations thus need no code of their own.
   In every pass the scores computed from query and key are compared with the model's own before they are changed.

Learned positions are part of the keys and stay; without positions there is nothing to count.
Source: Xiao et al. 2023, arXiv 2309.17453, section 3.2.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.closed_form import ScoreForm, key_hook, query_hook
from p0circuit.interventions.intervention import Change, Intervention
from p0circuit.interventions.nodes import InterventionError
from p0circuit.models import describe, forward
from p0circuit.models.hooks import hook_points
from p0circuit.prompts import PromptSet

PROBES = 4
"""Number of random vectors that measure a rotation."""
TOLERANCE = 1e-4
"""Tolerance of a measured rotation, or of a score computed from query and key, relative to the largest number; it is
larger for coarser dtypes."""


@dataclass(frozen=True)
class Rotation:
    """Rotation of queries and keys in a layer: pairs of channels, each with its own angle per position.

    Attributes:
        first: first channel of each pair; channels outside pairs are not rotated.
        second: second channel of each pair.
        cos: cosine of the angle of each pair, by distance in positions.
        sin: sine of the angle of each pair, by distance in positions.
    """

    first: Int[Tensor, " pair"]
    second: Int[Tensor, " pair"]
    cos: Float[Tensor, "pos pair"]
    sin: Float[Tensor, "pos pair"]

    def rotate_back(
        self, vectors: Float[Tensor, "batch pos head d_head"], by: Int[Tensor, " pos"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Rotate the vectors of each position to an earlier position.

        Args:
            vectors: queries or keys after their rotation.
            by: number of positions to go back, for each position.
        """
        by = by.to(self.cos.device)
        cos, sin = (part[by][:, None].to(vectors) for part in (self.cos, self.sin))
        one, other = vectors[..., self.first], vectors[..., self.second]
        rotated = vectors.clone()
        rotated[..., self.first] = one * cos + other * sin
        rotated[..., self.second] = other * cos - one * sin
        return rotated


@dataclass(frozen=True)
class KeyCache:
    """The caches of all queries of a prompt.

    Attributes:
        visible: which keys each cache holds; keys after the query are not excluded yet.
        query_position: position of each query in its cache.
        sinks: the sink positions in order; outside the window they have the positions 0, 1, 2 and so on in the cache.
        outside: whether each sink position is outside the window of a query.
    """

    visible: Bool[Tensor, "query key"]
    query_position: Int[Tensor, " query"]
    sinks: tuple[int, ...]
    outside: Bool[Tensor, "query sink"]


def cache_of(length: int, window: int, sinks: Sequence[int]) -> KeyCache:
    """Compute the caches of all queries of a prompt.

    Args:
        length: tokens of the prompt.
        window: number of keys in the window, including the query's own.
        sinks: positions whose keys stay in the cache.

    Raises:
        InterventionError: the window is empty, or a sink position lies outside the prompt or is given twice.
    """
    if window < 1:
        raise InterventionError(f"a window holds at least the query's own key, got window = {window}")
    positions = tuple(sorted(set(sinks)))
    if len(positions) != len(sinks) or any(not 0 <= position < length for position in positions):
        raise InterventionError(f"kept positions must be different and lie in 0 to {length - 1}, got {tuple(sinks)}")
    queries = torch.arange(length)
    distance = queries[:, None] - queries
    visible = distance < window
    visible[:, list(positions)] = True
    outside = distance[:, list(positions)] >= window
    return KeyCache(visible, outside.sum(1) + queries.clamp(max=window - 1), positions, outside)


def streamed(model: HookedModel, prompts: PromptSet, sinks: Sequence[int], window: int) -> Intervention:
    """Decode prompts with caches of the last tokens and of sink positions, as StreamingLLM does.

    Args:
        model: a hooked model.
        prompts: the prompts, without padding.
        sinks: positions whose keys stay in the cache; () for a plain sliding window.
        window: number of keys in the window, including the query's own.

    Raises:
        InterventionError: for the reasons of `cache_of` and `why_not_streamed`; or, during the pass, if the model's
            scores are not those computed from query and key.
    """
    if reason := why_not_streamed(model, prompts):
        raise InterventionError(reason)
    cache = cache_of(prompts.length, window, sinks)
    rotary = describe(model).positions == "rotary" and bool(cache.outside.any())
    layer_rotations = rotations(model, prompts.length) if rotary else []
    shift = torch.arange(prompts.length) - cache.query_position

    def keep(activation: Tensor, rows: slice, name: str, seen: dict[str, Tensor]) -> None:
        seen[name] = activation

    def change(scores: Tensor, rows: slice, layer: int, seen: dict[str, Tensor]) -> Tensor:
        new = scores.masked_fill(~cache.visible.to(scores.device), -torch.inf)
        if rotary:
            query, key, form = seen.pop("query"), seen.pop("key"), ScoreForm.of(model, layer)
            first = cache.sinks[0]
            _check_form(form.score(query, key[:, first])[..., first:], scores[..., first:, first], layer)
            query = layer_rotations[layer].rotate_back(query, shift)
            for rank, position in enumerate(cache.sinks):
                moved = layer_rotations[layer].rotate_back(key[:, [position]], torch.tensor([position - rank]))
                score = form.score(query, moved[:, 0]).to(new)
                outside = cache.outside[:, rank].to(scores.device)
                new[..., position] = torch.where(outside, score, new[..., position])
        return new

    changes: list[tuple[str, Change]] = []
    for layer in range(describe(model).n_layers):
        seen: dict[str, Tensor] = {}
        if rotary:
            changes.append((query_hook(model, layer), functools.partial(keep, name="query", seen=seen)))
            changes.append((key_hook(model, layer), functools.partial(keep, name="key", seen=seen)))
        scores = f"blocks.{layer}.attn.hook_attn_scores"
        changes.append((scores, functools.partial(change, layer=layer, seen=seen)))
    return Intervention(model, prompts, tuple(changes))


def why_not_streamed(model: HookedModel, prompts: PromptSet) -> str | None:
    """Return why `streamed` cannot be exact on a model and prompts; None if it can.

    Args:
        model: a hooked model.
        prompts: the prompts.
    """
    info, points = describe(model), hook_points(model)
    if not bool(prompts.attention_mask.all()):
        return "these prompts are padded: give rows of one length, so that all are equally far into the stream"
    if "blocks.0.attn.hook_attn_scores" not in points.by_name:
        return f"the attention of {info.name} ({info.architecture}) cannot be edited"
    if info.positions == "alibi":
        return f"the positions of {info.name} are ALiBi's, whose places in a cache are not told from the scores here"
    if info.positions == "rotary" and query_hook(model, 0) not in points.by_name:
        return f"the rotation of {info.name} ({info.architecture}) happens where it cannot be reached"
    if windows := sorted({window for window in info.window if window and window < prompts.length}):
        return (
            f"{info.name} has windows of its own, of {windows[0]} tokens: they drop P0 in any case; give prompts of at "
            f"most {windows[0]} tokens"
        )
    return None


_ROTATIONS: weakref.WeakKeyDictionary[Any, dict[int, list[Rotation]]] = weakref.WeakKeyDictionary()


def rotations(model: HookedModel, length: int) -> list[Rotation]:
    """Measure the rotation of queries and keys in every layer of a model with rotary positions.

    It is measured once per model and length, because it does not depend on weights.

    Args:
        model: a hooked model.
        length: number of positions.

    Raises:
        InterventionError: a layer does something else than rotating pairs of channels.
    """
    known = _ROTATIONS.setdefault(model, {})
    if length not in known:
        known[length] = _measured_rotations(model, length)
    return known[length]


@torch.no_grad()
def _measured_rotations(model: HookedModel, length: int) -> list[Rotation]:
    info = describe(model)
    vectors = torch.randn(PROBES, info.d_head, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []

    def put(keys: Tensor, hook: object) -> Tensor:
        return vectors[:, None, None].to(keys).expand_as(keys)

    def read(keys: Tensor, hook: object) -> None:
        seen.append(keys[:, :, 0])

    hooks = []
    for layer in range(info.n_layers):
        hooks += [(f"blocks.{layer}.attn.hook_k", put), (key_hook(model, layer), read)]
    ids = torch.zeros(PROBES, length, dtype=torch.long)
    forward(model, ids, hooks=hooks, stop_at_layer=info.n_layers)
    return [_rotation(probes, f"block {layer} of {info.name}") for layer, probes in enumerate(seen)]


def _rotation(probes: Float[Tensor, "probe pos d_head"], where: str) -> Rotation:
    """The rotation that turns the probes at the first position into those at every other position."""
    wide = probes.to(torch.promote_types(probes.dtype, torch.float32))
    allowed = _tolerance(probes) * float(wide.abs().max())
    width = probes.shape[-1]
    for size in range(width // 2 * 2, 0, -2):
        channels = torch.arange(size, device=probes.device)
        # Llama and similar models pair the halves of the channels; GPT-J and similar models pair neighbours.
        for first, second in (channels.chunk(2), (channels[::2], channels[1::2])):
            pairs = torch.complex(wide[..., first], wide[..., second])
            start = pairs[:, :1]
            size_of_start = start.abs().square().sum(0)
            # A norm before the rotation may set a pair of channels to zero (Gemma 3), which then has no angle.
            turn = torch.where(size_of_start > 0, (pairs * start.conj()).sum(0) / size_of_start, 1.0)
            rest = torch.ones(width, dtype=torch.bool, device=probes.device)
            rest[:size] = False
            errors = (pairs - start * turn).abs(), (wide - wide[:, :1])[..., rest].abs()
            if all(float(error.max()) <= allowed for error in errors if error.numel()):
                return Rotation(first, second, turn.real, turn.imag)
    raise InterventionError(f"{where} does not turn its keys by pairs of channels: its rotation cannot be re-indexed")


def _check_form(made: Tensor, own: Tensor, layer: int) -> None:
    """Check that scores computed from query and key are the model's own."""
    error, largest = float((made - own).abs().max()), float(own.abs().max())
    if not error <= _tolerance(own) * max(1.0, largest):
        raise InterventionError(
            f"the scores of block {layer} are not those of its queries and keys: they differ by {error:.2g}, so places "
            "in a cache cannot be counted"
        )


def _tolerance(values: Tensor) -> float:
    return max(TOLERANCE, 8 * torch.finfo(values.dtype).eps)
