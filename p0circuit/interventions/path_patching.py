"""Path patching: the effect of one edge, from a sender to the input of a receiver, with every other path cut.

After Wang et al. 2022 (arXiv 2211.00593). For a sender, a receiver and the sender's new value at one position:

1. *Send.* Run the clean prompts with the new value in the sender's place. What is computed between sender and receiver
   keeps its clean value (MLPs may be let through), so what changes at the receiver came along the edge.
2. *Hear.* Keep what the receiver makes of it: for K of a head its scores at that key with clean queries, for Q its
   scores of that query with clean keys, for V the change of the value vector; an MLP's output; the stream itself.
3. *Answer.* Run the clean prompts once more from the receiver's layer on, with nothing but this put in, and measure.

Steps 1 and 2 do all senders and a layer's receivers in one pass, and one more for Q (`side_by_side`); step 3 does many
edges in one batch.
Hearing at the scores and not at the keys makes K and V of a single query head possible where heads share a key/value
head (grouped-query attention): `attn.2.1.k` is one query head's, `attn.2.kv0.k` that of all heads of the group.

For the edges that end in K at P0, `edges_into_keys` needs none of these passes: see `closed_form`. Where the metric is
the sink score of the receiver's own heads, `own_scores` needs no step 3, at any position.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.batched_runs import Through, by_slot, check_value, measure_slots, repeated, sender_hooks
from p0circuit.interventions.closed_form import (
    KeyEdges,
    NotOfTheClosedForm,
    attention_with_key,
    key_edges,
    key_hook,
    query_hook,
)
from p0circuit.interventions.metrics import Complete, Metric, Rows, measure_rows, run_up_to
from p0circuit.interventions.nodes import InterventionError, Node, nodes_of
from p0circuit.log import progress_bar
from p0circuit.models import ModelInfo, describe, device_of, forward, resume
from p0circuit.models.hooks import Hook
from p0circuit.prompts import PromptSet
from p0circuit.sink import attention_to, mean_over_queries, sink_score
from p0circuit.stats import bootstrap

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["q", "k", "v", "mlp", "resid_pre", "resid_mid", "resid_post"]
TOKENS_AT_ONCE = 2**13
"""Tokens in a batch of side-by-side runs."""

# Heads of a block: one (`3`), some (`0+3`), a key/value group (`kv1`), or all of them (nothing).
_ATTENTION = re.compile(r"attn\.(\d+)(?:\.(kv)?(\d+(?:\+\d+)*))?\.([qkv])")
# Where in its block a receiver listens: before anything with this stage or a later one has been computed.
_STAGE: dict[Kind, int] = {"resid_pre": 0, "q": 1, "k": 1, "v": 1, "resid_mid": 2, "mlp": 3, "resid_post": 4}


@dataclass(frozen=True)
class Receiver:
    """An input an edge can end in: Q, K or V of a head or of a group of heads, an MLP's input, or the stream."""

    kind: Kind
    layer: int
    heads: tuple[int, ...]
    name: str

    @classmethod
    def parse(cls, name: str, info: ModelInfo) -> Receiver:
        """The receiver of a name.

        `attn.2.1.k` is one query head's K, `attn.2.kv0.k` that of all heads of a key/value group, `attn.2.0+3.k` that
        of heads 0 and 3 together and `attn.2.k` that of all heads of the block; likewise V and, but for key/value
        groups, Q. The others are named like nodes: `mlp.1`, `resid_pre.2`, `resid_mid.2`, `resid_post.3`.

        Raises:
            InterventionError: the name is of another form, or the model has no such layer or head.
        """
        if match := _ATTENTION.fullmatch(name):
            layer, grouped, indices, kind = int(match[1]), bool(match[2]), match[3], match[4]
            count = info.n_kv_heads if grouped else info.n_heads
            chosen = [*range(info.n_heads)] if indices is None else [int(index) for index in indices.split("+")]
            if grouped and kind == "q":
                raise InterventionError(f"{name}: queries belong to query heads; expected attn.LAYER.HEAD.q")
            if layer >= info.n_layers or max(chosen) >= count:
                what = "key/value heads" if grouped else "heads"
                raise InterventionError(
                    f"{name}: {info.name} has layers 0 to {info.n_layers - 1} and {what} 0 to {count - 1}"
                )
            if len({*chosen}) < len(chosen):
                raise InterventionError(f"{name} names a head twice; expected each once")
            group = info.n_heads // info.n_kv_heads
            if grouped:
                chosen = [head for index in chosen for head in range(index * group, (index + 1) * group)]
            return cls(kind, layer, tuple(chosen), name)  # pyright: ignore[reportArgumentType]
        with contextlib.suppress(InterventionError):
            node = Node.parse(name)
            if node.kind in ("mlp", "resid_pre", "resid_mid", "resid_post"):
                return cls(node.check(info).kind, node.layer, (), name)  # pyright: ignore[reportArgumentType]
        raise InterventionError(
            f"{name!r} names no receiver of {info.name}; expected attn.LAYER.HEAD.q (or k, v), attn.LAYER.kvHEAD.k (or "
            "v), attn.LAYER.HEAD+HEAD.k, attn.LAYER.k, mlp.LAYER, resid_pre.LAYER, resid_mid.LAYER or resid_post.LAYER"
        )

    def hears(self, sender: Node, info: ModelInfo) -> bool:
        """Whether the model computes the sender before this receiver reads the stream."""
        # Where attention and MLP read the same stream, an MLP hears nothing of its own block.
        stage = 1 if self.kind == "mlp" and info.parallel_blocks else _STAGE[self.kind]
        return sender.depth < (self.layer, stage)


