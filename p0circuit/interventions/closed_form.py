"""Edges into K at P0, exactly and without a forward pass for each: the fast form of path patching.

1. P0 attends to itself alone, so its residual stream depends on its token only: a row of one token computes it. All
   senders at P0 are patched side by side in one such pass, and every layer's key of P0 is read from it.
2. One ordinary forward pass over the clean prompts gives, layer by layer, the queries and the scores. With `s_t` the
   score of query t at P0 and `Z_t` the logsumexp of its scores at the other keys, its attention to P0 is
   `sigmoid(s_t - Z_t)`.
3. A new key of P0 changes `s_t` alone: `s_t' = s_t + scale * q_t . (k' - k)`, or `cap * tanh(scale * q_t . k' / cap)`
   under a soft cap. `sigmoid(s_t' - Z_t)` is then the patched attention, to the last bit that rounding leaves.

Position enters only through the queries and through terms that do not depend on the key (ALiBi), so learned, rotary,
ALiBi and no positions are all exact; so are grouped-query attention, qk-norm (the key is read after it) and windows
(what is masked stays masked). Whether a given model keeps to this form is not assumed but measured on the clean run:
`KeyEdges.error` is the largest difference from the model's own attention to P0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from p0circuit.errors import P0Error
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.batched_runs import Through, by_slot, repeated, sender_hooks
from p0circuit.interventions.nodes import Node, nodes_of
from p0circuit.models import describe, device_of, forward
from p0circuit.models.hooks import Hook
from p0circuit.prompts import PromptSet
from p0circuit.sink import attention_to, mean_over_queries

ROWS_AT_ONCE = 2048
"""One-token rows in a batch: enough to keep the matrix products busy, few megabytes of activations."""
MASKED = -1e30
"""Scores below this are masks, on any backend."""
SLOTS_AT_ONCE = 64
"""Patched keys scored at a time, so that many senders cost time but not memory."""
TOLERANCE = 1e-4
"""How far the clean attention may be from the closed form; rounding leaves 1e-6 in float32."""


class NotOfTheClosedForm(P0Error):
    """A model's attention to P0 is not `sigmoid(s_t - Z_t)` of query and key, so the closed form would be wrong."""


@dataclass(frozen=True)
class KeyEdges:
    """The effect of every sender at P0 on every head's sink score, through the head's key of P0.

    Attributes:
        senders: in the order of the first axis of `patched`.
        clean: sink scores of the clean run.
        patched: sink scores with the key of P0 that the sender's new value gives.
        method: "closed form", or "hooks" where that is not exact.
        error: largest difference between the closed form's clean attention and the model's own; 0 for hooks.
    """

    senders: tuple[Node, ...]
    clean: Float[Tensor, "batch layer head"]
    patched: Float[Tensor, "sender batch layer head"]
    method: Literal["closed form", "hooks"]
    error: float

    @property
    def effect(self) -> Float[Tensor, "sender batch layer head"]:
        """The change of the sink score: negative where the edge carries the sink."""
        return self.patched - self.clean


