"""Single patches at P0: the embedding, the stream, attention and MLP of every block, each patched by itself.

Shares are of the total effect in the same samples: the change with P0's whole stream patched (`joint_patches`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from p0circuit.experiments.measures.joint_patches import (
    DIRECTIONS,
    WHOLE_STREAM,
    AssignedPairs,
    JointChanges,
    total_effects,
)
from p0circuit.experiments.sink_under_study import Heads
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.activation_patching import (
    Direction,
    PatchGrid,
    patch,
)
from p0circuit.interventions.closed_form import key_edges
from p0circuit.interventions.metrics import sink_score_of
from p0circuit.interventions.nodes import InterventionError, Kind, Node, nodes_of_kinds
from p0circuit.interventions.pairs import PromptPair, values_at
from p0circuit.models import ModelInfo, describe
from p0circuit.stats import ratio_interval

if TYPE_CHECKING:
    import pandas as pd

COMPONENTS: tuple[Kind, ...] = ("embed", "attn", "mlp", "resid_pre", "resid_mid")
"""What is patched in every block, in the order of the figure's columns."""
FEWEST_EXACT_SAMPLES = 3
"""Samples for exact patches of a bounded run, at least one for each shift."""
_COLUMNS = ["direction", "node", "component", "layer", "change", "share", "low", "high", "n"]


