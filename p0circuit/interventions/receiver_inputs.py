"""What receivers read at one position, and runs in which chosen inputs of receivers are set.

1. *Read.* P0 attends to itself alone, so a row of one token gives every key, value and MLP output at P0, for all
   senders at once and with all other paths cut (`read_at_p0`).
2. *Set.* An `InputPatch` sets Q, K or V of some heads of a block, or the output of its MLP, at one position of each
   row. A variant of the run holds any number of them, in one block or in many: an edge that ends in K of all sink heads
   at once is such a variant. Where a variant patches several blocks, the queries of the later ones are those of the
   patched run, as in path patching with a set of receivers (Wang et al. 2022).
3. *Measure.* Variants run next to each other in one batch, from the first block that any of them patches
   (`measure_inputs`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.batched_runs import by_slot, measure_slots, repeated, sender_hooks
from p0circuit.interventions.closed_form import ROWS_AT_ONCE, ScoreForm, key_hook, query_hook
from p0circuit.interventions.metrics import Complete, Metric, Rows, reading_hooks
from p0circuit.interventions.nodes import Node
from p0circuit.models import describe, forward, resume
from p0circuit.models.hooks import Hook

Input = Literal["q", "k", "v", "mlp"]
TOKENS_AT_ONCE = 2**13
"""Tokens in a batch of variants."""


@dataclass(frozen=True, eq=False)
class InputsAtP0:
    """What every receiver reads at P0: slot 0 in the clean run, slot 1 + i with the new value of sender i.

    `value` is what heads read, `mlp` what the MLP makes of its input; both along the direct path from the sender.
    """

    key: Float[Tensor, "slot batch layer kv_head d_head"]
    value: Float[Tensor, "slot batch layer kv_head d_head"]
    mlp: Float[Tensor, "slot batch layer d_model"]
    stream: Float[Tensor, "batch layer d_model"]
    """The clean residual stream before each block."""


@torch.no_grad()
def read_at_p0(
    model: HookedModel,
    tokens: Int[Tensor, " batch"],
    senders: Sequence[Node],
    values: Mapping[Node, Tensor],
    layers: int,
) -> InputsAtP0:
    """Keys, values and MLP outputs at P0 in the blocks below `layers`, with each sender's new value in turn."""
    per_pass = max(1, ROWS_AT_ONCE // len(tokens) - 1)
    parts: list[dict[str, Tensor]] = []
    for start in range(0, max(1, len(senders)), per_pass):
        some = senders[start : start + per_pass]
        slots = 1 + len(some)
        read: dict[tuple[str, int], Tensor] = {}

        def note(activation: Tensor, hook: Any, name: str, layer: int, read: Any = read, slots: int = slots) -> None:
            by_sender = by_slot(activation[:, 0], slots)
            read[name, layer] = (by_sender[0] if name == "stream" else by_sender).clone()

        hooks: list[Hook] = []
        for layer in range(layers):
            places = {
                "stream": Node("resid_pre", layer).hook,
                "key": key_hook(model, layer),
                "value": f"blocks.{layer}.attn.hook_v",
                "mlp": Node("mlp", layer).hook,
            }
            hooks += [(hook, functools.partial(note, name=name, layer=layer)) for name, hook in places.items()]
        # After the hooks that read: an MLP as receiver is read before it is set back to its clean output.
        hooks += sender_hooks(model, some, values, torch.zeros_like(tokens), "direct", layers)
        forward(model, repeated(tokens, slots)[:, None], hooks=hooks, stop_at_layer=layers)
        names = ("stream", "key", "value", "mlp")
        stacked = {
            name: torch.stack([read[name, layer] for layer in range(layers)], dim=1 if name == "stream" else 2)
            for name in names
        }
        if start:
            stacked |= {name: stacked[name][1:] for name in ("key", "value", "mlp")}
        parts.append(stacked)
    joined = {name: torch.cat([part[name] for part in parts]) for name in ("key", "value", "mlp")}
    return InputsAtP0(**joined, stream=parts[0]["stream"])


@dataclass(frozen=True, eq=False)
class InputPatch:
    """New inputs of some heads of a block (or its MLP's new output) at one position of each row.

    `new` is the query by head, the key by key/value head, or the MLP's output; for V it is the *change* of the value.
    `heads` is empty for an MLP.
    """

    kind: Input
    layer: int
    heads: tuple[int, ...]
    new: Float[Tensor, "batch *input"]


Variant = Sequence[InputPatch]
"""What is patched together in one run."""
Below = tuple[Tensor | None, dict[int, Tensor]]
"""The stream before a block, and what a metric has read below it; no stream where that is all it reads."""


@torch.no_grad()
def measure_inputs(
    model: HookedModel,
    rows: Rows,
    metric: Metric,
    variants: Sequence[Variant],
    streams: Mapping[int, Below] | None = None,
) -> Float[Tensor, "variant batch"]:
    """The metric of each row with each variant's patches at the rows' place, every variant in a run of its own.

    `streams` are those of `clean_streams` at (at least) the first block of every variant, if the caller has them.
    """
    per_batch = max(1, TOKENS_AT_ONCE // rows.ids.numel())
    starts = [min(patch.layer for patch in variant) for variant in variants]
    if streams is None:
        streams = dict(clean_streams(model, rows, metric, starts))
    measured: dict[int, Tensor] = {}
    for layer in sorted({*starts}):
        below = streams[layer]
        here = [number for number, start in enumerate(starts) if start == layer]
        for first in range(0, len(here), per_batch):
            some = here[first : first + per_batch]
            hooks = input_hooks(model, rows, [variants[number] for number in some])
            values = measure_slots(model, rows, metric, below, layer, len(some), hooks)
            measured |= dict(zip(some, values.split(len(rows.ids)), strict=True))
    return torch.stack([measured[number] for number in range(len(variants))])


def clean_streams(model: HookedModel, rows: Rows, metric: Metric, layers: Iterable[int]) -> Iterator[tuple[int, Below]]:
    """Walk up the clean run once: at each of these layers, the stream before it and what the metric has read below."""
    readings: dict[int, Tensor] = {}
    stream: Tensor | None = None
    reached: int | None = None
    for layer in sorted(set(layers)):
        if reached is None or stream is not None:
            hooks = reading_hooks(metric, rows, readings)
            try:
                if reached is None:
                    stream = forward(model, rows.ids, rows.mask, hooks=hooks, stop_at_layer=layer)
                elif layer > reached and stream is not None:
                    stream = resume(model, stream, reached, rows.mask, hooks=hooks, stop_at_layer=layer)
            except Complete:
                stream = None
            reached = layer
        yield layer, (stream, dict(readings))


def input_hooks(model: HookedModel, rows: Rows, variants: Sequence[Variant]) -> list[Hook]:
    """The hooks that put each variant's patches into its own copy of the rows, copy after copy in one batch."""
    info, batch, place = describe(model), len(rows.ids), rows.position
    index = torch.arange(batch, device=place.device)
    by_place: dict[tuple[int, str], list[tuple[slice, InputPatch]]] = {}
    for number, variant in enumerate(variants):
        mine = slice(number * batch, (number + 1) * batch)
        for patch in variant:
            by_place.setdefault((patch.layer, patch.kind), []).append((mine, patch))

    def put_output(activation: Tensor, hook: Any, patches: Sequence[tuple[slice, InputPatch]]) -> Tensor:
        changed = activation.clone()
        for mine, patch in patches:
            changed[mine][index, place] = patch.new.to(changed)
        return changed

    def put_scores(scores: Tensor, hook: Any, layer: int, run: dict[str, Tensor]) -> Tensor:
        form, changed = ScoreForm.of(model, layer), scores.clone()
        for mine, patch in by_place.get((layer, "k"), ()):
            query, heads = run["query"][mine], list(patch.heads)
            old = run["key"][mine][index, place]
            # What else a score holds (ALiBi, a mask) does not depend on the key and stays.
            change = form.score(query, patch.new.to(old)) - form.score(query, old)
            for head in heads:
                changed[mine][index, head, :, place] += change[:, head]
        for mine, patch in by_place.get((layer, "q"), ()):
            query, keys = run["query"][mine][index, place], run["key"][mine]
            keys = keys.repeat_interleave(query.shape[1] // keys.shape[2], dim=2)
            new, old = (
                form.capped(form.scale * torch.einsum("bhd,bkhd->bhk", one.to(keys), keys))
                for one in (patch.new, query)
            )
            for head in patch.heads:
                changed[mine][index, head, place] += (new - old)[:, head]
        return changed

    def note(activation: Tensor, hook: Any, name: str, run: dict[str, Tensor]) -> None:
        run[name] = activation

    def add_values(z: Tensor, hook: Any, layer: int, run: dict[str, Tensor]) -> Tensor:
        changed, pattern = z.clone(), run["pattern"]
        for mine, patch in by_place[layer, "v"]:
            group = info.n_heads // patch.new.shape[1]
            for head in patch.heads:
                weight = pattern[mine][index, head, :, place]
                changed[mine][:, :, head] += weight[:, :, None] * patch.new[:, None, head // group].to(z)
        return changed

    hooks: list[Hook] = []
    for layer in sorted({layer for layer, _ in by_place}):
        run: dict[str, Tensor] = {}
        kinds = {kind for at, kind in by_place if at == layer}
        if kinds & {"q", "k"}:
            hooks.append((query_hook(model, layer), functools.partial(note, name="query", run=run)))
            hooks.append((key_hook(model, layer), functools.partial(note, name="key", run=run)))
            scores = f"blocks.{layer}.attn.hook_attn_scores"
            hooks.append((scores, functools.partial(put_scores, layer=layer, run=run)))
        if "v" in kinds:
            hooks.append((f"blocks.{layer}.attn.hook_pattern", functools.partial(note, name="pattern", run=run)))
            hooks.append((f"blocks.{layer}.attn.hook_z", functools.partial(add_values, layer=layer, run=run)))
        if "mlp" in kinds:
            put = functools.partial(put_output, patches=by_place[layer, "mlp"])
            hooks.append((Node("mlp", layer).hook, put))
    return hooks
