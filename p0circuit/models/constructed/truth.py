"""The ground truth of the constructed models."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from p0circuit.models.constructed.weights import (
    D_MLP,
    DECOY_HEADS,
    DETECTOR,
    HEADS,
    LAYERS,
    RECOGNITION_HEADS,
    RED_HERRING,
    SINK_NEURON,
    SINK_STRENGTHS,
    Edge,
    Head,
    Neuron,
    residual_subspaces,
    token_neurons,
)


@dataclass(frozen=True)
class Knockout:
    """Components set to zero at P0, and what the sink becomes.

    Attributes:
        nodes: names of the components.
        sink_remains: True if the sink scores stay the same; False if attention becomes uniform.
        tolerance: by which a sink score may differ from the expected one.
    """

    nodes: tuple[str, ...]
    sink_remains: bool
    tolerance: float


@dataclass(frozen=True, eq=False)
class WiredTruth:
    """The ground truth of the wired model.

    Nodes are `embed`, `attn.{layer}.{head}`, `mlp.{layer}` and `neuron.{layer}.{index}`; an edge goes from a node to a
    receiver: `attn.{layer}.{head}.k` (or `q`, `v`) or `mlp.{layer}`.

    Attributes:
        edges: the edges that distinguish the first position from others; path patching between clean and shifted
            prompts must find these.
        supply_edges: edges that the circuit needs at any position, since there must be a code to copy. The code of any
            token serves, so only zero ablation finds them.
        recognition_heads: the heads of step 1; each is necessary, and only both together are sufficient.
        detector_neurons: the neurons of step 2.
        sink_neurons: the neurons of step 3.
        sink_heads: the heads of step 4.
        sink_strengths: the score of P0 in each sink head, in order.
        decoy_heads: the heads of step 5.
        decoy_neurons: the neurons of step 5.
        p0_direction: what the sink neuron writes, [d_model].
        knockouts: what the sink becomes without components.
    """

    edges: frozenset[Edge]
    supply_edges: frozenset[Edge]
    recognition_heads: tuple[Head, ...]
    detector_neurons: tuple[Neuron, ...]
    sink_neurons: tuple[Neuron, ...]
    sink_heads: tuple[Head, ...]
    sink_strengths: tuple[float, ...]
    decoy_heads: tuple[Head, ...]
    decoy_neurons: tuple[Neuron, ...]
    p0_direction: Float[Tensor, " d_model"]
    knockouts: tuple[Knockout, ...]

    def sink_scores(self, length: int) -> tuple[float, ...]:
        """Return the sink score of each sink head, in order, if only P0 is recognised.

        Args:
            length: tokens per prompt.
        """
        return tuple(
            sum(1 / (1 + t * math.exp(-strength)) for t in range(length)) / length for strength in self.sink_strengths
        )

    def uniform_score(self, length: int) -> float:
        """Return the sink score of uniform attention, to which a head falls without the sink.

        Args:
            length: tokens per prompt.
        """
        return sum(1 / (t + 1) for t in range(length)) / length

    def candidate_edges(self, neurons: bool = True) -> tuple[Edge, ...]:
        """Return all edges that the architecture allows, true and false.

        Args:
            neurons: whether single neurons are senders too, and not MLPs only.
        """
        senders, receivers = [("embed", (-1, 1))], []
        for layer in range(LAYERS):
            heads = [f"attn.{layer}.{head}" for head in range(HEADS)]
            units = [f"neuron.{layer}.{index}" for index in range(D_MLP)] if neurons else []
            senders += [(name, (layer, 0)) for name in heads]
            senders += [(name, (layer, 1)) for name in [f"mlp.{layer}", *units]]
            receivers += [(f"{name}.{part}", (layer, 0)) for name in heads for part in "qkv"]
            receivers += [(f"mlp.{layer}", (layer, 1))]
        return tuple((s, r) for s, sender in senders for r, receiver in receivers if sender < receiver)


def wired_truth(seed: int = 0) -> WiredTruth:
    """Return the ground truth of `wired_model` with the same seed; it is the same for both position schemes.

    The tolerances of the knockouts are derived in the docstring of `constructed.weights`; they hold up to 64 tokens in
    float32.

    Args:
        seed: of the model.

    Example:
        ```python
        assert ("mlp.1", "attn.2.0.k") in wired_truth().edges
        ```
    """
    recognition = tuple(f"attn.0.{head}" for head in RECOGNITION_HEADS)
    detector, sink_neuron = f"neuron.0.{DETECTOR}", f"neuron.1.{SINK_NEURON}"
    decoy_neurons = ((0, RED_HERRING), *((layer, index) for layer in range(LAYERS) for index in token_neurons(layer)))

    edges = {*((head, "mlp.0") for head in recognition), ("mlp.0", "mlp.1"), (detector, "mlp.1")}
    edges |= {(sender, f"attn.2.{head}.k") for sender in ("mlp.1", sink_neuron) for head in SINK_STRENGTHS}

    destroying = [*((head,) for head in recognition), recognition, ("mlp.0",), (detector,), ("mlp.1",), (sink_neuron,)]
    heads = tuple(f"attn.{layer}.{head}" for layer, head in DECOY_HEADS)
    neurons = tuple(f"neuron.{layer}.{index}" for layer, index in decoy_neurons)
    harmless = [*((head,) for head in heads), neurons[:1], neurons, heads + neurons, ("mlp.2",)]

    return WiredTruth(
        edges=frozenset(edges),
        supply_edges=frozenset(("embed", f"{head}.v") for head in recognition),
        recognition_heads=tuple((0, head) for head in RECOGNITION_HEADS),
        detector_neurons=((0, DETECTOR),),
        sink_neurons=((1, SINK_NEURON),),
        sink_heads=tuple((2, head) for head in SINK_STRENGTHS),
        sink_strengths=tuple(SINK_STRENGTHS.values()),
        decoy_heads=tuple(DECOY_HEADS),
        decoy_neurons=decoy_neurons,
        p0_direction=residual_subspaces(seed).p0,
        knockouts=(
            *(Knockout(nodes, sink_remains=False, tolerance=1e-5) for nodes in destroying),
            *(Knockout(nodes, sink_remains=True, tolerance=1e-3) for nodes in harmless),
        ),
    )