@torch.no_grad()
def p0_keys(
    model: HookedModel,
    tokens: Int[Tensor, " batch"],
    senders: Sequence[Node],
    values: Mapping[Node, Tensor],
    through: Through = "direct",
    layers: int | None = None,
) -> Float[Tensor, "slot batch layer kv_head d_head"]:
    """P0's keys below layer `layers`, as they enter the scores: slot 0 clean, slot 1 + i with sender i patched."""
    info = describe(model)
    layers = info.n_layers if layers is None else layers
    per_pass = max(1, ROWS_AT_ONCE // len(tokens) - 1)
    parts: list[Tensor] = []
    for start in range(0, max(1, len(senders)), per_pass):
        some = senders[start : start + per_pass]
        slots = 1 + len(some)
        keys: dict[int, Tensor] = {}

        def read(key: Tensor, hook: Any, layer: int, keys: dict[int, Tensor] = keys, slots: int = slots) -> None:
            keys[layer] = by_slot(key[:, 0], slots).clone()

        hooks = sender_hooks(model, some, values, torch.zeros_like(tokens), through, layers)
        hooks += [(key_hook(model, layer), functools.partial(read, layer=layer)) for layer in range(layers)]
        forward(model, repeated(tokens, slots)[:, None], hooks=hooks, stop_at_layer=layers)
        stacked = torch.stack([keys[layer] for layer in range(layers)], dim=2)
        parts.append(stacked if start == 0 else stacked[1:])
    return torch.cat(parts)


def query_hook(model: HookedModel, layer: int) -> str:
    """The hook at which queries are what enters the scores: after rotation, where positions are rotary."""
    return f"blocks.{layer}.attn.hook_{'rot_' if describe(model).positions == 'rotary' else ''}q"


def key_hook(model: HookedModel, layer: int) -> str:
    """The hook at which keys are what enters the scores: after rotation, where positions are rotary."""
    return f"blocks.{layer}.attn.hook_{'rot_' if describe(model).positions == 'rotary' else ''}k"


@dataclass(frozen=True)
class ScoreForm:
    """How a layer makes a score of a query and a key: `scale * q . k`, under a soft cap if it has one."""

    scale: float
    cap: float | None

    @classmethod
    def of(cls, model: HookedModel, layer: int) -> ScoreForm:
        """Read off the model; `query_side` verifies it on the clean run."""
        attention = model.blocks[layer].attn
        if describe(model).backend == "hooked":
            cap = model.cfg.attn_scores_soft_cap
            return cls(1 / attention.attn_scale, cap if cap > 0 else None)
        own = attention.original_component
        fallback = getattr(own, "inv_norm_factor", describe(model).d_head ** -0.5)
        return cls(getattr(own, "scaling", fallback), getattr(own, "attn_logit_softcapping", None))

    def score(
        self, query: Float[Tensor, "batch query head d_head"], key: Float[Tensor, "*slot batch kv_head d_head"]
    ) -> Float[Tensor, "*slot batch head query"]:
        """The scores of all queries at one key per row, without what does not depend on the key."""
        key = key.repeat_interleave(query.shape[2] // key.shape[-2], dim=-2)
        return self.capped(self.scale * torch.einsum("bqhd,...bhd->...bhq", query, key))

    def capped(self, score: Tensor) -> Tensor:
        """A scaled product under the soft cap, if there is one."""
        return score if self.cap is None else self.cap * torch.tanh(score / self.cap)


def other_keys(
    scores: Float[Tensor, "batch head query key"], p0: Int[Tensor, " batch"]
) -> Float[Tensor, "batch head query"]:
    """`Z_t`: the logsumexp of each query's scores at the keys other than P0."""
    at_p0 = (torch.arange(scores.shape[-1], device=scores.device) == p0[:, None])[:, None, None]
    return scores.masked_fill(at_p0, -torch.inf).logsumexp(-1)


def attention_from_score(
    score: Float[Tensor, "*slot batch head query"],
    others: Float[Tensor, "batch head query"],
    visible: Bool[Tensor, "batch head query"],
) -> Float[Tensor, "*slot batch head query"]:
    """`sigmoid(s_t - Z_t)`: the attention to P0 of the queries that see it, 0 for the others."""
    return torch.where(visible, torch.sigmoid(score - others), torch.zeros_like(score))


def attention_with_key(
    scores: Float[Tensor, "batch head query key"],
    key: Int[Tensor, " batch"],
    new: Float[Tensor, "*slot batch head query"],
    target: Int[Tensor, " batch"],
) -> Float[Tensor, "*slot batch head query"]:
    """The attention to a target where the scores at one key of each row are `new`, whatever key that is.

    With `Z` the logsumexp of a query's scores at the other keys it is `exp(s_target - logaddexp(Z, new))`.
    """
    at_target = attention_to(scores, target)
    same = (key == target)[:, None, None]
    seen = torch.where(same, new, at_target)
    attention = torch.exp(seen - torch.logaddexp(other_keys(scores, key), new))
    return torch.where(seen > MASKED, attention, torch.zeros_like(attention))


@dataclass(frozen=True)
class QueryScores:
    """What one layer's queries bring to any key of P0: step 2 of the method.

    Attributes:
        form: how query and key make a score.
        query: as it enters the scores.
        rest: what the scores at P0 have that no key decides (ALiBi); 0 elsewhere.
        others: `Z_t`.
        visible: the real queries that see P0.
        p0, mask: of the prompts.
        error: largest difference between the closed form's clean attention to P0 and the model's own.
    """

    form: ScoreForm
    query: Float[Tensor, "batch query head d_head"]
    rest: Float[Tensor, "batch head query"]
    others: Float[Tensor, "batch head query"]
    visible: Bool[Tensor, "batch head query"]
    p0: Int[Tensor, " batch"]
    mask: Bool[Tensor, "batch query"]
    error: float

    def sink_scores(self, keys: Float[Tensor, "slot batch kv_head d_head"]) -> Float[Tensor, "slot batch head"]:
        """The sink scores with each slot's keys at P0: step 3 of the method."""
        parts = []
        for some in keys.split(SLOTS_AT_ONCE):
            attention = attention_from_score(self.form.score(self.query, some) + self.rest, self.others, self.visible)
            slots = len(some)
            flat = mean_over_queries(attention.flatten(0, 1), self.p0.repeat(slots), repeated(self.mask, slots))
            parts.append(by_slot(flat, slots))
        return torch.cat(parts)


@torch.no_grad()
def query_side(
    model: HookedModel,
    prompts: PromptSet,
    read: Callable[[int, QueryScores], None] | None = None,
    hooks: Sequence[Hook] = (),
    layers: int | None = None,
) -> dict[int, QueryScores]:
    """Run the clean prompts once and keep each layer's queries and scores, or hand each to `read` and keep none.

    `hooks` read whatever else the caller wants of this run; `layers` is how many blocks it goes through, all if None.

    Raises:
        NotOfTheClosedForm: the model's attention is of another kind.
    """
    info = describe(model)
    device = device_of(model)
    p0, mask = prompts.p0.to(device), prompts.attention_mask.to(device)
    kept: dict[int, QueryScores] = {}
    seen: dict[str, Tensor] = {}

    def read_query(query: Tensor, hook: Any) -> None:
        seen["query"] = query

    def read_key(key: Tensor, hook: Any) -> None:
        seen["key"] = key[torch.arange(prompts.n, device=device), p0]

    def read_scores(scores: Tensor, hook: Any) -> None:
        seen["score"], seen["others"] = attention_to(scores, p0), other_keys(scores, p0)

    def read_pattern(pattern: Tensor, hook: Any, layer: int) -> None:
        form, score, own = ScoreForm.of(model, layer), seen["score"], attention_to(pattern, p0)
        visible = (score > MASKED) & mask[:, None]
        rest = (score - form.score(seen["query"], seen["key"])).masked_fill(~visible, 0.0)
        error = _form_error(info.positions == "alibi", score, rest, seen["others"], visible, own)
        if not error <= TOLERANCE:
            raise NotOfTheClosedForm(
                f"the attention of {info.name} is not of the closed form: in layer {layer} attention to P0 differs by "
                f"{error:.2g} on the clean run (tolerance {TOLERANCE:.0e}); use edges_into_keys(..., method='hooks')"
            )
        if info.positions != "alibi":
            rest = torch.zeros_like(rest)
        side = QueryScores(form, seen["query"], rest, seen["others"], visible, p0, mask, error)
        seen.clear()
        if read is None:
            kept[layer] = side
        else:
            read(layer, side)

    end = info.n_layers if layers is None else layers
    hooks = [*hooks]
    for layer in range(end):
        hooks += [(query_hook(model, layer), read_query), (key_hook(model, layer), read_key)]
        hooks.append((f"blocks.{layer}.attn.hook_attn_scores", read_scores))
        hooks.append((f"blocks.{layer}.attn.hook_pattern", functools.partial(read_pattern, layer=layer)))
    forward(model, prompts.ids, prompts.attention_mask, hooks=hooks, stop_at_layer=end)
    return kept


def _form_error(alibi: bool, score: Tensor, rest: Tensor, others: Tensor, visible: Tensor, own: Tensor) -> float:
    """How far the closed form is from the model's own attention to P0 on the clean run, as a largest difference.

    Two things are tested: that attention is `sigmoid(s - Z)`, and that what `s` has beyond `q . k` does not depend on
    the key: nothing at all, or under ALiBi a straight line in the query's position.
    """
    if alibi:
        inner = visible[..., 2:] & visible[..., :-2]
        rest = (rest[..., 2:] - 2 * rest[..., 1:-1] + rest[..., :-2]).masked_fill(~inner, 0.0)
        rest = torch.nn.functional.pad(rest, (1, 1))
    seen = own.masked_fill(~visible, 0.0)
    tested = (attention_from_score(tried, others, visible) for tried in (score, score - rest))
    return max(float((attention - seen).abs().max()) for attention in tested)


@torch.no_grad()
def key_edges(
    model: HookedModel,
    prompts: PromptSet,
    senders: Sequence[str | Node],
    values: Mapping[Node, Tensor],
    through: Through = "direct",
) -> KeyEdges:
    """The sink score of every head with each sender's new value in its key of P0, all other paths cut.

    A head is reached by the senders computed before its block reads the stream; for the others `patched` equals
    `clean`. `values` are the senders' new values at P0, as `pair.patch_values` gives them.

    Raises:
        InterventionError: as `sender_hooks`.
        NotOfTheClosedForm: `path_patching.edges_into_keys` then falls back on hooks.
    """
    chosen = nodes_of(senders, model)
    tokens = prompts.ids[torch.arange(prompts.n), prompts.p0].to(device_of(model))
    keys = p0_keys(model, tokens, chosen, values, through)
    scored: list[Tensor] = []
    errors: list[float] = []

    def score(layer: int, side: QueryScores) -> None:
        scored.append(side.sink_scores(keys[:, :, layer]))
        errors.append(side.error)

    query_side(model, prompts, score)
    scores = torch.stack(scored, dim=2)
    return KeyEdges(tuple(chosen), scores[0], scores[1:], "closed form", max(errors))
