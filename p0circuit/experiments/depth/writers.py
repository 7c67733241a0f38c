"""Who writes a stage and who erases it: the component at P0, then its neurons, each verified by an exact patch.

1. *Candidates.* What a component writes at P0 along the stage's direction, as a share of the stream's projection.
   Writers are looked for before the stage's peak, erasers after it.
2. *Verification.* The candidate's output at P0 is replaced by that of the shifted run. A writer's patch has to take
   away    the excess score of the stage's heads. An eraser's patch has to leave more of the projection after it.
3. *Neurons* of an MLP: ranked by the change of their projection between the clean and the shifted run; the fewest that,
   patched together, have 80 % of the MLP's effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from p0circuit.experiments.depth.stages import Stage
from p0circuit.experiments.sink_under_study import excess_by_head, mean_over_heads
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.ablation import ablate
from p0circuit.interventions.nodes import InterventionError, Node, components
from p0circuit.interventions.pairs import PromptPair, values_at
from p0circuit.models import describe
from p0circuit.recording.quantities import residual_at
from p0circuit.recording.record import record
from p0circuit.stats import Interval, ratio_interval

CANDIDATES = 2
"""Components that are verified by a patch, for each stage and role."""
COUNTS = (1, 2, 4, 8, 16, 32)
"""Numbers of neurons that are patched together."""
OF_THE_EFFECT = 0.8
"""Share of the MLP's effect that its neurons must have."""


@dataclass(frozen=True)
class Role:
    """A component that writes or erases a stage.

    Attributes:
        stage: number of the stage, from 1.
        role: "writer" or "eraser".
        node: the component.
        share: what it writes along the stage's direction over the stream's projection at the stage's peak.
        effect: of a writer, the share of the excess of the stage's heads that goes with its output; of an eraser, the
            share of the projection that its output takes away.
        neurons: the fewest neurons of an MLP with 80 % of the effect; empty where there is no such small set.
    """

    stage: int
    role: str
    node: str
    share: Interval
    effect: Interval
    neurons: tuple[str, ...] = ()


def passes_of_roles(n_layers: int) -> float:
    """Passes over the measured rows: two stages are expected in a model of twelve layers or more, else one."""
    stages = 2 if n_layers >= 12 else 1
    # Clean and shifted values, the patches of both roles, and about half of the patches of neurons.
    return 3 + stages * (2 * CANDIDATES + len(COUNTS))


@torch.no_grad()
def find_roles(model: HookedModel, pair: PromptPair, stages: Sequence[Stage]) -> list[Role]:
    """Writers and erasers of every stage, with their neurons, from the strongest of each.

    Args:
        model: a hooked model.
        pair: clean and shifted runs.
        stages: as `find_stages` gives them.
    """
    roles: list[Role] = []
    nodes = components(model)
    clean, shifted = values_at(model, pair.clean, nodes), values_at(model, pair.shifted, nodes, pair.position)
    streams = record(model, pair.clean, residual_at()).double().numpy()
    excess = excess_by_head(model, pair.clean)[0]
    n_layers = describe(model).n_layers
    for number, stage in enumerate(stages, 1):
        peak = _peak(stage, streams)
        projection = streams[:, peak] @ stage.direction
        along = {node: _along(value, stage.direction) for node, value in clean.items()}
        stop = stages[number].first if number < len(stages) else n_layers
        start = 0 if number == 1 else stages[number - 2].last
        before = [node for node in nodes if node.kind != "embed" and start <= node.layer < peak]
        after = [node for node in nodes if node.kind != "embed" and peak <= node.layer < stop]
        own = mean_over_heads(excess, stage.heads)
        writers = sorted(before, key=lambda node: -float(along[node].mean()))[:CANDIDATES]
        for node in writers:
            patched = mean_over_heads(
                excess_by_head(model, pair.clean, [ablate(model, pair.clean, [node], shifted)])[0], stage.heads
            )
            share, effect = ratio_interval(along[node], projection), ratio_interval(own - patched, own)
            neurons = _neurons(model, pair, node, stage, own, effect.value) if effect.value > 0 else ()
            roles.append(Role(number, "writer", str(node), share, effect, neurons))
        erasers = sorted(after, key=lambda node: float(along[node].mean()))[:CANDIDATES]
        for node in erasers:
            if along[node].mean() >= 0:
                continue
            patch = ablate(model, pair.clean, [node], shifted)
            depth = node.layer + 1
            patched = record(model, pair.clean, residual_at(), interventions=[patch]).double().numpy()
            own_projection, without = streams[:, depth] @ stage.direction, patched[:, depth] @ stage.direction
            roles.append(
                Role(
                    number,
                    "eraser",
                    str(node),
                    ratio_interval(along[node], projection),
                    ratio_interval(without - own_projection, projection),
                )
            )
    return roles


def _peak(stage: Stage, streams: Float[np.ndarray, "sample depth d_model"]) -> int:
    """The depth of a stage at which the projection onto its direction is largest."""
    depths = range(stage.first, stage.last + 1)
    return max(depths, key=lambda depth: float((streams[:, depth] @ stage.direction).mean()))


def _along(value: Tensor, direction: Float[np.ndarray, " d_model"]) -> Float[np.ndarray, " sample"]:
    return value.double().cpu().numpy() @ direction


def _neurons(
    model: HookedModel, pair: PromptPair, node: Node, stage: Stage, own: Float[np.ndarray, " sample"], effect: float
) -> tuple[str, ...]:
    """The fewest of the strongest neurons of an MLP whose joint patch has 80 % of its effect; none where none has."""
    info = describe(model)
    if node.kind != "mlp" or info.experts:
        return ()
    neurons = [Node("neuron", node.layer, index) for index in range(info.d_mlp)]
    try:
        clean, shifted = values_at(model, pair.clean, neurons), values_at(model, pair.shifted, neurons, pair.position)
        weight = output_weights(model, node.layer)
    except InterventionError:
        return ()
    change = torch.stack([(clean[neuron] - shifted[neuron]).double().mean() for neuron in neurons]).cpu()
    along = change * (weight.double().cpu() @ torch.from_numpy(stage.direction))
    order = along.argsort(descending=True).tolist()
    for count in COUNTS:
        selected = [neurons[index] for index in order[:count]]
        patch = ablate(model, pair.clean, selected, {neuron: shifted[neuron] for neuron in selected})
        patched = mean_over_heads(excess_by_head(model, pair.clean, [patch])[0], stage.heads)
        if (own - patched).mean() >= OF_THE_EFFECT * effect * own.mean():
            return tuple(map(str, selected))
    return ()


def output_weights(model: HookedModel, layer: int) -> Float[Tensor, "d_mlp d_model"]:
    """The output matrix of an MLP, one row per neuron.

    Raises:
        InterventionError: the model's MLP has no such matrix.
    """
    weight = getattr(model.blocks[layer].mlp, "W_out", None)
    if not isinstance(weight, Tensor):
        raise InterventionError(f"{describe(model).name} has no output matrix in the MLP of block {layer}")
    return weight.detach()