def receivers_of(
    model: HookedModel, layers: Sequence[int] | None = None, kinds: Sequence[Kind] = ("q", "k", "v", "mlp")
) -> list[str]:
    """The names of all receivers of some kinds in some layers (all if not given), one for each query head."""
    info = describe(model)
    found = []
    for layer in range(info.n_layers) if layers is None else layers:
        parts = [kind for kind in kinds if kind in ("q", "k", "v")]
        found += [f"attn.{layer}.{head}.{part}" for head in range(info.n_heads) for part in parts]
        found += [f"{kind}.{layer}" for kind in kinds if kind not in parts]
    return found


@dataclass(frozen=True)
class PathEffects:
    """The metric with each edge patched, beside that of the clean run.

    Attributes:
        edges: (sender, receiver) names, in the order of the first axis of `patched`.
        clean: the metric of each row of the clean prompts.
        patched: the metric with one edge patched.
        metric: its name.
        through: what was let through between sender and receiver.
    """

    edges: tuple[tuple[str, str], ...]
    clean: Float[Tensor, " batch"]
    patched: Float[Tensor, "edge batch"]
    metric: str
    through: Through

    @property
    def effect(self) -> Float[Tensor, "edge batch"]:
        """The change of the metric: negative where the edge carries what the metric measures."""
        return self.patched - self.clean

    def to_dataframe(self) -> pd.DataFrame:
        """A row for each edge: sender, receiver, mean effect with its 95 % interval, and n; largest effects first."""
        import pandas as pd

        rows = []
        for (sender, receiver), values in zip(self.edges, self.effect, strict=True):
            interval = bootstrap(values.double().cpu().numpy())
            rows.append((sender, receiver, interval.value, interval.low, interval.high, interval.n))
        table = pd.DataFrame(rows, columns=["sender", "receiver", "effect", "low", "high", "n"])
        return table.sort_values("effect", key=lambda effect: -effect.abs(), kind="stable", ignore_index=True)


