"""What is left of the sink when P0's stream or its attention output is replaced, block by block.

All curves compare the clean run with the shifted one, in which the same token is not first.

1. *Stream.* After block b, P0's stream is that of the shifted run at the same depth; later blocks run as they are.
2. *Mixed attention.* In a set of blocks, P0's attention output is that of the shifted run, which is mixed from values of
   several positions. In all other blocks P0 attends to itself alone, as the causal mask makes it. A block with P0's own
   output is one in which P0 is *recognised*.
   - mixed from block b on: recognition in the blocks before b only (a prefix);
   - mixed up to block b: recognition after it only (a suffix);
   - mixed in block b only, and in all blocks but b.

Cost. One clean pass gives the streams before all blocks, and every run starts at the first block that it changes. Runs
that are mixed up to block b start from the one that is mixed up to b - 1. Each of the curves over L blocks takes
(L + 1) / 2 passes over its rows in place of L.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.nodes import Node
from p0circuit.interventions.pairs import PromptPair, values_at
from p0circuit.log import track
from p0circuit.models import Hook, describe, device_of, forward, resume
from p0circuit.prompts import PromptSet
from p0circuit.recording.batch_size import batch_size_for
from p0circuit.sink import CONTROL, attention_to, mean_over_queries

Excess = Float[Tensor, "sample layer head"]
"""Excess scores: the attention that every head gives to P0 minus what it gives to position 8."""


@dataclass(frozen=True)
class ShiftedValues:
    """What P0's token has when it is not first, in every block.

    Attributes:
        attention: its attention output in every block.
        stream: its stream after every block.
    """

    attention: Float[Tensor, "sample layer d_model"]
    stream: Float[Tensor, "sample layer d_model"]


def shifted_values(model: HookedModel, pair: PromptPair) -> ShiftedValues:
    """Read the shifted run at the position of P0's token: one pass."""
    layers = range(describe(model).n_layers)
    nodes = [Node(kind, layer) for kind in ("attn", "resid_post") for layer in layers]
    values = values_at(model, pair.shifted, nodes, pair.position)
    attention, stream = (torch.stack([values[Node(kind, layer)] for layer in layers], 1) for kind in ("attn", "resid_post"))
    return ShiftedValues(attention, stream)


@dataclass(frozen=True)
class Curves:
    """Excess scores of every head in the clean run and in every changed one; see the module's text.

    Attributes:
        clean: of the clean run.
        stream: with P0's stream replaced after block b.
        mixed_from: mixed from block b on, so that recognition is left in blocks 0 to b - 1.
        mixed_up_to: mixed in blocks 0 to b, so that recognition is left after it.
        mixed_in: mixed in block b only.
        mixed_but_in: mixed in all blocks but b.
    """

    clean: Excess
    stream: Float[Tensor, "block sample layer head"]
    mixed_from: Float[Tensor, "block sample layer head"]
    mixed_up_to: Float[Tensor, "block sample layer head"]
    mixed_in: Float[Tensor, "block sample layer head"]
    mixed_but_in: Float[Tensor, "block sample layer head"]


CURVES = ("stream", "mixed_from", "mixed_up_to", "mixed_in", "mixed_but_in")


def passes_of_curves(n_layers: int, curves: Sequence[str] = CURVES) -> float:
    """Passes over the rows that `measure_curves` takes, the clean and the shifted run included."""
    triangle = (n_layers + 1) / 2
    # The stream after the last block is read by no head, and a chain runs every block once more for its next start.
    cost = {"stream": (n_layers - 1) / 2, "mixed_up_to": triangle + 1 - 1 / n_layers, "mixed_but_in": triangle}
    return 2 + sum(cost.get(name, triangle) for name in curves)


@torch.no_grad()
def measure_curves(model: HookedModel, pair: PromptPair, curves: Sequence[str] = CURVES) -> Curves:
    """Measure the excess scores of all heads in every run of the curves.

    Args:
        model: a hooked model whose attention output can be replaced.
        pair: the clean and the shifted run.
        curves: those to measure; the others are empty.

    Returns:
        The curves, on the processor.
    """
    values = shifted_values(model, pair)
    runs: dict[str, list[list[Tensor]]] = {name: [] for name in ("clean", *CURVES)}
    for rows in track(list(_batches(model, pair.clean)), "depth"):
        for name, excess in _curves_of_rows(model, pair.clean, values, rows, curves).items():
            runs[name].append(excess)
    whole = {name: _joined(parts) for name, parts in runs.items()}
    return Curves(whole["clean"][0], **{name: whole[name] for name in CURVES})


def _curves_of_rows(
    model: HookedModel, prompts: PromptSet, values: ShiftedValues, rows: slice, curves: Sequence[str]
) -> dict[str, list[Tensor]]:
    """All runs of some rows: for every curve a list over blocks."""
    n_layers, batch = describe(model).n_layers, _Rows.of(model, prompts, rows)
    streams, clean = batch.clean(model)
    attention, shifted = (part[rows].to(device_of(model)) for part in (values.attention, values.stream))

    def mixing(blocks: Sequence[int]) -> list[Hook]:
        return [put_at_p0(f"blocks.{block}.hook_attn_out", attention[:, block], batch.p0) for block in blocks]

    run = partial(batch.run, model, clean)
    runs: dict[str, list[Tensor]] = {"clean": [clean.cpu()], **{name: [] for name in CURVES}}
    mixed = streams[0]
    for block in range(n_layers):
        later = range(block + 1, n_layers)
        if "stream" in curves:
            replaced = batch.with_p0(streams[block + 1], shifted[:, block])
            runs["stream"].append(run(replaced, block + 1))
        if "mixed_from" in curves:
            runs["mixed_from"].append(run(streams[block], block, mixing(range(block, n_layers))))
        if "mixed_in" in curves:
            runs["mixed_in"].append(run(streams[block], block, mixing([block])))
        if "mixed_but_in" in curves:
            runs["mixed_but_in"].append(run(mixed, block, mixing(later)))
        if "mixed_up_to" in curves or "mixed_but_in" in curves:
            start, mixed = mixed, batch.step(model, mixed, block, mixing([block]))
            del start
        if "mixed_up_to" in curves:
            runs["mixed_up_to"].append(run(mixed, block + 1))
    return runs