def patch_every_single(
    model: HookedModel, pairs: Sequence[PromptPair], heads: Heads, changes: Sequence[JointChanges], most_runs: int
) -> pd.DataFrame:
    """Patch each component of each block by itself, in both directions.

    Args:
        model: the model.
        pairs: one pair for each shift, all with the same clean prompts.
        heads: the sink heads, as (layer, head).
        changes: the joint changes at each shift, for the total effect.
        most_runs: bound on patches times samples, in both directions together.

    Returns:
        A row for each direction and component: its change of the score and its share of the total effect.
    """
    import pandas as pd

    metric, layers = sink_score_of(heads), range(_last_layer(heads) + 1)
    assigned = AssignedPairs.of(pairs, max(len(pairs), most_runs // (2 * len(COMPONENTS) * len(layers))))
    nodes = nodes_of_kinds(model, COMPONENTS, layers)
    rows = []
    for direction in DIRECTIONS:
        grids = [patch(model, pair, metric, nodes, direction) for pair in assigned.pairs]
        total = _total_effect(changes, assigned, direction)
        rows += [_row(direction, node, change, total) for node, change in _changes(grids).items()]
    return pd.DataFrame(rows, columns=_COLUMNS)


def patch_strongest_singles(
    model: HookedModel,
    pairs: Sequence[PromptPair],
    heads: Heads,
    changes: Sequence[JointChanges],
    estimated_samples: int,
    row_runs: float,
) -> tuple[pd.DataFrame, list[str]]:
    """Estimate all noising patches, and patch the strongest and a random sample exactly, in both directions.

    The estimate is the exact change of P0's keys, all later positions being as they were: it needs rows of one token.

    Args:
        model: the model.
        pairs: one pair for each shift, all with the same clean prompts.
        heads: the sink heads, as (layer, head).
        changes: the joint changes at each shift, for the total effect.
        estimated_samples: number of samples for estimates.
        row_runs: bound on the exact patches, in rows through all blocks.

    Returns:
        A row for each direction and component, `exact` being False for estimates; and notes with their error.

    Raises:
        NotOfTheClosedForm: the model's attention has no closed form, so nothing can be estimated.
    """
    import pandas as pd

    info = describe(model)
    nodes = _nodes(info, _last_layer(heads))
    estimated = AssignedPairs.of(pairs, max(len(pairs), estimated_samples))
    exact_pairs = AssignedPairs.of(pairs, max(len(pairs), FEWEST_EXACT_SAMPLES))
    estimates = _estimates(model, estimated, nodes, heads)
    strongest, at_random = _nodes_to_patch(info, estimates, len(exact_pairs.order), row_runs, pairs[0].clean.seed)
    exact = {
        direction: _exact_changes(model, exact_pairs, [*strongest, *at_random], heads, direction)
        for direction in DIRECTIONS
    }
    rows = []
    for direction in DIRECTIONS:
        total, total_of_estimated = (_total_effect(changes, part, direction) for part in (exact_pairs, estimated))
        for node in nodes:
            if node in exact[direction]:
                rows.append((*_row(direction, node, exact[direction][node], total), True))
            elif direction == "noising":
                rows.append((*_row(direction, node, estimates[node], total_of_estimated), False))

    # The same samples of estimates and exact patches.
    same = [int((estimated.order == row).nonzero()[0, 0]) for row in exact_pairs.order]
    total_size = abs(total_effects(changes, exact_pairs.order).mean())
    errors = [
        [abs(float(estimates[node][same].mean() - exact["noising"][node].mean())) / total_size for node in group]
        for group in (strongest, at_random)
    ]
    notes = [
        f"single patches: {len(nodes)} noising patches were estimated on {len(estimated.order)} samples; "
        f"{len(strongest) + len(at_random)} were patched exactly on {len(exact_pairs.order)}, in both directions",
        "mean error of the estimates of single patches, in shares of the total effect: "
        f"{np.mean(errors[0] or [0.0]):.3f} on the {len(strongest)} strongest, {np.mean(errors[1] or [0.0]):.3f} on "
        f"{len(at_random)} drawn at random",
    ]
    return pd.DataFrame(rows, columns=[*_COLUMNS, "exact"]), notes


def _last_layer(heads: Heads) -> int:
    return max(layer for layer, _ in heads)


def _nodes(info: ModelInfo, last: int) -> list[Node]:
    """The components up to a layer, without those that the model does not have."""
    nodes = [Node("embed")]
    for layer in range(last + 1):
        for kind in COMPONENTS[1:]:
            with contextlib.suppress(InterventionError):
                nodes.append(Node(kind, layer).check(info))
    return nodes


def _changes(grids: Sequence[PatchGrid]) -> dict[Node, Float[np.ndarray, " row"]]:
    """The change of the metric by node, the samples of all grids after each other."""
    changes = torch.cat([grid.effect for grid in grids], dim=1).double().numpy()
    return dict(zip(grids[0].nodes, changes, strict=True))


def _total_effect(
    changes: Sequence[JointChanges], assigned: AssignedPairs, direction: Direction
) -> Float[np.ndarray, " row"]:
    """The change with P0's whole stream patched, of the same samples at the same shifts."""
    parts = zip(changes, assigned.samples, strict=False)
    return np.concatenate([change[direction, WHOLE_STREAM][rows.numpy()] for change, rows in parts])


def _row(
    direction: Direction, node: Node, change: Float[np.ndarray, " row"], total: Float[np.ndarray, " row"]
) -> tuple[str | float, ...]:
    share = ratio_interval(change, total)
    return (direction, str(node), node.kind, node.layer, change.mean(), *share.to_json().values())


def _estimates(
    model: HookedModel, assigned: AssignedPairs, nodes: Sequence[Node], heads: Heads
) -> dict[Node, Float[np.ndarray, " row"]]:
    """Estimated changes of the score of P0 by node."""
    values = [values_at(model, part.shifted, nodes, part.position) for part in assigned.pairs]
    joined: dict[Node, Tensor] = {node: torch.cat([value[node] for value in values]) for node in nodes}
    keys = key_edges(model, assigned.clean, nodes, joined, "all")
    layers, numbers = map(list, zip(*heads, strict=True))
    changes = keys.effect[:, :, layers, numbers].double().mean(-1).cpu().numpy()
    return dict(zip(nodes, changes, strict=True))


def _nodes_to_patch(
    info: ModelInfo, estimates: dict[Node, Float[np.ndarray, " row"]], samples: int, row_runs: float, seed: int
) -> tuple[list[Node], list[Node]]:
    """The strongest nodes, and a random sample of the others, which shows the error of their estimates."""
    nodes = list(estimates)
    # Components first: a state of the stream is the sum of what they write.
    ranked = sorted(nodes, key=lambda node: (node.kind.startswith("resid"), -abs(estimates[node].mean())))
    strongest = _within_budget(ranked, 2 / 3 * row_runs, samples, info.n_layers)
    others = [node for node in nodes if node not in strongest]
    generator = torch.Generator().manual_seed(seed)
    shuffled = [others[number] for number in torch.randperm(len(others), generator=generator).tolist()]
    return strongest, _within_budget(shuffled, row_runs / 3, samples, info.n_layers)


def _within_budget(nodes: Iterable[Node], row_runs: float, samples: int, layers: int) -> list[Node]:
    """The first nodes whose exact patches in both directions take at most this many rows through all blocks."""
    affordable, spent = [], 0.0
    for node in nodes:
        spent += 2 * samples * (layers - node.layer) / layers
        if spent > row_runs:
            break
        affordable.append(node)
    return affordable


def _exact_changes(
    model: HookedModel, assigned: AssignedPairs, nodes: Sequence[Node], heads: Heads, direction: Direction
) -> dict[Node, Float[np.ndarray, " row"]]:
    """Exact changes of the score by node."""
    metric = sink_score_of(heads)
    return _changes([patch(model, pair, metric, nodes, direction) for pair in assigned.pairs])
