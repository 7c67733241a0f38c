"""Joint patches at P0: the outputs of blocks 0-1, or the whole stream, patched between the clean and the shifted run.

*Noising* puts what the shifted run computes at a token into the clean run, where this token is at P0. *Denoising* puts
what the clean run computes at P0 into the shifted run, where the same token is at position m. The result is the change
of the sink heads' score of the patched position, for each sample.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from p0circuit.experiments.sink_under_study import Heads, sink_scores
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.ablation import ablate
from p0circuit.interventions.activation_patching import Direction
from p0circuit.interventions.metrics import Metric, Rows, batches, sink_score_of
from p0circuit.interventions.nodes import Node, components
from p0circuit.interventions.pairs import PromptPair, values_at
from p0circuit.models import describe, forward
from p0circuit.prompts import PromptSet, from_ids
from p0circuit.sink import CIRCUIT_BLOCKS
from p0circuit.stats import bootstrap, ratio_interval

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.hook_points import HookPoint

    from p0circuit.models.hooks import Hook

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
JOINT, WHOLE_STREAM, JOINT_CONTROL = "blocks 0-1", "whole stream", "blocks 0-1 at a random position"
"""What is patched, by its name in the tables."""

JointChanges = dict[tuple[str, str], Float[np.ndarray, " sample"]]
"""The change of the sink heads' score by (direction, what is patched); NaN in samples that were not patched."""


@dataclass(frozen=True, eq=False)
class PairRuns:
    """What the two runs of a prompt pair give before anything is patched.

    Attributes:
        clean_values: value of every patched node at P0 of the clean run.
        shifted_values: value of the same nodes at the same token of the shifted run.
        clean_scores: the sink heads' mean score of P0 in the clean run.
        shifted_scores: their mean score of the same token in the shifted run.
    """

    clean_values: Mapping[Node, Tensor]
    shifted_values: Mapping[Node, Tensor]
    clean_scores: Float[np.ndarray, " sample"]
    shifted_scores: Float[np.ndarray, " sample"]


@dataclass(frozen=True, eq=False)
class AssignedPairs:
    """Prompt pairs of the same samples at several shifts, every sample assigned to one of the shifts in turn.

    Attributes:
        pairs: for each shift, the pair of its samples.
        samples: for each shift, the indices of its samples.
        clean: the clean prompts of all samples, in the order of `order`.
    """

    pairs: tuple[PromptPair, ...]
    samples: tuple[Int[Tensor, "_"], ...]
    clean: PromptSet

    @classmethod
    def of(cls, pairs: Sequence[PromptPair], most: int) -> AssignedPairs:
        """Assign samples to shifts: sample i to shift i modulo the number of shifts.

        Args:
            pairs: one pair for each shift, all with the same clean prompts.
            most: number of samples at most; with fewer samples than shifts, the last shifts have none.
        """
        every = torch.arange(min(most, pairs[0].clean.n))
        samples = [every[number :: len(pairs)] for number in range(len(pairs)) if number < len(every)]
        parts = (_subset(pair, rows) for pair, rows in zip(pairs, samples, strict=False))
        return cls(tuple(parts), tuple(samples), pairs[0].clean.subset(torch.cat(samples)))

    @property
    def order(self) -> Int[Tensor, " sample"]:
        """Indices of all samples, one shift after the other."""
        return torch.cat(self.samples)


