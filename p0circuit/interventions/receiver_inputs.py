"""What receivers read at one position, and runs in which given inputs of receivers are set.

1. *Read.* P0 attends to itself alone, so a row of one token gives every key, value and MLP output at P0, for all
   senders at once and with all other paths cut (`read_at_p0`).
2. *Set.* An `InputPatch` sets Q, K or V of some heads of a block, or the output of its MLP, at one position of each
   row. A variant of the run holds any number of them, in one block or in many: an edge that ends in K of all sink heads
   at once is such a variant. Where a variant patches several blocks, the queries of the later ones are those of the
   patched run, as in path patching with a set of receivers (Wang et al. 2022).
3. *Measure.* Variants run in one batch, from the first block that any of them patches (`measure_inputs`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.batched_runs import TOKENS_AT_ONCE, by_variant, measure_variants, repeated, sender_hooks
from p0circuit.interventions.closed_form import ROWS_AT_ONCE, ScoreForm, key_hook, query_hook
from p0circuit.interventions.metrics import Complete, Metric, Rows, reading_hooks
from p0circuit.interventions.nodes import Node
from p0circuit.models import describe, forward, resume
from p0circuit.models.hooks import Hook

Input = Literal["q", "k", "v", "mlp"]
"""Kinds of inputs that can be set."""


@dataclass(frozen=True, eq=False)
class InputsAtP0:
    """What every receiver is given at P0: variant 0 in the clean run, variant 1 + i with the new value of sender i.

    Attributes:
        key: keys, as they enter the scores.
        value: values.
        mlp: outputs of MLPs.
        stream: the clean residual stream before each block.
    """

    key: Float[Tensor, "variant batch layer kv_head d_head"]
    value: Float[Tensor, "variant batch layer kv_head d_head"]
    mlp: Float[Tensor, "variant batch layer d_model"]
    stream: Float[Tensor, "batch layer d_model"]


@torch.no_grad()
def read_at_p0(
    model: HookedModel,
    tokens: Int[Tensor, " batch"],
    senders: Sequence[Node],
    values: Mapping[Node, Tensor],
    layers: int,
) -> InputsAtP0:
    """Compute keys, values and MLP outputs at P0 with each sender's new value in turn, all other paths cut.

    Args:
        model: a hooked model.
        tokens: the tokens at P0.
        senders: the senders.
        values: new values of the senders at P0.
        layers: number of blocks.

    Raises:
        InterventionError: as `sender_hooks`.
    """
    per_pass = max(1, ROWS_AT_ONCE // len(tokens) - 1)
    parts: list[dict[str, Tensor]] = []
    for start in range(0, max(1, len(senders)), per_pass):
        batch = senders[start : start + per_pass]
        variants = 1 + len(batch)
        read: dict[tuple[str, int], Tensor] = {}

        def note(
            activation: Tensor,
            hook: object,
            name: str,
            layer: int,
            read: dict[tuple[str, int], Tensor] = read,
            variants: int = variants,
        ) -> None:
            by_sender = by_variant(activation[:, 0], variants)
            read[name, layer] = (by_sender[0] if name == "stream" else by_sender).clone()

        hooks: list[Hook] = []
        for layer in range(layers):
            hook_of = {
                "stream": Node("resid_pre", layer).hook,
                "key": key_hook(model, layer),
                "value": f"blocks.{layer}.attn.hook_v",
                "mlp": Node("mlp", layer).hook,
            }
            hooks += [(hook, functools.partial(note, name=name, layer=layer)) for name, hook in hook_of.items()]
        # After the hooks that read: an MLP as receiver is read before it is set back to its clean output.
        hooks += sender_hooks(model, batch, values, torch.zeros_like(tokens), "direct", layers)
        forward(model, repeated(tokens, variants)[:, None], hooks=hooks, stop_at_layer=layers)
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

    Attributes:
        kind: kind of the input.
        layer: the block.
        heads: query heads whose input is set; empty for an MLP.
        new: the query by head, the key by key/value head, the *change* of the value by key/value head, or the output of
            the MLP.
    """

    kind: Input
    layer: int
    heads: tuple[int, ...]
    new: Float[Tensor, "batch *input"]


Variant = Sequence[InputPatch]
"""What is patched together in one run."""
Below = tuple[Tensor | None, dict[int, Tensor]]
"""The stream before a block (None if the metric reads nothing from there on), and what a metric has read before it."""


