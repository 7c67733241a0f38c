"""Decoding with a window and a few kept tokens (StreamingLLM), exactly and in one forward pass.

1. *The cache* of query t holds its last `window` keys, itself included, and those of the kept positions, however old.
   Every layer has such a cache, so what a token can know of evicted ones is what reached it before they went.
2. *One pass.* Decoding token by token computes each query once, from keys that never change after they were made. A
   causal pass whose scores are masked to the caches computes the same, all queries side by side.
3. *Places in the cache.* Rotary positions are counted inside the cache: the kept tokens that have fallen out of the
   window stand right before it. A query is then as far from the keys of its window as in the text; only the columns of
   those kept tokens change. Query and key are turned back from their places in the text to those in the cache, and
   their score is made again.
4. *How a layer turns* is measured: random vectors are put in the place of the keys, all positions alike, and the angles
   are read off what comes out of the rotation. So scaled, partial and per-layer rotations need no code of their own.
   In every pass the scores made from query and key are compared with the model's own before they are changed.

Learned positions are part of the keys and stay as they were; without positions there is nothing to count.
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
TOLERANCE = 1e-4
"""How far a measured rotation, or a score made from query and key, may be from the model's own, relative to the
largest; more where the dtype is coarser."""


@dataclass(frozen=True)
class Rotation:
    """How a layer turns queries and keys: pairs of channels, each by its own angle for every position.

    Attributes:
        first, second: the channels of each pair; the others are not turned.
        cos, sin: of the angle that a distance of so many positions turns a pair by.
    """

    first: Int[Tensor, " pair"]
    second: Int[Tensor, " pair"]
    cos: Float[Tensor, "pos pair"]
    sin: Float[Tensor, "pos pair"]

    def turned_back(
        self, vectors: Float[Tensor, "batch pos head d_head"], by: Int[Tensor, " pos"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """The vectors of each position as if they stood `by` positions earlier."""
        by = by.to(self.cos.device)
        cos, sin = (part[by][:, None].to(vectors) for part in (self.cos, self.sin))
        one, other = vectors[..., self.first], vectors[..., self.second]
        turned = vectors.clone()
        turned[..., self.first] = one * cos + other * sin
        turned[..., self.second] = other * cos - one * sin
        return turned


@dataclass(frozen=True)
class KeyCache:
    """What each query of a row finds in its cache, and where.

    Attributes:
        visible: the keys that are in it, those after the query not yet left out.
        query_place: the query's own place in it.
        kept: the kept positions in order; once out of the window, they have the places 0, 1, 2 and so on.
        fallen_out: whether they are out of the window.
    """

    visible: Bool[Tensor, "query key"]
    query_place: Int[Tensor, " query"]
    kept: tuple[int, ...]
    fallen_out: Bool[Tensor, "query kept"]


def cache_of(length: int, window: int, kept: Sequence[int]) -> KeyCache:
    """The caches of a row of `length` tokens, of which `kept` stay when they fall out of the window.

    Raises:
        InterventionError: the window shows nothing, or a kept position lies outside the row or comes twice.
    """
    if window < 1:
        raise InterventionError(f"a window shows at least the query's own key, got window = {window}")
    places = tuple(sorted(set(kept)))
    if len(places) != len(kept) or any(not 0 <= place < length for place in places):
        raise InterventionError(f"kept positions must be different and lie in 0 to {length - 1}, got {tuple(kept)}")
    queries = torch.arange(length)
    distance = queries[:, None] - queries
    visible = distance < window
    visible[:, list(places)] = True
    fallen_out = distance[:, list(places)] >= window
    return KeyCache(visible, fallen_out.sum(1) + queries.clamp(max=window - 1), places, fallen_out)


def streamed(model: HookedModel, prompts: PromptSet, kept: Sequence[int], window: int) -> Intervention:
    """Decode the prompts with caches of the last `window` tokens and of the `kept` positions, as StreamingLLM does.

    Raises:
        InterventionError: for the reasons of `cache_of` and `why_not_streamed`, or, from the pass, because scores are
            not those of query and key.
    """
    if reason := why_not_streamed(model, prompts):
        raise InterventionError(reason)
    cache = cache_of(prompts.length, window, kept)
    rotary = describe(model).positions == "rotary" and bool(cache.fallen_out.any())
    turns = rotations(model, prompts.length) if rotary else []
    dropped = torch.arange(prompts.length) - cache.query_place

    def keep(activation: Tensor, rows: slice, name: str, seen: dict[str, Tensor]) -> None:
        seen[name] = activation

    def change(scores: Tensor, rows: slice, layer: int, seen: dict[str, Tensor]) -> Tensor:
        changed = scores.masked_fill(~cache.visible.to(scores.device), -torch.inf)
        if rotary:
            query, key, form = seen.pop("query"), seen.pop("key"), ScoreForm.of(model, layer)
            first = cache.kept[0]
            _check_form(form.score(query, key[:, first])[..., first:], scores[..., first:, first], layer)
            query = turns[layer].turned_back(query, dropped)
            for rank, place in enumerate(cache.kept):
                moved = turns[layer].turned_back(key[:, [place]], torch.tensor([place - rank]))
                score = form.score(query, moved[:, 0]).to(changed)
                out = cache.fallen_out[:, rank].to(scores.device)
                changed[..., place] = torch.where(out, score, changed[..., place])
        return changed

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
    """Why `streamed` cannot be exact on this model and these prompts; None where it can."""
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
    """Step 4: how every layer of a model with rotary positions turns its queries and keys, up to `length` positions.

    Measured once per model and length: no weight decides it.

    Raises:
        InterventionError: a layer does something else than turning pairs of channels.
    """
    known = _ROTATIONS.setdefault(model, {})
    if length not in known:
        known[length] = _measured_rotations(model, length)
    return known[length]


@torch.no_grad()
def _measured_rotations(model: HookedModel, length: int) -> list[Rotation]:
    info = describe(model)
    drawn = torch.randn(PROBES, info.d_head, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []

    def put(keys: Tensor, hook: Any) -> Tensor:
        return drawn[:, None, None].to(keys).expand_as(keys)

    def read(keys: Tensor, hook: Any) -> None:
        seen.append(keys[:, :, 0])

    hooks = []
    for layer in range(info.n_layers):
        hooks += [(f"blocks.{layer}.attn.hook_k", put), (key_hook(model, layer), read)]
    ids = torch.zeros(PROBES, length, dtype=torch.long)
    forward(model, ids, hooks=hooks, stop_at_layer=info.n_layers)
    return [_rotation(probes, f"block {layer} of {info.name}") for layer, probes in enumerate(seen)]


def _rotation(probes: Float[Tensor, "probe pos d_head"], where: str) -> Rotation:
    """The rotation that explains what became of the probes."""
    wide = probes.to(torch.promote_types(probes.dtype, torch.float32))
    allowed = _tolerance(probes) * float(wide.abs().max())
    width = probes.shape[-1]
    for size in range(width // 2 * 2, 0, -2):
        channels = torch.arange(size, device=probes.device)
        # Llama and its kin pair the halves, GPT-J and its kin neighbours.
        for first, second in (channels.chunk(2), (channels[::2], channels[1::2])):
            found = torch.complex(wide[..., first], wide[..., second])
            start = found[:, :1]
            size_of_start = start.abs().square().sum(0)
            # A norm before the rotation may take a pair of channels out altogether (Gemma 3): then it turns nothing.
            turn = torch.where(size_of_start > 0, (found * start.conj()).sum(0) / size_of_start, 1.0)
            rest = torch.ones(width, dtype=torch.bool, device=probes.device)
            rest[:size] = False
            errors = (found - start * turn).abs(), (wide - wide[:, :1])[..., rest].abs()
            if all(float(error.max()) <= allowed for error in errors if error.numel()):
                return Rotation(first, second, turn.real, turn.imag)
    raise InterventionError(f"{where} does not turn its keys by pairs of channels: its rotation cannot be re-indexed")


def _check_form(made: Tensor, own: Tensor, layer: int) -> None:
    """Make sure that scores made of query and key are the model's own."""
    error, largest = float((made - own).abs().max()), float(own.abs().max())
    if not error <= _tolerance(own) * max(1.0, largest):
        raise InterventionError(
            f"the scores of block {layer} are not those of its queries and keys: they differ by {error:.2g}, so places "
            "in a cache cannot be counted"
        )


def _tolerance(values: Tensor) -> float:
    return max(TOLERANCE, 8 * torch.finfo(values.dtype).eps)