@torch.no_grad()
def path_patch(
    model: HookedModel,
    prompts: PromptSet,
    senders: Sequence[str | Node],
    receivers: Sequence[str],
    values: Mapping[Node, Tensor],
    metric: Metric,
    position: Int[Tensor, " batch"] | None = None,
    through: Literal["direct", "mlps"] = "direct",
) -> PathEffects:
    """Patch every edge from a sender to a receiver that is computed after it, one at a time.

    `values` are the senders' new values at `position` of each row (P0 if not given). An edge carries news of that
    position only: a K or V edge is heard by queries at and after it, a Q edge by the query at it. An edge into Q at P0
    has no effect, and is not run: P0's query sees P0 alone.

    Raises:
        InterventionError: a name the model does not have, a value that does not fit, no edge at all, a receiver that
            comes before every sender, a position outside the prompts, or `through` of another kind.
    """
    info = describe(model)
    if through not in ("direct", "mlps"):
        raise InterventionError(f"through={through!r}: between sender and receiver expected 'direct' or 'mlps'")
    chosen = nodes_of(senders, model)
    listening = [Receiver.parse(name, info) for name in receivers]
    for receiver in listening:
        if not any(receiver.hears(sender, info) for sender in chosen):
            raise InterventionError(f"{receiver.name} comes before every sender ({', '.join(map(str, chosen))})")
    for sender in chosen:
        check_value(sender, values, prompts.n, info)
    metric.check(model)
    rows = _rows(model, prompts, prompts.p0 if position is None else position)
    rows.at(0)  # refuses a position outside the prompts
    at_p0 = bool((rows.position.cpu() == prompts.p0).all())
    per_batch = max(1, TOKENS_AT_ONCE // rows.ids.numel())
    clean = measure_rows(model, rows, metric)
    edges: list[tuple[str, str]] = []
    patched: list[Tensor] = []
    for layer in progress_bar(sorted({receiver.layer for receiver in listening}), "path patching"):
        here = [receiver for receiver in listening if receiver.layer == layer]
        # P0's query sees P0 alone: whatever it is, its attention is the same.
        acting = [receiver for receiver in here if not (at_p0 and receiver.kind == "q")]
        below = run_up_to(model, rows, metric, layer) if acting else (None, {})
        for some in (chosen[start : start + per_batch] for start in range(0, len(chosen), per_batch)):
            pairs = [(s, r) for s in some for r in here if r.hears(s, info)]
            run = [(s, r) for s, r in pairs if r in acting]
            heard = _hear(model, rows, some, values, acting, through) if run else {}
            answered: dict[tuple[Node, Receiver], Tensor] = {}
            for first in range(0, len(run), per_batch):
                part = run[first : first + per_batch]
                news = [(receiver, heard[receiver.kind][some.index(sender)]) for sender, receiver in part]
                answers = measure_slots(model, rows, metric, below, layer, len(news), _tell(news, layer, rows))
                answered |= dict(zip(part, answers.split(prompts.n), strict=True))
            patched += [answered.get(pair, clean) for pair in pairs]
            edges += [(str(sender), receiver.name) for sender, receiver in pairs]
    return PathEffects(tuple(edges), clean, torch.stack(patched), metric.name, through)


@dataclass(frozen=True)
class OwnScores:
    """The sink score of every receiver's own heads with one edge patched, beside that of the clean run.

    Attributes:
        edges: (sender, receiver) names, in the order of the first axis of the others.
        clean, patched: the mean sink score of the receiver's heads.
    """

    edges: tuple[tuple[str, str], ...]
    clean: Float[Tensor, "edge batch"]
    patched: Float[Tensor, "edge batch"]

    @property
    def effect(self) -> Float[Tensor, "edge batch"]:
        """The change of the score: negative where the edge carries the sink."""
        return self.patched - self.clean


@torch.no_grad()
def own_scores(
    model: HookedModel,
    prompts: PromptSet,
    senders: Sequence[str | Node],
    receivers: Sequence[str],
    values: Mapping[Node, Tensor],
    position: Int[Tensor, " batch"] | None = None,
    through: Literal["direct", "mlps"] = "direct",
) -> OwnScores:
    """What edges into K and Q at any position do to the sink score of the receiver's own heads, without step 3.

    A new key changes each query's score at that key, a new query all scores of that query. The softmax over the changed
    scores is known from the clean ones, so no edge needs a run of its own. At P0 `edges_into_keys` is faster still.

    Raises:
        InterventionError: a receiver is neither K nor Q of heads, or as `path_patch`.
    """
    info = describe(model)
    chosen = nodes_of(senders, model)
    listening = [Receiver.parse(name, info) for name in receivers]
    for receiver in listening:
        if receiver.kind not in ("k", "q"):
            raise InterventionError(f"{receiver.name} does not enter its heads' own scores; expected K or Q of heads")
        if not any(receiver.hears(sender, info) for sender in chosen):
            raise InterventionError(f"{receiver.name} comes before every sender ({', '.join(map(str, chosen))})")
    for sender in chosen:
        check_value(sender, values, prompts.n, info)
    rows = _rows(model, prompts, prompts.p0 if position is None else position)
    rows.at(0)  # refuses a position outside the prompts
    p0, index = prompts.p0.to(rows.position.device), torch.arange(prompts.n, device=rows.position.device)
    clean: dict[int, Tensor] = {}

    def keep(scores: Tensor, hook: Any, layer: int) -> None:
        clean[layer] = scores.clone()

    layers = sorted({receiver.layer for receiver in listening})
    hooks = [(f"blocks.{layer}.attn.hook_attn_scores", functools.partial(keep, layer=layer)) for layer in layers]
    forward(model, rows.ids, rows.mask, hooks=hooks, stop_at_layer=max(layers) + 1)
    per_batch = max(1, TOKENS_AT_ONCE // rows.ids.numel())
    edges: list[tuple[str, str]] = []
    before: list[Tensor] = []
    patched: list[Tensor] = []
    for layer in layers:
        here = [receiver for receiver in listening if receiver.layer == layer]
        attention = attention_to(clean[layer].softmax(-1), p0)
        own = mean_over_queries(attention, p0, rows.mask)
        for some in (chosen[start : start + per_batch] for start in range(0, len(chosen), per_batch)):
            heard = _hear(model, rows, some, values, here, through)
            for number, sender in enumerate(some):
                for receiver in (receiver for receiver in here if receiver.hears(sender, info)):
                    new = heard[receiver.kind][number]
                    if receiver.kind == "k":
                        changed = attention_with_key(clean[layer], rows.position, new, p0)
                    else:
                        changed = attention.clone()
                        changed[index, :, rows.position] = attention_to(new.softmax(-1)[:, :, None], p0)[..., 0]
                    heads = list(receiver.heads)
                    patched.append(mean_over_queries(changed, p0, rows.mask)[:, heads].mean(1))
                    before.append(own[:, heads].mean(1))
                    edges.append((str(sender), receiver.name))
    return OwnScores(tuple(edges), torch.stack(before), torch.stack(patched))


def _rows(model: HookedModel, prompts: PromptSet, place: Int[Tensor, " batch"]) -> Rows:
    """Prompts and a position in each row, where the model is."""
    device = device_of(model)
    return Rows(*(part.to(device) for part in (prompts.ids, prompts.attention_mask, place)))


def _hear(
    model: HookedModel,
    rows: Rows,
    senders: Sequence[Node],
    values: Mapping[Node, Tensor],
    receivers: Sequence[Receiver],
    through: Through,
) -> dict[Kind, Float[Tensor, "sender batch *news"]]:
    """Steps 1 and 2 for all senders and the receivers of one layer: what each kind of receiver makes of each sender."""
    layer, slots = receivers[0].layer, 1 + len(senders)
    ids, mask, place = (repeated(part, slots) for part in rows)
    index = torch.arange(len(ids), device=ids.device)
    wanted: set[Kind] = {receiver.kind for receiver in receivers}
    heard: dict[Kind, Tensor] = {}

    def restore(activation: Tensor, hook: Any) -> Tensor:
        return repeated(by_slot(activation, slots)[0], slots)

    def keep(activation: Tensor, hook: Any, kind: Kind, kinds: set[Kind]) -> None:
        if kind == "k":
            news = activation[index, :, :, place]
        elif kind == "q":
            news = activation[index, :, place]
        else:
            news = activation[index, place]
        # A value is heard as its change, everything else as what takes the clean one's place.
        by_sender = by_slot(news, slots)
        heard[kind] = by_sender[1:] - by_sender[0] if kind == "v" else by_sender[1:].clone()
        if heard.keys() >= kinds:
            raise Complete

    scores = f"blocks.{layer}.attn.hook_attn_scores"
    places: dict[Kind, str] = {
        "resid_pre": Node("resid_pre", layer).hook,
        "v": f"blocks.{layer}.attn.hook_v",
        "k": scores,
        "q": scores,
        "resid_mid": Node("resid_mid", layer).hook,
        "mlp": Node("mlp", layer).hook,
        "resid_post": Node("resid_post", layer).hook,
    }
    # Q and K are each heard against the clean other, and so in passes of their own. What the restored one changes goes
    # no further than the attention's output, which is cut: all else is heard beside K.
    for kinds, restored in ((wanted - {"q"}, query_hook(model, layer)), (wanted & {"q"}, key_hook(model, layer))):
        if not kinds:
            continue
        hooks: list[Hook] = [(restored, restore)] if kinds & {"q", "k"} else []
        # Before the cut at the same hook: an MLP as receiver is heard before it is set back.
        hooks += [(places[kind], functools.partial(keep, kind=kind, kinds=kinds)) for kind in kinds]
        hooks += sender_hooks(model, senders, values, rows.position, through, layer + 1)
        with contextlib.suppress(Complete):
            forward(model, ids, mask, hooks=hooks, stop_at_layer=layer + 1)
    return heard


def _tell(news: Sequence[tuple[Receiver, Tensor]], layer: int, rows: Rows) -> list[Hook]:
    """Step 3: the hooks that put what each receiver of a layer heard into its own slot of a side-by-side run."""
    batch, place = len(rows.ids), rows.position
    index = torch.arange(batch, device=place.device)
    told: dict[Kind, list[tuple[slice, tuple[int, ...], Tensor]]] = {}
    for slot, (receiver, heard) in enumerate(news):
        mine = slice(slot * batch, (slot + 1) * batch)
        told.setdefault(receiver.kind, []).append((mine, receiver.heads, heard))

    def put_scores(scores: Tensor, hook: Any) -> Tensor:
        changed = scores.clone()
        for mine, heads, heard in told.get("k", []):
            for head in heads:
                changed[mine][index, head, :, place] = heard[:, head]
        for mine, heads, heard in told.get("q", []):
            for head in heads:
                changed[mine][index, head, place] = heard[:, head]
        return changed

    attention: list[Tensor] = []

    def note_attention(pattern: Tensor, hook: Any) -> None:
        attention.append(pattern[torch.arange(len(pattern), device=place.device), :, :, place.repeat(len(news))])

    def add_values(z: Tensor, hook: Any) -> Tensor:
        changed = z.clone()
        for mine, heads, heard in told["v"]:
            group = z.shape[2] // heard.shape[1]
            for head in heads:
                changed[mine][:, :, head] += attention[0][mine][:, head, :, None] * heard[:, None, head // group]
        return changed

    def put(activation: Tensor, hook: Any, kind: Kind) -> Tensor:
        changed = activation.clone()
        for mine, _, heard in told[kind]:
            changed[mine][index, place] = heard
        return changed

    hooks: list[Hook] = []
    if told.keys() & {"k", "q"}:
        hooks.append((f"blocks.{layer}.attn.hook_attn_scores", put_scores))
    if "v" in told:
        hooks.append((f"blocks.{layer}.attn.hook_pattern", note_attention))
        hooks.append((f"blocks.{layer}.attn.hook_z", add_values))
    for kind in told:
        if kind not in ("q", "k", "v"):
            hooks.append((Node(kind, layer).hook, functools.partial(put, kind=kind)))
    return hooks


@torch.no_grad()
def edges_into_keys(
    model: HookedModel,
    prompts: PromptSet,
    senders: Sequence[str | Node],
    values: Mapping[Node, Tensor],
    through: Literal["direct", "mlps"] = "direct",
    method: Literal["auto", "closed form", "hooks"] = "auto",
) -> KeyEdges:
    """The effect of each sender at P0 on every head's own sink score, through the head's key of P0.

    The closed form is used where it is exact, hooks otherwise; `KeyEdges.method` says which.

    Raises:
        InterventionError: as `key_edges`; with method "closed form" also where that is not exact.
    """
    if method not in ("auto", "closed form", "hooks"):
        raise InterventionError(f"method={method!r} is unknown; expected 'auto', 'closed form' or 'hooks'")
    if method == "closed form":
        return key_edges(model, prompts, senders, values, through)
    if method == "auto":
        with contextlib.suppress(NotOfTheClosedForm):
            return key_edges(model, prompts, senders, values, through)
    return _key_edges_by_hooks(model, prompts, nodes_of(senders, model), values, through)


def _key_edges_by_hooks(
    model: HookedModel, prompts: PromptSet, senders: Sequence[Node], values: Mapping[Node, Tensor], through: Through
) -> KeyEdges:
    """`key_edges` step by step: every layer hears every sender, and answers with its own sink scores."""
    info = describe(model)
    rows = _rows(model, prompts, prompts.p0)
    per_batch = max(1, TOKENS_AT_ONCE // rows.ids.numel())
    scores = []
    for layer in range(info.n_layers):
        every = Receiver("k", layer, tuple(range(info.n_heads)), f"attn.{layer}.k")
        stream = forward(model, rows.ids, rows.mask, stop_at_layer=layer)
        parts = [_own_scores(model, rows, stream, layer, [])]
        for start in range(0, len(senders), per_batch):
            heard = _hear(model, rows, senders[start : start + per_batch], values, [every], through)["k"]
            parts.append(_own_scores(model, rows, stream, layer, [(every, news) for news in heard]))
        scores.append(by_slot(torch.cat(parts), 1 + len(senders)))
    stacked = torch.stack(scores, dim=2)
    return KeyEdges(tuple(senders), stacked[0], stacked[1:], "hooks", 0.0)


def _own_scores(
    model: HookedModel, rows: Rows, stream: Tensor, layer: int, news: Sequence[tuple[Receiver, Tensor]]
) -> Float[Tensor, "slot_rows head"]:
    """A layer's sink scores when it starts from `stream`, with each receiver's news in a slot of its own."""
    slots = max(1, len(news))
    _, mask, place = (repeated(part, slots) for part in rows)
    found: list[Tensor] = []

    def read(pattern: Tensor, hook: Any) -> None:
        found.append(sink_score(pattern, place, mask))

    hooks = [*_tell(news, layer, rows), (f"blocks.{layer}.attn.hook_pattern", read)]
    resume(model, repeated(stream, slots), layer, mask, hooks=hooks, stop_at_layer=layer + 1)
    return found[0]