def joint_changes(
    model: HookedModel,
    pair: PromptPair,
    heads: Heads,
    control_offsets: Int[Tensor, " sample"],
    runs: PairRuns | None = None,
) -> JointChanges:
    """Patch jointly in both directions, and measure the change of the sink heads' score.

    Args:
        model: the model.
        pair: clean and shifted prompts.
        heads: the sink heads, as (layer, head).
        control_offsets: for each sample, how many positions after P0 the control patches.
        runs: what the two runs compute; measured here if None.

    Returns:
        The change of the score of P0 (noising) or of position m (denoising), for `JOINT`, `WHOLE_STREAM` and
        `JOINT_CONTROL`.
    """
    runs = pair_runs(model, pair, heads) if runs is None else runs
    stream = [node for node in runs.clean_values if node.kind == "resid_pre"]
    blocks = [node for node in runs.clean_values if node.kind != "resid_pre"]
    clean, shifted = pair.clean, pair.shifted
    patched_runs = {
        "noising": (clean, 0, runs.shifted_values, runs.clean_scores),
        "denoising": (shifted, pair.shift, runs.clean_values, runs.shifted_scores),
    }
    control_values = {
        "noising": values_at(model, shifted, blocks, pair.position + control_offsets),
        "denoising": values_at(model, clean, blocks, clean.p0 + control_offsets),
    }
    changes: JointChanges = {}
    for direction, (prompts, offset, values, unpatched) in patched_runs.items():
        patches = {
            JOINT: ablate(model, prompts, blocks, values, offset),
            WHOLE_STREAM: ablate(model, prompts, stream, values, offset),
            JOINT_CONTROL: ablate(model, prompts, blocks, control_values[direction], offset + control_offsets),
        }
        for name, patch in patches.items():
            changes[direction, name] = sink_scores(model, prompts, heads, offset, [patch]) - unpatched
    return changes


def pair_runs(
    model: HookedModel, pair: PromptPair, heads: Heads, clean_values: Mapping[Node, Tensor] | None = None
) -> PairRuns:
    """Measure what the two runs of a pair give before anything is patched.

    Args:
        model: the model.
        pair: clean and shifted prompts.
        heads: the sink heads, as (layer, head).
        clean_values: the values of the clean run, if they are known.
    """
    nodes = _patched_nodes(model)
    return PairRuns(
        values_at(model, pair.clean, nodes) if clean_values is None else clean_values,
        values_at(model, pair.shifted, nodes, pair.position),
        sink_scores(model, pair.clean, heads),
        sink_scores(model, pair.shifted, heads, pair.shift),
    )


def joint_changes_at_every_shift(
    model: HookedModel, pairs: Sequence[PromptPair], heads: Heads, control_offsets: Int[Tensor, " sample"]
) -> list[JointChanges]:
    """Patch every sample jointly at every shift.

    Args:
        model: the model.
        pairs: one pair for each shift, all with the same clean prompts.
        heads: the sink heads, as (layer, head).
        control_offsets: for each sample, how many positions after P0 the control patches.

    Returns:
        The changes at each shift.
    """
    clean_values = values_at(model, pairs[0].clean, _patched_nodes(model))
    return [
        joint_changes(model, pair, heads, control_offsets, pair_runs(model, pair, heads, clean_values))
        for pair in pairs
    ]


def joint_changes_at_one_shift(
    model: HookedModel, pairs: Sequence[PromptPair], heads: Heads, control_offsets: Int[Tensor, " sample"]
) -> list[JointChanges]:
    """Patch every sample jointly at one of the shifts, in as few runs as that takes.

    Args:
        model: the model.
        pairs: one pair for each shift, all with the same clean prompts.
        heads: the sink heads, as (layer, head).
        control_offsets: for each sample, how many positions after P0 the control patches.

    Returns:
        The changes at each shift, NaN in the samples of the other shifts.
    """
    clean, last = pairs[0].clean, max(layer for layer, _ in heads)
    clean_scores = sink_scores(model, clean, heads)
    # The stream above the last sink heads changes no score.
    nodes = [node for node in _patched_nodes(model) if node.kind != "resid_pre" or node.layer <= last]
    # P0 sees itself alone, so two tokens are enough for its values: the token at P0 and any other.
    two_tokens = from_ids(torch.stack([clean.ids[torch.arange(clean.n), clean.p0]] * 2, dim=1))
    clean_values = values_at(model, two_tokens, nodes)
    assigned = AssignedPairs.of(pairs, clean.n)
    changes = []
    for pair, rows in zip(assigned.pairs, assigned.samples, strict=True):
        shifted_values, shifted_scores = _values_and_scores(
            model, pair.shifted, nodes, pair.position, sink_score_of(heads)
        )
        values = {node: value[rows] for node, value in clean_values.items()}
        runs = PairRuns(values, shifted_values, clean_scores[rows.numpy()], shifted_scores)
        measured = joint_changes(model, pair, heads, control_offsets[rows], runs)
        at_shift: JointChanges = {}
        for key, change in measured.items():
            at_shift[key] = np.full(clean.n, np.nan)
            at_shift[key][rows.numpy()] = change
        changes.append(at_shift)
    return changes


