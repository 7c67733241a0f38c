"""Activation patching: put what a component computes in one run into another run, and see what becomes of a metric.

The two runs are those of a `PromptPair`. *Noising* puts values of the shifted run into the clean one, at P0: does the
sink go (is the component necessary)? *Denoising* puts values of the clean run into the shifted one, at the position m
of the same token: does a sink appear there (is it sufficient)? A grid has one `Patch` per cell and runs like this:

1. Walk the base run (the one patched into) from block to block. Keep only the residual stream before the current
   block, and what the metric has read so far.
2. Before each block branch off: copies of the stream, one for each patch, stand side by side in the batch. Each takes
   its own patch, runs on, and stops at the last thing the metric reads. What the metric reads below that block is what
   it read in the base run.
3. A patch behind the attention of its block does not branch off there, since in this block nothing changes but its own
   position. The rest of the block is worked out for that one token, for all such patches together, and what comes out
   is a patch of the stream before the next block.
4. A row keeps its base value where a patch puts in what was there already, bit for bit, or acts where the metric has
   read all it reads. Batches of another shape may round otherwise, and nothing changed must mean that nothing changed.

A pass is thus as short as patch and metric allow. At P0 it cannot be made narrower: nothing comes before P0, but every
later position attends to it. (What stays within P0's own stream needs one row only: `closed_form`.)

Source: Meng et al. 2022 (arXiv 2202.05262); names and pitfalls, Zhang and Nanda 2024 (arXiv 2309.16042).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.batched_runs import by_slot, measure_slots, repeated
from p0circuit.interventions.metrics import Complete, Metric, Rows, batches, measure, read_logits, reading_hooks
from p0circuit.interventions.nodes import InterventionError, Node, nodes_of
from p0circuit.interventions.pairs import PromptPair, values_at
from p0circuit.models import ModelError, describe, forward, resume
from p0circuit.models.hooks import Hook, hook_point
from p0circuit.prompts import PromptSet
from p0circuit.recording.batch_size import batch_size_for
from p0circuit.stats import LEVEL, RESAMPLES, Interval

if TYPE_CHECKING:
    import pandas as pd

Direction = Literal["noising", "denoising"]
Component = Literal["embed", "resid_pre", "attn", "resid_mid", "mlp", "resid_post"]

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
    """One cell of a grid: what to put at a node, `offset` positions after the place (P0, or m in the shifted run).

    With several offsets the patch acts at all of them at once, and its value has an axis for them after the batch.
    """

    node: Node
    value: Float[Tensor, "batch *offset_and_value"]
    offset: int | tuple[int, ...] = 0

    def index(self, rows: Rows, slot: int = 0) -> tuple[Any, ...]:
        """Where this patch acts in an activation that holds copies of `rows` side by side, in copy number `slot`."""
        numbers, positions = rows.at(self.offset)
        return (numbers + slot * len(rows.ids), positions, *([] if self.node.index is None else [self.node.index]))


Patches = Mapping[int, Patch]
"""Patches by their number in the grid."""


@dataclass(frozen=True, eq=False)
class PatchGrid:
    """What became of the metric, per patch and row.

    Attributes:
        nodes, offsets: the axis of patches: where each of them acted.
        patched: the metric of each row with each patch.
        base: the metric of each row of the run patched into.
        source: the same of the other run, where the values come from.
    """

    metric: str
    direction: Direction
    nodes: tuple[Node, ...]
    offsets: tuple[int | tuple[int, ...], ...]
    patched: Float[Tensor, "patch batch"]
    base: Float[Tensor, " batch"]
    source: Float[Tensor, " batch"]

    @property
    def clean(self) -> Float[Tensor, " batch"]:
        """The metric of the clean run."""
        return self.base if self.direction == "noising" else self.source

    @property
    def corrupted(self) -> Float[Tensor, " batch"]:
        """The metric of the other run, `shifted` in a pair."""
        return self.source if self.direction == "noising" else self.base

    def effect(self, seed: int = 0) -> list[Interval]:
        """The effect of each patch, mean(patched - base) / mean(source - base), with its 95 % interval over rows.

        0: as the run patched into; 1: as the run the values come from. In noising that is the share of the sink lost,
        in denoising the share won.

        Raises:
            InterventionError: the metric does not differ between the two runs.
        """
        change, whole = (self.patched - self.base).double().numpy(), (self.source - self.base).double().numpy()
        if whole.mean() == 0:
            raise InterventionError(
                f"both runs have the same {self.metric}: no effect can be a share of it; compare `patched` and `base`"
            )
        n = len(whole)
        # A resample is a weight for each row: drawn once, so that the intervals of all patches rest on the same ones.
        drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES)
        drawn = drawn[drawn @ whole != 0]
        found = []
        for one in change:
            low, high = np.quantile(drawn @ one / (drawn @ whole), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
            # Adding 0 takes the sign off -0, which is what no change over a negative difference comes to.
            found.append(Interval(one.mean() / whole.mean() + 0.0, low + 0.0, high + 0.0, n))
        return found

    def to_dataframe(self) -> pd.DataFrame:
        """One line per patch: where it acted, the mean metric with it, how far that is from base, and the effect."""
        import pandas as pd

        means = self.patched.double().mean(1)
        return pd.DataFrame(
            {
                "node": str(node),
                "component": node.kind,
                "layer": node.layer,
                "index": node.index,
                "offset": offset,
                "patched": float(mean),
                "change": float(mean - self.base.double().mean()),
                "effect": effect.value,
                "effect_low": effect.low,
                "effect_high": effect.high,
            }
            for node, offset, mean, effect in zip(self.nodes, self.offsets, means, self.effect(), strict=True)
        ).astype({"index": "Int64"})

    def maps(self, column: str = "effect") -> dict[str, pd.DataFrame]:
        """A grid of components, of heads or of neurons as layers by those, per offset: panels for `effect_maps`."""
        table, place = self.to_dataframe(), "P0" if self.direction == "noising" else "m"
        whole = table["index"].isna().all()
        by, label = ("component", "component") if whole else ("index", self.nodes[0].kind)
        panels = {}
        for offset, part in table.groupby("offset", sort=False):
            panel = part.pivot(index="layer", columns=by, values=column)[part[by].unique()]
            panel.columns.name = label
            panels[f"at {place} + {offset}" if offset else f"at {place}"] = panel
        return panels


@torch.no_grad()
def patch_grid(
    model: HookedModel,
    pair: PromptPair,
    patches: Sequence[Patch],
    metric: Metric,
    direction: Direction = "noising",
    patches_per_batch: int | None = None,
) -> PatchGrid:
    """Apply each patch by itself to the clean run (noising) or the shifted run (denoising) and measure.

    As many patches go side by side as keep a pass within the memory of one forward over the same rows, logits
    included, unless `patches_per_batch` says otherwise. Patches may hold any values: those of `pair_patches`, or
    of `patch_values` for zero, mean and resample ablation. Any two sets of prompts make a pair: PromptPair(a, b, 0).

    Raises:
        InterventionError: a node, position or direction that does not exist, values of another shape or not finite,
            prompts that do not pair up, no patch, or a metric that is not one finite number per row.
        ModelError: the model is in training mode, cannot read the prompts, or lacks a hook.
    """
    base, place, source, source_place = _runs(pair, direction)
    _check(model, base, patches, metric, patches_per_batch)
    measured, start = [], 0
    for rows in batches(model, base, place):
        some = slice(start, start := start + len(rows.ids))
        here = {
            number: Patch(patch.node, patch.value[some].to(rows.ids.device), patch.offset)
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
        source=measure(model, source, metric, source_place),
    )


def pair_patches(
    model: HookedModel,
    pair: PromptPair,
    nodes: Sequence[str | Node],
    direction: Direction = "noising",
    offsets: Sequence[int] = (0,),
) -> list[Patch]:
    """A patch per node and offset, with what the node computes at the same token of the other run.

    Raises:
        InterventionError: a node, position or direction that does not exist.
    """
    *_, source, place = _runs(pair, direction)
    checked = nodes_of(nodes, model)
    found = []
    for offset in offsets:
        rows = torch.arange(source.n).split(batch_size_for(model, source.length, with_logits=True))
        parts = [values_at(model, source.subset(some), checked, place[some] + offset) for some in rows]
        found += [Patch(node, torch.cat([part[node] for part in parts]), offset) for node in checked]
    return found


def patch_components(
    model: HookedModel,
    pair: PromptPair,
    metric: Metric,
    components: Sequence[Component] = get_args(Component),
    layers: Sequence[int] | None = None,
    offsets: Sequence[int] = (0,),
    direction: Direction = "noising",
    patches_per_batch: int | None = None,
) -> PatchGrid:
    """The grid of components x layers x offsets; components that the model does not have are left out.

    Offset 0 is P0; another offset is the control: it differs between the runs as well, but is first in neither.
    """
    nodes = [
        Node.parse(f"{name}.{layer}" if name != "embed" else name)
        for layer in _layers(model, layers)
        for name in components
        if name != "embed" or layer == 0
    ]
    nodes = [node for node in nodes if _exists(model, node)]
    patches = pair_patches(model, pair, nodes, direction, offsets)
    return patch_grid(model, pair, patches, metric, direction, patches_per_batch)


def patch_heads(
    model: HookedModel,
    pair: PromptPair,
    metric: Metric,
    layers: Sequence[int] | None = None,
    offsets: Sequence[int] = (0,),
    direction: Direction = "noising",
    patches_per_batch: int | None = None,
) -> PatchGrid:
    """The grid of layers x heads x offsets: what single heads hand on (z, before the output matrix)."""
    nodes = [Node("head", layer, head) for layer in _layers(model, layers) for head in range(describe(model).n_heads)]
    patches = pair_patches(model, pair, nodes, direction, offsets)
    return patch_grid(model, pair, patches, metric, direction, patches_per_batch)


def patch_neurons(
    model: HookedModel,
    pair: PromptPair,
    metric: Metric,
    layers: Sequence[int] | None = None,
    neurons: Sequence[int] | None = None,
    offsets: Sequence[int] = (0,),
    direction: Direction = "noising",
    patches_per_batch: int | None = None,
) -> PatchGrid:
    """The grid of layers x MLP neurons (all, if none are named) x offsets."""
    chosen = range(describe(model).d_mlp) if neurons is None else neurons
    nodes = [Node("neuron", layer, neuron) for layer in _layers(model, layers) for neuron in chosen]
    patches = pair_patches(model, pair, nodes, direction, offsets)
    return patch_grid(model, pair, patches, metric, direction, patches_per_batch)


def _runs(pair: PromptPair, direction: Direction) -> tuple[PromptSet, Tensor, PromptSet, Tensor]:
    """The prompts patched into and the place in them, then those the values come from."""
    if direction not in get_args(Direction):
        raise InterventionError(f"unknown direction {direction!r}; expected 'noising' or 'denoising'")
    if pair.clean.n != pair.shifted.n:
        raise InterventionError(
            f"{pair.clean.n} clean and {pair.shifted.n} shifted rows do not pair up; expected as many of each"
        )
    clean, shifted = (pair.clean, pair.clean.p0), (pair.shifted, pair.position)
    return (*clean, *shifted) if direction == "noising" else (*shifted, *clean)


def _layers(model: HookedModel, layers: Sequence[int] | None) -> Sequence[int]:
    count = describe(model).n_layers
    for layer in layers or ():
        if not 0 <= layer < count:
            raise InterventionError(f"there is no layer {layer} to patch: {describe(model).name} has 0 to {count - 1}")
    return range(count) if layers is None else layers


def _exists(model: HookedModel, node: Node) -> bool:
    """Whether the model has this component at all: not every block has a stream between attention and MLP."""
    try:
        hook_point(model, node.hook)
    except ModelError:
        return False
    return True


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
    found, moved, values = {}, {}, {}
    stream = forward(model, rows.ids, rows.mask, stop_at_layer=0)
    for layer in range(describe(model).n_layers):
        here = {number: patch for number, patch in patches.items() if patch.node.layer == layer}
        behind = {number for number, patch in here.items() if _acts_on_one_token(model, patch.node, metric)}
        before, below, mixed = stream, dict(found), {}
        hooks = _comparing_hooks(here, rows, moved) + _mixing_hooks([here[number] for number in behind], rows, mixed)
        hooks += reading_hooks(metric, rows, found)
        with contextlib.suppress(Complete):
            stream = resume(model, before, layer, rows.mask, hooks=hooks, stop_at_layer=layer + 1)
        acting = {number: patch for number, patch in here.items() if number in moved and bool(moved[number].any())}
        for some in _portions({n: patch for n, patch in acting.items() if n not in behind}, at_once):
            values |= _branch(model, before, layer, rows, some, metric, below)
        if len(found) == len(metric.readings):
            break
        carried = {n: patch for n, patch in acting.items() if n in behind}
        for offset, same in _grouped(carried, lambda patch: patch.offset).items():
            # As many tokens at a time as in a branch.
            for many in _portions(same, at_once * rows.ids.numel() // rows.at(offset)[1].numel()):
                for some in _portions(_carried(model, before, rows, many, mixed[offset]), at_once):
                    values |= _branch(model, stream, layer + 1, rows, some, metric, found)
    read_logits(model, metric, stream, rows, found)
    base = metric.value(found)
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
    """Step 2: the metric with each of some patches of one block, from the stream and the readings before it."""
    hooks = _patching_hooks(list(patches.values()), rows)
    values = measure_slots(model, rows, metric, (stream, below), layer, len(patches), hooks)
    return dict(zip(patches, values.split(len(rows.ids)), strict=True))


def _acts_on_one_token(model: HookedModel, node: Node, metric: Metric) -> bool:
    """Whether a patch is behind the attention of its block, and nothing that the metric reads in this block is."""
    prefix = f"blocks.{node.layer}."
    read = {reading.hook.removeprefix(prefix) for reading in metric.readings if reading.hook.startswith(prefix)}
    followed = node.layer + 1 < describe(model).n_layers and _exists(model, Node("head", node.layer, 0))
    return followed and node.kind not in ("embed", "resid_pre") and read <= _BEFORE_MIXING


def _carried(
    model: HookedModel,
    stream: Float[Tensor, "batch pos d_model"],
    rows: Rows,
    patches: Patches,
    mixed: Float[Tensor, "batch *offset head d_head"],
) -> dict[int, Patch]:
    """Step 3: patches of one block, at the same offset, as patches of the stream before the next block.

    Their positions go through the block as rows of one token, in which attention has mixed what it did in the base run.
    """
    layer, offset = next((patch.node.layer, patch.offset) for patch in patches.values())
    before = stream[rows.at(offset)]
    tokens, z = before.reshape(-1, 1, before.shape[-1]), mixed.reshape(-1, 1, *mixed.shape[-2:])
    place = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
    alone = Rows(place[:, None], torch.ones_like(place[:, None], dtype=torch.bool), place)
    axes = before.ndim - 1
    single = [Patch(patch.node, patch.value.reshape(-1, *patch.value.shape[axes:])) for patch in patches.values()]

    def mix(activation: Tensor, hook: Any) -> Tensor:
        return repeated(z, len(single))

    hooks = [(_mixing(layer), mix), *_patching_hooks(single, alone)]
    after = resume(model, repeated(tokens, len(single)), layer, hooks=hooks, stop_at_layer=layer + 1)
    next_block = Node("resid_pre", layer + 1)
    return {
        number: Patch(next_block, value.view_as(before), offset)
        for number, value in zip(patches, by_slot(after, len(single)), strict=True)
    }


def _patching_hooks(patches: Sequence[Patch], rows: Rows) -> list[Hook]:
    """One hook per hook point; patch number i acts on copy number i of the rows."""

    def put(activation: Tensor, hook: Any, slots: Patches) -> Tensor:
        activation = activation.clone()
        for slot, patch in slots.items():
            activation[patch.index(rows, slot)] = patch.value.to(activation)
        return activation

    by_hook = _grouped(dict(enumerate(patches)), lambda patch: patch.node.hook)
    return [(name, functools.partial(put, slots=some)) for name, some in by_hook.items()]


def _comparing_hooks(patches: Patches, rows: Rows, moved: dict[int, Tensor]) -> list[Hook]:
    """Hooks that note in which rows a patch puts in anything else than the base run has there."""

    def compare(activation: Tensor, hook: Any, some: Patches) -> None:
        for number, patch in some.items():
            own = activation[patch.index(rows)]
            moved[number] = (own != patch.value.to(own)).view(len(own), -1).any(1)

    by_hook = _grouped(patches, lambda patch: patch.node.hook)
    return [(name, functools.partial(compare, some=some)) for name, some in by_hook.items()]


def _mixing_hooks(patches: Sequence[Patch], rows: Rows, mixed: dict[Any, Tensor]) -> list[Hook]:
    """A hook that notes what the heads of a block have mixed where its patches act."""

    def note(z: Tensor, hook: Any) -> None:
        mixed.update({offset: z[rows.at(offset)] for offset in {patch.offset for patch in patches}})

    return [(_mixing(layer), note) for layer in {patch.node.layer for patch in patches}]


def _mixing(layer: int) -> str:
    """Where a block's attention has mixed positions; from here on each position is on its own."""
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
    """How many patches side by side take no more memory than one forward over the same rows, logits included."""
    info = describe(model)
    length = rows.ids.shape[1]
    # What a block holds at once, in numbers per token: its MLP's hidden layer or its attention, a few times over.
    block = max(4 * info.d_mlp + 5 * info.d_model, 5 * info.n_heads * length)
    whole = max(block, info.vocab_size + 2 * info.d_model, _SMALL / rows.ids.numel())
    return max(1, int(whole / block))
