"""Edges into K at P0, exactly and without a forward pass for each: the fast form of path patching.

1. P0 attends to itself alone, so its residual stream depends on its token only: a row of one token computes it. All
   senders at P0 are patched in one batch of such rows, and every layer's key of P0 is read from it.
2. One ordinary forward pass over the clean prompts gives, layer by layer, the queries and the scores. Let `s_t` be the
   score of query t at P0, and `Z_t` the log-partition of the other keys: the logsumexp of the query's scores at them.
   Its attention to P0 is `sigmoid(s_t - Z_t)`.
3. A new key of P0 changes `s_t` alone: `s_t' = s_t + scale * q_t . (k' - k)`, or `cap * tanh(scale * q_t . k' / cap)`
   with a soft cap. `sigmoid(s_t' - Z_t)` is then the patched attention, exact up to rounding.

Position enters only through the queries and through terms that do not depend on the key (ALiBi), so learned, rotary,
ALiBi and no positions are all exact. So are grouped-query attention, qk-norm (the key is read after it) and windows
(a masked key stays masked). Whether a model's attention has this form is measured on the clean run: `KeyEdges.error` is
the largest difference from the model's own attention to P0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from p0circuit.errors import P0Error
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.batched_runs import Through, by_variant, repeated, sender_hooks
from p0circuit.interventions.effects import Effects, largest_first
from p0circuit.interventions.nodes import Node, nodes_of
from p0circuit.models import describe, device_of, forward
from p0circuit.models.hooks import Hook
from p0circuit.prompts import PromptSet
from p0circuit.sink import attention_to, mean_over_queries

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

ROWS_AT_ONCE = 2048
"""Number of one-token rows in a batch: enough for full matrix products, few megabytes of activations."""
MASKED = -1e30
"""Scores below this are those of masked keys, on any backend."""
KEYS_AT_ONCE = 64
"""Number of patched keys that are scored at a time, so that many senders take time but no memory."""
TOLERANCE = 1e-4
"""Largest difference of the clean attention from the closed form; rounding leaves 1e-6 in float32."""


class NotOfTheClosedForm(P0Error):
    """A model's attention to P0 is not `sigmoid(s_t - Z_t)` of query and key, so the closed form would be wrong."""