def put_at_p0(
    name: str, value: Float[Tensor, "batch d_model"], p0: Int[Tensor, " batch"]
) -> tuple[str, Callable[..., Tensor]]:
    """A hook that gives P0 a value of its own at a hook point."""

    def put(activation: Tensor, hook: object) -> Tensor:
        new = activation.clone()
        new[torch.arange(len(new), device=new.device), p0.to(new.device)] = value.to(new)
        return new

    return name, put


@dataclass(frozen=True)
class _Rows:
    """A batch of rows, and runs of it that start at any block."""

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    p0: Int[Tensor, " batch"]

    @classmethod
    def of(cls, model: HookedModel, prompts: PromptSet, rows: slice) -> _Rows:
        return cls(*(part[rows].to(device_of(model)) for part in (prompts.ids, prompts.attention_mask, prompts.p0)))

    def clean(self, model: HookedModel) -> tuple[list[Float[Tensor, "batch pos d_model"]], Excess]:
        """The streams before every block and after the last, and the excess scores."""
        n_layers = describe(model).n_layers
        streams: dict[str, Tensor] = {}
        names = [f"blocks.{layer}.hook_resid_pre" for layer in range(n_layers)]
        names.append(f"blocks.{n_layers - 1}.hook_resid_post")

        def keep(activation: Tensor, hook: object, name: str) -> None:
            streams[name] = activation.clone()

        scores: dict[int, Tensor] = {}
        hooks = [(name, partial(keep, name=name)) for name in names]
        forward(model, self.ids, self.mask, hooks=[*hooks, *self.score_hooks(0, n_layers, scores)], stop_at_layer=n_layers)
        return [streams[name] for name in names], torch.stack([scores[layer] for layer in range(n_layers)], 1)

    def run(
        self, model: HookedModel, clean: Excess, stream: Float[Tensor, "batch pos d_model"], start: int, hooks: Sequence[Hook] = ()
    ) -> Excess:
        """Excess scores of a run that goes on from a stream before block `start`; those before it are the clean ones."""
        n_layers = clean.shape[1]
        scores = {layer: clean[:, layer] for layer in range(n_layers)}
        if start < n_layers:
            readers = self.score_hooks(start, n_layers, scores)
            resume(model, stream, start, self.mask, hooks=[*hooks, *readers], stop_at_layer=n_layers)
        return torch.stack([scores[layer] for layer in range(n_layers)], 1).cpu()

    def step(
        self, model: HookedModel, stream: Float[Tensor, "batch pos d_model"], block: int, hooks: Sequence[Hook]
    ) -> Float[Tensor, "batch pos d_model"]:
        """The stream after one block."""
        return resume(model, stream, block, self.mask, hooks=hooks, stop_at_layer=block + 1)

    def with_p0(
        self, stream: Float[Tensor, "batch pos d_model"], value: Float[Tensor, "batch d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """The stream with another vector at P0."""
        return put_at_p0("", value, self.p0)[1](stream, None)

    def score_hooks(self, start: int, stop: int, scores: dict[int, Tensor]) -> list[Hook]:
        """Hooks that put the excess scores of the heads of some layers into `scores`."""

        def read(pattern: Tensor, hook: object, layer: int) -> None:
            positions = (self.p0, self.p0 + CONTROL)
            at_p0, at_control = (
                mean_over_queries(attention_to(pattern, position).float(), position, self.mask) for position in positions
            )
            scores[layer] = at_p0 - at_control

        return [(f"blocks.{layer}.attn.hook_pattern", partial(read, layer=layer)) for layer in range(start, stop)]


def _batches(model: HookedModel, prompts: PromptSet) -> Iterator[slice]:
    size = batch_size_for(model, prompts.length, with_logits=False)
    return (slice(start, start + size) for start in range(0, prompts.n, size))


def _joined(parts: Sequence[Sequence[Tensor]]) -> Tensor:
    """Runs of batches as one tensor [run, sample, layer, head]."""
    return torch.stack([torch.cat(runs) for runs in zip(*parts, strict=True)]) if parts and parts[0] else torch.empty(0)


def left_by_block(
    changed: Float[Tensor, "block sample layer head"], clean: Excess, heads: Sequence[tuple[int, int]], above: Mapping[int, bool] | bool = True
) -> dict[int, tuple[Float[Tensor, " sample"], Float[Tensor, " sample"]]]:
    """For every block the mean excess of the heads above it in the changed and in the clean run; none where there is no head.

    Args:
        changed: a curve.
        clean: the clean run.
        heads: those whose sink is studied.
        above: whether the heads in and below a block are left out, as they do not read what was changed there.
    """
    sums = {}
    for block in range(len(changed)):
        chosen = [head for head in heads if head[0] > block] if above else list(heads)
        if chosen:
            layers, numbers = map(list, zip(*chosen, strict=True))
            sums[block] = changed[block][:, layers, numbers].mean(1), clean[:, layers, numbers].mean(1)
    return sums