@torch.no_grad()
def measure_inputs(
    model: HookedModel,
    rows: Rows,
    metric: Metric,
    variants: Sequence[Variant],
    streams: Mapping[int, Below] | None = None,
) -> Float[Tensor, "variant batch"]:
    """Measure each row with each variant's patches at the position of the rows.

    Args:
        model: a hooked model.
        rows: the prompts, with the position that is patched.
        metric: the metric.
        variants: patches by variant; every variant is a run of its own.
        streams: those of `clean_streams`, at least at the first block of every variant; computed if None.
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
            batch = here[first : first + per_batch]
            hooks = input_hooks(model, rows, [variants[number] for number in batch])
            values = measure_variants(model, rows, metric, below, layer, len(batch), hooks)
            measured |= dict(zip(batch, values.split(len(rows.ids)), strict=True))
    return torch.stack([measured[number] for number in range(len(variants))])


def clean_streams(model: HookedModel, rows: Rows, metric: Metric, layers: Iterable[int]) -> Iterator[tuple[int, Below]]:
    """Run the clean prompts once, block by block.

    Args:
        model: a hooked model.
        rows: the clean prompts.
        metric: the metric.
        layers: blocks before which the run stops.

    Yields:
        For each of the layers, in order: the stream before it, and what the metric has read before it.
    """
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
    """Make hooks that put each variant's patches into its own copy of the rows.

    Args:
        model: a hooked model.
        rows: the prompts of one variant, with the position that is patched.
        variants: patches by variant.
    """
    info, batch, position = describe(model), len(rows.ids), rows.position
    index = torch.arange(batch, device=position.device)
    by_input: dict[tuple[int, str], list[tuple[slice, InputPatch]]] = {}
    for number, variant in enumerate(variants):
        part = slice(number * batch, (number + 1) * batch)
        for patch in variant:
            by_input.setdefault((patch.layer, patch.kind), []).append((part, patch))

    def put_output(activation: Tensor, hook: object, patches: Sequence[tuple[slice, InputPatch]]) -> Tensor:
        patched = activation.clone()
        for part, patch in patches:
            patched[part][index, position] = patch.new.to(patched)
        return patched

    def put_scores(scores: Tensor, hook: object, layer: int, run: dict[str, Tensor]) -> Tensor:
        form, patched = ScoreForm.of(model, layer), scores.clone()
        for part, patch in by_input.get((layer, "k"), ()):
            query, heads = run["query"][part], list(patch.heads)
            old = run["key"][part][index, position]
            # What else a score holds (ALiBi, a mask) does not depend on the key and stays.
            change = form.score(query, patch.new.to(old)) - form.score(query, old)
            for head in heads:
                patched[part][index, head, :, position] += change[:, head]
        for part, patch in by_input.get((layer, "q"), ()):
            query, keys = run["query"][part][index, position], run["key"][part]
            keys = keys.repeat_interleave(query.shape[1] // keys.shape[2], dim=2)
            new, old = (
                form.capped(form.scale * torch.einsum("bhd,bkhd->bhk", one.to(keys), keys))
                for one in (patch.new, query)
            )
            for head in patch.heads:
                patched[part][index, head, position] += (new - old)[:, head]
        return patched

    def note(activation: Tensor, hook: object, name: str, run: dict[str, Tensor]) -> None:
        run[name] = activation

    def add_values(z: Tensor, hook: object, layer: int, run: dict[str, Tensor]) -> Tensor:
        patched, pattern = z.clone(), run["pattern"]
        for part, patch in by_input[layer, "v"]:
            group = info.n_heads // patch.new.shape[1]
            for head in patch.heads:
                weight = pattern[part][index, head, :, position]
                patched[part][:, :, head] += weight[:, :, None] * patch.new[:, None, head // group].to(z)
        return patched

    hooks: list[Hook] = []
    for layer in sorted({layer for layer, _ in by_input}):
        run: dict[str, Tensor] = {}
        kinds = {kind for at, kind in by_input if at == layer}
        if kinds & {"q", "k"}:
            hooks.append((query_hook(model, layer), functools.partial(note, name="query", run=run)))
            hooks.append((key_hook(model, layer), functools.partial(note, name="key", run=run)))
            scores = f"blocks.{layer}.attn.hook_attn_scores"
            hooks.append((scores, functools.partial(put_scores, layer=layer, run=run)))
        if "v" in kinds:
            hooks.append((f"blocks.{layer}.attn.hook_pattern", functools.partial(note, name="pattern", run=run)))
            hooks.append((f"blocks.{layer}.attn.hook_z", functools.partial(add_values, layer=layer, run=run)))
        if "mlp" in kinds:
            put = functools.partial(put_output, patches=by_input[layer, "mlp"])
            hooks.append((Node("mlp", layer).hook, put))
    return hooks