@dataclass(frozen=True, eq=False)
class KeyEdges(Effects):
    """The effect of every sender at P0 on every head's own sink score, through the head's key of P0.

    Attributes:
        senders: the senders, in the order of the first axis of `patched`.
        clean: sink scores of the clean run.
        patched: sink scores with the key of P0 that results from the new value of a sender.
        method: "closed form", or "hooks" where that is not exact.
        error: largest difference between the closed form's clean attention to P0 and the model's own; 0 for hooks.
        shifted: sink scores of the run that the values come from; None if they were not measured.
    """

    senders: tuple[Node, ...]
    clean: Float[Tensor, "sample layer head"]
    patched: Float[Tensor, "sender sample layer head"]
    method: Literal["closed form", "hooks"]
    error: float
    shifted: Float[Tensor, "sample layer head"] | None = None

    metric = "sink score of the receiving head"

    @property
    def effect(self) -> Float[Tensor, "sender sample layer head"]:
        """Change of each head's sink score: negative if the edge carries the sink."""
        return self.patched - self.clean

    @property
    def total_effect(self) -> Float[Tensor, "sample layer head"] | None:
        """Sink scores of the shifted run minus those of the clean one; None if they were not measured."""
        return None if self.shifted is None else self.shifted - self.clean

    @property
    def edges(self) -> tuple[tuple[str, str], ...]:
        """The edges from each sender to the keys of the heads that come after it."""
        return tuple((str(self.senders[sender]), f"attn.{layer}.{head}.k") for sender, layer, head in self._edges())

    def to_dataframe(self, relative: bool = False) -> pd.DataFrame:
        """Tabulate the effects, one line for each edge, the largest first.

        Args:
            relative: whether to give shares of the difference of the head's score between the two runs.

        Returns:
            Data frame with the columns sender, receiver, effect, low, high and n.

        Raises:
            InterventionError: as `relative_effect`, for shares.
        """
        import pandas as pd

        table = pd.DataFrame(list(self.edges), columns=["sender", "receiver"])
        return largest_first(self._add_intervals(table, relative))

    def plot(self, relative: bool = False) -> Figure:
        """Draw a map of the mean effects: senders by heads.

        Args:
            relative: whether to draw relative effects.

        Returns:
            A figure in which a dot marks effects whose 95 % interval contains 0.

        Raises:
            InterventionError: as `relative_effect`, for shares.
        """
        import numpy as np
        import pandas as pd

        from p0circuit.figures.maps import edge_map

        layers, heads = self.clean.shape[1:]
        shape = (len(self.senders), layers * heads)
        means, uncertain = np.full(shape, np.nan), np.zeros(shape, dtype=bool)
        for (sender, layer, head), interval in zip(self._edges(), self.interval(relative), strict=True):
            means[sender, layer * heads + head] = interval.value
            uncertain[sender, layer * heads + head] = interval.low <= 0 <= interval.high
        columns = pd.MultiIndex.from_product([range(layers), range(heads)], names=["layer", "head"])
        title = f"Edges into the keys of P0, by {self.method}, n = {len(self.clean)} (dot: 95 % interval contains 0)"
        return edge_map(
            pd.DataFrame(means, [str(sender) for sender in self.senders], columns),
            title,
            self.value_label(relative),
            uncertain,
        )

    def _edges(self) -> list[tuple[int, int, int]]:
        layers, heads = self.clean.shape[1:]
        return [
            (number, layer, head)
            for number, sender in enumerate(self.senders)
            for layer in range(layers)
            for head in range(heads)
            if sender.depth < (layer, 1)
        ]

    def _samples(self, relative: bool) -> tuple[Tensor, Tensor | None]:
        sender, layer, head = zip(*self._edges(), strict=True) if self._edges() else ((), (), ())
        total = self._total()[:, list(layer), list(head)].T if relative else None
        return self.effect[list(sender), :, list(layer), list(head)], total


