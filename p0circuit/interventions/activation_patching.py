"""Activation patching: put the output of a node in one run into another run, and measure the change of a metric.

The two runs are those of a `PromptPair`. *Noising* puts values of the shifted run into the clean one, at P0: does the
sink disappear (is the node necessary)? *Denoising* puts values of the clean run into the shifted one, at the position
of the same token: does a sink appear there (is the node sufficient)? A grid has one `Patch` for each cell:

1. Run the base run (the one that is patched) block by block. Only the residual stream before the current block and
   what the metric has read so far are in memory.
2. Before each block, make a batch of copies of the stream, one for each patch of this block. Each copy takes its own
   patch and runs on until the last reading of the metric. What the metric reads in earlier blocks is that of the base
   run.
3. A patch after the attention of its block does not need a copy in this block, where it changes its own position only.
   The rest of the block is computed for that one token, for all such patches together. The result is a patch of the
   stream before the next block.
4. A prompt keeps its base value, bit for bit, if a patch equals what it replaces or acts after all readings of the
   metric. Batches of another shape may round differently, and a patch that changes nothing must have no effect.

A pass is thus as short as patch and metric allow. At P0 it cannot be made narrower: nothing comes before P0, but every
later position attends to it. (What stays within P0's own stream needs rows of one token only: `closed_form`.)

Source: Meng et al. 2022 (arXiv 2202.05262); names and pitfalls, Zhang and Nanda 2024 (arXiv 2309.16042).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.batched_runs import by_variant, measure_variants, repeated
from p0circuit.interventions.effects import NodeEffects
from p0circuit.interventions.metrics import Complete, Metric, Rows, batches, measure, read_logits, reading_hooks
from p0circuit.interventions.nodes import COMPONENTS, InterventionError, Kind, Node, has_node, nodes_of, nodes_of_kinds
from p0circuit.interventions.pairs import PromptPair, values_at
from p0circuit.models import describe, forward, resume
from p0circuit.models.hooks import Hook
from p0circuit.prompts import PromptSet
from p0circuit.recording.batch_size import batch_size_for

Direction = Literal["noising", "denoising"]
NodeGroup = Literal["heads", "components", "neurons"]
_KINDS: dict[NodeGroup, tuple[Kind, ...]] = {"heads": ("head",), "components": COMPONENTS, "neurons": ("neuron",)}

# What a block computes before it mixes positions; of what comes later a patch changes one position only.
_BEFORE_MIXING = {
    "hook_resid_pre",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_rot_q",
    "attn.hook_rot_k",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
}
# Up to this size of a pass (numbers held at once, 8 MB in float32) more patches cost no memory to speak of.
_SMALL = 2_000_000


@dataclass(frozen=True, eq=False)
class Patch:
    """One cell of a grid: a value to put in the place of the output of a node.

    Attributes:
        node: the node.
        value: the new output, one per prompt; with several offsets, it has an axis for them after the batch.
        offset: where the patch acts, in tokens after P0 (after the same token, in the shifted run); at several offsets
            at once if it is a tuple.
    """

    node: Node
    value: Float[Tensor, "batch *offset_and_value"]
    offset: int | tuple[int, ...] = 0

    def index(self, rows: Rows, variant: int = 0) -> tuple[Any, ...]:
        """Index the outputs that this patch replaces, in an activation of several variants of the same prompts.

        Args:
            rows: the prompts of one variant.
            variant: number of the variant that the patch acts on.
        """
        numbers, positions = rows.at(self.offset)
        return (numbers + variant * len(rows.ids), positions, *([] if self.node.index is None else [self.node.index]))


Patches = Mapping[int, Patch]
"""Patches by their number in the grid."""


@dataclass(frozen=True, eq=False)
class PatchGrid(NodeEffects):
    """The metric with single patches, and that of both runs.

    Attributes:
        metric: name of the metric.
        direction: which run was patched: the clean one (noising) or the shifted one (denoising).
        nodes: the patched node of each patch.
        offsets: position of each patch, in tokens after P0 (after the same token, in the shifted run).
        patched: metric with one patch.
        base: metric of the run that is patched.
        source: metric of the run that the values come from.
    """

    metric: str
    direction: Direction
    nodes: tuple[Node, ...]
    offsets: tuple[int | tuple[int, ...], ...]
    patched: Float[Tensor, "patch sample"]
    base: Float[Tensor, " sample"]
    source: Float[Tensor, " sample"]

    @property
    def clean(self) -> Float[Tensor, " sample"]:
        """Metric of the clean run."""
        return self.base if self.direction == "noising" else self.source

    @property
    def shifted(self) -> Float[Tensor, " sample"]:
        """Metric of the shifted run."""
        return self.source if self.direction == "noising" else self.base

    @property
    def effect(self) -> Float[Tensor, "patch sample"]:
        """Change of the metric by each patch: `patched - base`."""
        return self.patched - self.base

    @property
    def total_effect(self) -> Float[Tensor, " sample"]:
        """Difference between the two runs, `source - base`: the effect of replacing everything."""
        return self.source - self.base

    @property
    def title(self) -> str:
        """Title of the figure."""
        what = (
            "shifted values into the clean run" if self.direction == "noising" else "clean values into the shifted run"
        )
        return f"{self.direction.capitalize()}: {what}"

    @property
    def position_name(self) -> str:
        """Name of offset 0."""
        return "P0" if self.direction == "noising" else "P0's token"


@torch.no_grad()
def patch(
    model: HookedModel,
    pair: PromptPair,
    metric: Metric,
    nodes: NodeGroup | Sequence[str | Node] = "heads",
    direction: Direction = "noising",
    layers: Sequence[int] | None = None,
    offsets: Sequence[int] = (0,),
    patches_per_batch: int | None = None,
) -> PatchGrid:
    """Patch nodes one at a time, each with its output at the same token of the other run.

    Args:
        model: a hooked model.
        pair: clean and shifted prompts.
        metric: the metric.
        nodes: names or nodes; or "heads", "components" (embedding, attention and MLP outputs, and the residual stream)
            or "neurons" for all of a kind.
        direction: "noising" puts shifted values into the clean run, "denoising" clean values into the shifted run.
        layers: blocks whose nodes are patched, for all nodes of a kind; every block if None.
        offsets: positions to patch, in tokens after P0. Offset 0 is P0; another one is a control, because its token is
            first in neither run.
        patches_per_batch: number of patches that run in one batch. If None, as many as take the memory of one forward
            pass over the same prompts.

    Returns:
        Effects of the patches [patch, sample]: for each offset, all nodes.

    Raises:
        InterventionError: a node, layer, position or direction that does not exist, prompts that do not pair up, no
            node, or a metric that is not one finite number per prompt.
        ModelError: the model is in training mode, cannot read the prompts, or lacks a hook.

    Example:
        grid = p0circuit.patch(model, pair, metric, nodes="heads")
        grid.relative_effect.mean(1)  # share of the difference between the runs, by head
        grid.plot()
    """
    return patch_grid(
        model,
        pair,
        pair_patches(model, pair, _nodes(model, nodes, layers), direction, offsets),
        metric,
        direction,
        patches_per_batch,
    )


@torch.no_grad()
def patch_grid(
    model: HookedModel,
    pair: PromptPair,
    patches: Sequence[Patch],
    metric: Metric,
    direction: Direction = "noising",
    patches_per_batch: int | None = None,
) -> PatchGrid:
    """Apply patches with any values, one at a time, to the clean run (noising) or the shifted run (denoising).

    Args:
        model: a hooked model.
        pair: clean and shifted prompts. Any two sets of prompts make a pair: `PromptPair(a, b, 0)`.
        patches: the patches, such as those of `pair_patches`, or with values of `pairs.patch_values` for ablation.
        metric: the metric.
        direction: which run is patched.
        patches_per_batch: number of patches that run in one batch. If None, as many as take the memory of one forward
            pass over the same prompts, logits included.

    Returns:
        Effects of the patches [patch, sample], in their order.

    Raises:
        InterventionError: a node, position or direction that does not exist, values of another shape or not finite,
            prompts that do not pair up, no patch, or a metric that is not one finite number per row.
        ModelError: the model is in training mode, cannot read the prompts, or lacks a hook.
    """
    base, position, source, source_position = _runs(pair, direction)
    _check(model, base, patches, metric, patches_per_batch)
    measured, start = [], 0
    for rows in batches(model, base, position):
        part = slice(start, start := start + len(rows.ids))
        here = {
            number: Patch(patch.node, patch.value[part].to(rows.ids.device), patch.offset)
            for number, patch in enumerate(patches)
        }
        measured.append(
            _measure_patches(model, rows, here, metric, patches_per_batch or _patches_that_fit(model, rows))
        )
    base_values, patched = (torch.cat(parts, -1).cpu() for parts in zip(*measured, strict=True))
    return PatchGrid(
        metric=metric.name,
        direction=direction,
        nodes=tuple(patch.node for patch in patches),
        offsets=tuple(patch.offset for patch in patches),
        patched=patched,
        base=base_values,
        source=measure(model, source, metric, source_position),
    )


def pair_patches(
    model: HookedModel,
    pair: PromptPair,
    nodes: Sequence[str | Node],
    direction: Direction = "noising",
    offsets: Sequence[int] = (0,),
) -> list[Patch]:
    """Make a patch for each node and offset, with the output of the node at the same token of the other run.

    Args:
        model: a hooked model.
        pair: clean and shifted prompts.
        nodes: names or nodes.
        direction: which run is patched; values come from the other one.
        offsets: positions, in tokens after P0.

    Raises:
        InterventionError: a node, position or direction that does not exist.
    """
    *_, source, position = _runs(pair, direction)
    checked = nodes_of(nodes, model)
    patches = []
    for offset in offsets:
        batch_rows = torch.arange(source.n).split(batch_size_for(model, source.length, with_logits=True))
        parts = [values_at(model, source.subset(rows), checked, position[rows] + offset) for rows in batch_rows]
        patches += [Patch(node, torch.cat([part[node] for part in parts]), offset) for node in checked]
    return patches


def _nodes(
    model: HookedModel, nodes: NodeGroup | Sequence[str | Node], layers: Sequence[int] | None
) -> Sequence[str | Node]:
    if not isinstance(nodes, str):
        if layers is not None:
            raise InterventionError("layers belong to all nodes of a kind, such as nodes='heads'; these have names")
        return nodes
    if nodes not in _KINDS:
        raise InterventionError(
            f"nodes={nodes!r}: expected 'heads', 'components', 'neurons' or a list of names, such as ['mlp.1']"
        )
    return nodes_of_kinds(model, _KINDS[nodes], layers)


def _runs(pair: PromptPair, direction: Direction) -> tuple[PromptSet, Tensor, PromptSet, Tensor]:
    """The prompts that are patched and the position in them, then those that the values come from."""
    if direction not in get_args(Direction):
        raise InterventionError(f"unknown direction {direction!r}; expected 'noising' or 'denoising'")
    if pair.clean.n != pair.shifted.n:
        raise InterventionError(
            f"{pair.clean.n} clean and {pair.shifted.n} shifted rows do not pair up; expected as many of each"
        )
    clean, shifted = (pair.clean, pair.clean.p0), (pair.shifted, pair.position)
    return (*clean, *shifted) if direction == "noising" else (*shifted, *clean)


def _check(
    model: HookedModel, base: PromptSet, patches: Sequence[Patch], metric: Metric, patches_per_batch: int | None
) -> None:
    info = describe(model)
    metric.check(model)
    if not patches:
        raise InterventionError("there is nothing to patch; expected at least one patch")
    if patches_per_batch is not None and patches_per_batch < 1:
        raise InterventionError(f"patches_per_batch={patches_per_batch}: expected at least 1")
    for patch in patches:
        node = patch.node.check(info)
        width = {"head": (info.d_head,), "neuron": ()}.get(node.kind, (info.d_model,))
        expected = (base.n, *torch.tensor(patch.offset).shape, *width)
        if tuple(patch.value.shape) != expected:
            raise InterventionError(f"the value for {node} is {list(patch.value.shape)}; expected {list(expected)}")
        if not bool(torch.isfinite(patch.value).all()):
            raise InterventionError(f"the value for {node} is not finite everywhere: check the run it was recorded in")


def _measure_patches(
    model: HookedModel, rows: Rows, patches: Patches, metric: Metric, at_once: int
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "patch batch"]]:
    """Steps 1 to 4 for one batch of rows: the metric of the base run, and with each patch."""
    readings, moved, values = {}, {}, {}
    stream = forward(model, rows.ids, rows.mask, stop_at_layer=0)
    for layer in range(describe(model).n_layers):
        here = {number: patch for number, patch in patches.items() if patch.node.layer == layer}
        carried = {number for number, patch in here.items() if _acts_on_one_token(model, patch.node, metric)}
        before, below, mixed = stream, dict(readings), {}
        hooks = _comparing_hooks(here, rows, moved) + _mixing_hooks([here[number] for number in carried], rows, mixed)
        hooks += reading_hooks(metric, rows, readings)
        with contextlib.suppress(Complete):
            stream = resume(model, before, layer, rows.mask, hooks=hooks, stop_at_layer=layer + 1)
        acting = {number: patch for number, patch in here.items() if number in moved and bool(moved[number].any())}
        for portion in _portions({n: patch for n, patch in acting.items() if n not in carried}, at_once):
            values |= _branch(model, before, layer, rows, portion, metric, below)
        if len(readings) == len(metric.readings):
            break
        after_mixing = {n: patch for n, patch in acting.items() if n in carried}
        for offset, same in _grouped(after_mixing, lambda patch: patch.offset).items():
            # As many tokens at a time as in a branch.
            for many in _portions(same, at_once * rows.ids.numel() // rows.at(offset)[1].numel()):
                for portion in _portions(_carried(model, before, rows, many, mixed[offset]), at_once):
                    values |= _branch(model, stream, layer + 1, rows, portion, metric, readings)
    read_logits(model, metric, stream, rows, readings)
    base = metric.value(readings)
    patched = [torch.where(moved[number], values[number], base) if number in values else base for number in patches]
    return base, torch.stack(patched)


def _branch(
    model: HookedModel,
    stream: Float[Tensor, "batch pos d_model"],
    layer: int,
    rows: Rows,
    patches: Patches,
    metric: Metric,
    below: Mapping[int, Tensor],
) -> dict[int, Float[Tensor, " batch"]]:
    """Step 2: the metric with each of several patches of one block, from the stream and the readings before it."""
    hooks = _patching_hooks(list(patches.values()), rows)
    values = measure_variants(model, rows, metric, (stream, below), layer, len(patches), hooks)
    return dict(zip(patches, values.split(len(rows.ids)), strict=True))


def _acts_on_one_token(model: HookedModel, node: Node, metric: Metric) -> bool:
    """Whether a patch acts after the attention of its block, and the metric reads nothing after it in this block."""
    prefix = f"blocks.{node.layer}."
    read = {reading.hook.removeprefix(prefix) for reading in metric.readings if reading.hook.startswith(prefix)}
    followed = node.layer + 1 < describe(model).n_layers and has_node(model, Node("head", node.layer, 0))
    return followed and node.kind not in ("embed", "resid_pre") and read <= _BEFORE_MIXING


def _carried(
    model: HookedModel,
    stream: Float[Tensor, "batch pos d_model"],
    rows: Rows,
    patches: Patches,
    mixed: Float[Tensor, "batch *offset head d_head"],
) -> dict[int, Patch]:
    """Step 3: patches of one block, at the same offset, as patches of the stream before the next block.

    Their positions run through the block as rows of one token, with the attention results (z) of the base run.
    """
    layer, offset = next((patch.node.layer, patch.offset) for patch in patches.values())
    before = stream[rows.at(offset)]
    tokens, z = before.reshape(-1, 1, before.shape[-1]), mixed.reshape(-1, 1, *mixed.shape[-2:])
    position = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
    alone = Rows(position[:, None], torch.ones_like(position[:, None], dtype=torch.bool), position)
    axes = before.ndim - 1
    single = [Patch(patch.node, patch.value.reshape(-1, *patch.value.shape[axes:])) for patch in patches.values()]

    def put_z(activation: Tensor, hook: object) -> Tensor:
        return repeated(z, len(single))

    hooks = [(_mixing(layer), put_z), *_patching_hooks(single, alone)]
    after = resume(model, repeated(tokens, len(single)), layer, hooks=hooks, stop_at_layer=layer + 1)
    next_block = Node("resid_pre", layer + 1)
    return {
        number: Patch(next_block, value.view_as(before), offset)
        for number, value in zip(patches, by_variant(after, len(single)), strict=True)
    }


def _patching_hooks(patches: Sequence[Patch], rows: Rows) -> list[Hook]:
    """One hook for each hook point; patch number i acts on variant number i of the rows."""

    def put(activation: Tensor, hook: object, variants: Patches) -> Tensor:
        activation = activation.clone()
        for variant, patch in variants.items():
            activation[patch.index(rows, variant)] = patch.value.to(activation)
        return activation

    by_hook = _grouped(dict(enumerate(patches)), lambda patch: patch.node.hook)
    return [(name, functools.partial(put, variants=variants)) for name, variants in by_hook.items()]


def _comparing_hooks(patches: Patches, rows: Rows, moved: dict[int, Tensor]) -> list[Hook]:
    """Hooks that find the rows in which a patch differs from the output that it replaces."""

    def compare(activation: Tensor, hook: object, compared: Patches) -> None:
        for number, patch in compared.items():
            own = activation[patch.index(rows)]
            moved[number] = (own != patch.value.to(own)).view(len(own), -1).any(1)

    by_hook = _grouped(patches, lambda patch: patch.node.hook)
    return [(name, functools.partial(compare, compared=compared)) for name, compared in by_hook.items()]


def _mixing_hooks(patches: Sequence[Patch], rows: Rows, mixed: dict[Any, Tensor]) -> list[Hook]:
    """A hook that reads the attention results (z) of a block at the positions of its patches."""

    def read(z: Tensor, hook: object) -> None:
        mixed.update({offset: z[rows.at(offset)] for offset in {patch.offset for patch in patches}})

    return [(_mixing(layer), read) for layer in {patch.node.layer for patch in patches}]


def _mixing(layer: int) -> str:
    """Hook at which the attention of a block has mixed positions; after it every position is computed alone."""
    return Node("head", layer, 0).hook


def _grouped(patches: Patches, key: Callable[[Patch], Any]) -> dict[Any, dict[int, Patch]]:
    groups: dict[Any, dict[int, Patch]] = {}
    for number, patch in patches.items():
        groups.setdefault(key(patch), {})[number] = patch
    return groups


def _portions(patches: Patches, size: int) -> Iterator[dict[int, Patch]]:
    items = iter(patches.items())
    while portion := dict(itertools.islice(items, max(1, size))):
        yield portion


def _patches_that_fit(model: HookedModel, rows: Rows) -> int:
    """How many patches in one batch take no more memory than one forward over the same rows, logits included."""
    info = describe(model)
    length = rows.ids.shape[1]
    # What a block holds at once, in numbers per token: its MLP's hidden layer or its attention, a few times over.
    block = max(4 * info.d_mlp + 5 * info.d_model, 5 * info.n_heads * length)
    forward_size = max(block, info.vocab_size + 2 * info.d_model, _SMALL / rows.ids.numel())
    return max(1, int(forward_size / block))