def mean_over_shifts(changes: Sequence[JointChanges]) -> JointChanges:
    """Return the mean change of each sample over the shifts at which it was patched.

    Args:
        changes: the changes at each shift.
    """
    return {key: np.nanmean([change[key] for change in changes], axis=0) for key in changes[0]}


def total_effects(changes: Sequence[JointChanges], samples: Int[Tensor, " row"]) -> Float[np.ndarray, " row"]:
    """Return the total effect of noising on samples, each at the shift it is assigned to.

    Args:
        changes: the changes at each shift.
        samples: indices of samples.
    """
    return np.array([changes[int(row) % len(changes)]["noising", WHOLE_STREAM][int(row)] for row in samples])


def joint_table(pairs: Sequence[PromptPair], changes: Sequence[JointChanges]) -> pd.DataFrame:
    """Tabulate the changes by direction, shift and what is patched, with their share of the total effect.

    Args:
        pairs: one pair for each shift.
        changes: the changes at each shift.
    """
    import pandas as pd

    rows = []
    for pair, change in zip(pairs, changes, strict=False):
        for (direction, name), values in change.items():
            patched = np.isfinite(values)
            mean = bootstrap(values[patched])
            share = ratio_interval(values[patched], change[direction, WHOLE_STREAM][patched])
            ends = [getattr(interval, end) for interval in (mean, share) for end in ("value", "low", "high")]
            rows.append((direction, pair.shift, name, *ends, mean.n))
    names = ["change", "change_low", "change_high", "share", "share_low", "share_high", "n"]
    return pd.DataFrame(rows, columns=["direction", "shift", "patched", *names])


def _subset(pair: PromptPair, rows: Int[Tensor, " row"]) -> PromptPair:
    return PromptPair(pair.clean.subset(rows), pair.shifted.subset(rows), pair.shift)


def _patched_nodes(model: HookedModel) -> list[Node]:
    """The outputs of attention and MLP in blocks 0-1, then the stream before every block."""
    blocks = [node for node in components(model, CIRCUIT_BLOCKS) if node.kind != "embed"]
    return [*blocks, *(Node("resid_pre", layer) for layer in range(describe(model).n_layers))]


@torch.no_grad()
def _values_and_scores(
    model: HookedModel, prompts: PromptSet, nodes: Sequence[Node], position: Int[Tensor, " batch"], metric: Metric
) -> tuple[dict[Node, Tensor], Float[np.ndarray, " batch"]]:
    """The nodes' values at a position of each row and the metric there, from one run."""
    values: dict[Node, list[Tensor]] = {node: [] for node in nodes}
    scores = []
    end = max(metric.end(model), 1 + max(node.layer for node in nodes))
    for rows in batches(model, prompts, position):
        readings: dict[int, Tensor] = {}

        def read_value(activation: Tensor, hook: HookPoint, node: Node, rows: Rows = rows) -> None:
            values[node].append(node.read(activation, rows.position).clone())

        def read_metric(
            activation: Tensor,
            hook: HookPoint,
            number: int,
            rows: Rows = rows,
            readings: dict[int, Tensor] = readings,
        ) -> None:
            readings[number] = metric.readings[number].reduce(activation, rows)

        hooks: list[Hook] = [(node.hook, functools.partial(read_value, node=node)) for node in nodes]
        hooks += [
            (reading.hook, functools.partial(read_metric, number=number))
            for number, reading in enumerate(metric.readings)
        ]
        forward(model, rows.ids, rows.mask, hooks=hooks, stop_at_layer=end)
        scores.append(metric.value(readings))
    return {node: torch.cat(parts) for node, parts in values.items()}, torch.cat(scores).double().cpu().numpy()