@torch.no_grad()
def p0_keys(
    model: HookedModel,
    tokens: Int[Tensor, " batch"],
    senders: Sequence[Node],
    values: Mapping[Node, Tensor],
    through: Through = "direct",
    layers: int | None = None,
) -> Float[Tensor, "variant batch layer kv_head d_head"]:
    """Compute P0's keys, as they enter the scores, in rows of one token.

    Args:
        model: a hooked model.
        tokens: the tokens at P0.
        senders: the senders.
        values: new values of the senders at P0.
        through: what may carry the effect of a sender.
        layers: number of blocks; all if None.

    Returns:
        Keys: variant 0 is clean, variant 1 + i has the new value of sender i.

    Raises:
        InterventionError: as `sender_hooks`.
    """
    info = describe(model)
    layers = info.n_layers if layers is None else layers
    per_pass = max(1, ROWS_AT_ONCE // len(tokens) - 1)
    parts: list[Tensor] = []
    for start in range(0, max(1, len(senders)), per_pass):
        batch = senders[start : start + per_pass]
        variants = 1 + len(batch)
        keys: dict[int, Tensor] = {}

        def read(
            key: Tensor, hook: object, layer: int, keys: dict[int, Tensor] = keys, variants: int = variants
        ) -> None:
            keys[layer] = by_variant(key[:, 0], variants).clone()

        hooks = sender_hooks(model, batch, values, torch.zeros_like(tokens), through, layers)
        hooks += [(key_hook(model, layer), functools.partial(read, layer=layer)) for layer in range(layers)]
        forward(model, repeated(tokens, variants)[:, None], hooks=hooks, stop_at_layer=layers)
        stacked = torch.stack([keys[layer] for layer in range(layers)], dim=2)
        parts.append(stacked if start == 0 else stacked[1:])
    return torch.cat(parts)


def query_hook(model: HookedModel, layer: int) -> str:
    """Name the hook at which queries are as they enter the scores: after rotation, for rotary positions.

    Args:
        model: a hooked model.
        layer: the block.
    """
    return f"blocks.{layer}.attn.hook_{'rot_' if describe(model).positions == 'rotary' else ''}q"


def key_hook(model: HookedModel, layer: int) -> str:
    """Name the hook at which keys are as they enter the scores: after rotation, for rotary positions.

    Args:
        model: a hooked model.
        layer: the block.
    """
    return f"blocks.{layer}.attn.hook_{'rot_' if describe(model).positions == 'rotary' else ''}k"


@dataclass(frozen=True)
class ScoreForm:
    """How a layer computes a score from a query and a key: `scale * q . k`, with a soft cap if it has one.

    Attributes:
        scale: factor of the dot product.
        cap: the soft cap; None if there is none.
    """

    scale: float
    cap: float | None

    @classmethod
    def of(cls, model: HookedModel, layer: int) -> ScoreForm:
        """Read the form from a model; `query_side` verifies it on the clean run.

        Args:
            model: a hooked model.
            layer: the block.
        """
        attention = model.blocks[layer].attn
        if describe(model).backend == "hooked":
            cap = model.cfg.attn_scores_soft_cap
            return cls(1 / attention.attn_scale, cap if cap > 0 else None)
        own = attention.original_component
        fallback = getattr(own, "inv_norm_factor", describe(model).d_head ** -0.5)
        return cls(getattr(own, "scaling", fallback), getattr(own, "attn_logit_softcapping", None))

    def score(
        self, query: Float[Tensor, "batch query head d_head"], key: Float[Tensor, "*variant batch kv_head d_head"]
    ) -> Float[Tensor, "*variant batch head query"]:
        """Compute the scores of all queries at one key per prompt, without what does not depend on the key.

        Args:
            query: queries.
            key: one key per prompt, or per variant and prompt.
        """
        key = key.repeat_interleave(query.shape[2] // key.shape[-2], dim=-2)
        return self.capped(self.scale * torch.einsum("bqhd,...bhd->...bhq", query, key))

    def capped(self, score: Tensor) -> Tensor:
        """Apply the soft cap, if there is one.

        Args:
            score: scaled dot products.
        """
        return score if self.cap is None else self.cap * torch.tanh(score / self.cap)


def log_partition(
    scores: Float[Tensor, "batch head query key"], p0: Int[Tensor, " batch"]
) -> Float[Tensor, "batch head query"]:
    """Compute `Z_t`, the log-partition of the other keys: the logsumexp of each query's scores at keys other than P0.

    Args:
        scores: scores before the softmax.
        p0: position of P0 in each prompt.
    """
    at_p0 = (torch.arange(scores.shape[-1], device=scores.device) == p0[:, None])[:, None, None]
    return scores.masked_fill(at_p0, -torch.inf).logsumexp(-1)


def attention_from_score(
    score: Float[Tensor, "*variant batch head query"],
    log_partition: Float[Tensor, "batch head query"],
    visible: Bool[Tensor, "batch head query"],
) -> Float[Tensor, "*variant batch head query"]:
    """Compute the attention to P0, `sigmoid(s_t - Z_t)`.

    Args:
        score: scores at P0, `s_t`.
        log_partition: `Z_t`, of the other keys.
        visible: whether each query sees P0; the attention of the others is 0.
    """
    return torch.where(visible, torch.sigmoid(score - log_partition), torch.zeros_like(score))


def attention_with_key(
    scores: Float[Tensor, "batch head query key"],
    key: Int[Tensor, " batch"],
    new: Float[Tensor, "*variant batch head query"],
    target: Int[Tensor, " batch"],
) -> Float[Tensor, "*variant batch head query"]:
    """Compute the attention to a target with new scores at one key of each prompt, whichever key that is.

    With `Z` the log-partition of the keys other than the changed one, it is `exp(s_target - logaddexp(Z, new))`.

    Args:
        scores: clean scores before the softmax.
        key: position of the changed key in each prompt.
        new: new scores of all queries at that key.
        target: position whose attention is computed, in each prompt.
    """
    at_target = attention_to(scores, target)
    same = (key == target)[:, None, None]
    seen = torch.where(same, new, at_target)
    attention = torch.exp(seen - torch.logaddexp(log_partition(scores, key), new))
    return torch.where(seen > MASKED, attention, torch.zeros_like(attention))


@dataclass(frozen=True, eq=False)
class QueryScores:
    """What one layer's queries need to be scored against any key of P0: step 2 of the method.

    Attributes:
        form: how query and key make a score.
        query: queries as they enter the scores.
        key_free_score: the part of the scores at P0 that does not depend on the key (ALiBi); 0 for other positions.
        log_partition: `Z_t`, of the keys other than P0.
        visible: whether each query is of a real token and sees P0.
        p0: position of P0 in each prompt.
        mask: whether each token is real.
        error: largest difference between the closed form's clean attention to P0 and the model's own.
    """

    form: ScoreForm
    query: Float[Tensor, "batch query head d_head"]
    key_free_score: Float[Tensor, "batch head query"]
    log_partition: Float[Tensor, "batch head query"]
    visible: Bool[Tensor, "batch head query"]
    p0: Int[Tensor, " batch"]
    mask: Bool[Tensor, "batch query"]
    error: float

    def attention(
        self, keys: Float[Tensor, "variant batch kv_head d_head"]
    ) -> Float[Tensor, "variant batch head query"]:
        """Compute the attention to P0 of every query with new keys at P0.

        Args:
            keys: new keys.
        """
        score = self.form.score(self.query, keys) + self.key_free_score
        return attention_from_score(score, self.log_partition, self.visible)

    def sink_scores(self, keys: Float[Tensor, "variant batch kv_head d_head"]) -> Float[Tensor, "variant batch head"]:
        """Compute the sink scores with new keys at P0: step 3 of the method.

        Args:
            keys: new keys.
        """
        parts = []
        for part in keys.split(KEYS_AT_ONCE):
            attention = self.attention(part)
            flat = mean_over_queries(attention.flatten(0, 1), self.p0.repeat(len(part)), repeated(self.mask, len(part)))
            parts.append(by_variant(flat, len(part)))
        return torch.cat(parts)


@torch.no_grad()
def query_side(
    model: HookedModel,
    prompts: PromptSet,
    read: Callable[[int, QueryScores], None] | None = None,
    hooks: Sequence[Hook] = (),
    layers: int | None = None,
) -> dict[int, QueryScores]:
    """Run the clean prompts once and take each layer's queries and scores.

    Args:
        model: a hooked model.
        prompts: the clean prompts.
        read: function of a layer and its queries and scores, called during the run; they are then not returned, so that
            only one layer's are in memory.
        hooks: hooks that read anything else in this run.
        layers: number of blocks to run; all if None.

    Returns:
        Queries and scores by layer; empty with `read`.

    Raises:
        NotOfTheClosedForm: the model's attention is of another kind.
    """
    info = describe(model)
    device = device_of(model)
    p0, mask = prompts.p0.to(device), prompts.attention_mask.to(device)
    by_layer: dict[int, QueryScores] = {}
    seen: dict[str, Tensor] = {}

    def read_query(query: Tensor, hook: object) -> None:
        seen["query"] = query

    def read_key(key: Tensor, hook: object) -> None:
        seen["key"] = key[torch.arange(prompts.n, device=device), p0]

    def read_scores(scores: Tensor, hook: object) -> None:
        seen["score"], seen["log_partition"] = attention_to(scores, p0), log_partition(scores, p0)

    def read_pattern(pattern: Tensor, hook: object, layer: int) -> None:
        form, score, own = ScoreForm.of(model, layer), seen["score"], attention_to(pattern, p0)
        visible = (score > MASKED) & mask[:, None]
        key_free = (score - form.score(seen["query"], seen["key"])).masked_fill(~visible, 0.0)
        error = _form_error(info.positions == "alibi", score, key_free, seen["log_partition"], visible, own)
        if not error <= TOLERANCE:
            raise NotOfTheClosedForm(
                f"the attention of {info.name} is not of the closed form: in layer {layer} attention to P0 differs by "
                f"{error:.2g} on the clean run (tolerance {TOLERANCE:.0e}); use edges_into_keys(..., method='hooks')"
            )
        if info.positions != "alibi":
            key_free = torch.zeros_like(key_free)
        side = QueryScores(form, seen["query"], key_free, seen["log_partition"], visible, p0, mask, error)
        seen.clear()
        if read is None:
            by_layer[layer] = side
        else:
            read(layer, side)

    end = info.n_layers if layers is None else layers
    hooks = [*hooks]
    for layer in range(end):
        hooks += [(query_hook(model, layer), read_query), (key_hook(model, layer), read_key)]
        hooks.append((f"blocks.{layer}.attn.hook_attn_scores", read_scores))
        hooks.append((f"blocks.{layer}.attn.hook_pattern", functools.partial(read_pattern, layer=layer)))
    forward(model, prompts.ids, prompts.attention_mask, hooks=hooks, stop_at_layer=end)
    return by_layer


def _form_error(
    alibi: bool, score: Tensor, key_free: Tensor, log_partition: Tensor, visible: Tensor, own: Tensor
) -> float:
    """Largest difference between the closed form and the model's own attention to P0 on the clean run.

    Two things are tested: that attention is `sigmoid(s - Z)`, and that what `s` contains besides `q . k` does not
    depend on the key: it is 0 or, with ALiBi, linear in the query's position.
    """
    if alibi:
        inner = visible[..., 2:] & visible[..., :-2]
        key_free = (key_free[..., 2:] - 2 * key_free[..., 1:-1] + key_free[..., :-2]).masked_fill(~inner, 0.0)
        key_free = torch.nn.functional.pad(key_free, (1, 1))
    seen = own.masked_fill(~visible, 0.0)
    tested = (attention_from_score(tried, log_partition, visible) for tried in (score, score - key_free))
    return max(float((attention - seen).abs().max()) for attention in tested)


@torch.no_grad()
def key_edges(
    model: HookedModel,
    prompts: PromptSet,
    senders: Sequence[str | Node],
    values: Mapping[Node, Tensor],
    through: Through = "direct",
    layers: int | None = None,
) -> KeyEdges:
    """Compute the sink score of every head with each sender's new value in its key of P0, all other paths cut.

    A head receives from the senders that are computed before its block reads the stream; for the others `patched`
    equals `clean`.

    Args:
        model: a hooked model.
        prompts: the clean prompts.
        senders: the senders.
        values: new values of the senders at P0, as `pairs.patch_values` returns them.
        through: what may carry the effect from sender to receiver.
        layers: number of blocks whose heads are scored; all if None.

    Returns:
        The effects, with their error on the clean run.

    Raises:
        InterventionError: as `sender_hooks`.
        NotOfTheClosedForm: the model's attention is of another kind; `own_scores.edges_into_keys` then uses hooks.
    """
    nodes = nodes_of(senders, model)
    tokens = prompts.ids[torch.arange(prompts.n), prompts.p0].to(device_of(model))
    keys = p0_keys(model, tokens, nodes, values, through, layers)
    scored: list[Tensor] = []
    errors: list[float] = []

    def score(layer: int, side: QueryScores) -> None:
        scored.append(side.sink_scores(keys[:, :, layer]))
        errors.append(side.error)

    query_side(model, prompts, score, layers=layers)
    scores = torch.stack(scored, dim=2)
    return KeyEdges(tuple(nodes), scores[0], scores[1:], "closed form", max(errors))
