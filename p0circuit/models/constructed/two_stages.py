"""A second constructed model, whose P0 has two stages: its direction is written, erased, and written again.

Blocks 0 to 2 are those of the wired model (`weights.py`): recognition, detection, the first amplifier in MLP 1, and
sink heads in layer 2. Three blocks follow:

- *Block 3, the eraser.* One neuron of its MLP reads the direction `p0`. At P0 its cosine is
  `60 / sqrt(2 + 9 + 9 + 60^2) = 0.997`; the neuron is 0 up to a cosine of 0.5 and 1 at that value, and writes -60 times
  `p0`. Decoys make the first amplifier write a little less than 60, so less than a tenth of it remains, with the
  opposite sign. No head reads it.
- *Block 4, the second amplifier.* `mark` remains at P0, since nothing erases it. A neuron like the first sink neuron
  reads it and writes 60 times `second_p0`, a direction orthogonal to `p0`.
- *Block 5, the second readers.* Three heads read `second_p0` as the first sink heads read `p0`.

The ground truth: there are two stages, after blocks 1 to 2 and after blocks 4 to 5. The cosine between their directions
is 0, up to what remains of `p0`. Recognition happens in block 0 alone, so the circuit's depth is 1. Later blocks
recognise nothing, so what is removed after block 0 is not restored. Layers 3 and 4 have no sink head.

Source: our own construction, on the design of `weights.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from p0circuit.hooked_model import HookedModel
from p0circuit.models.constructed.build import model_from_weights
from p0circuit.models.constructed.weights import (
    D_HEAD,
    ECHO,
    MARK,
    MARK_THRESHOLD,
    P0_NORM,
    RULER,
    SINK_NEURON,
    SINK_STRENGTHS,
    Head,
    Neuron,
    Weights,
    blank_weights,
    residual_subspaces,
    set_neuron,
    wired_weights,
)
from p0circuit.models.errors import ModelError
from p0circuit.models.info import Positions

N_LAYERS = 6
ERASER, SECOND_SINK_NEURON = 77, 51
ERASER_THRESHOLD = 0.5


@dataclass(frozen=True)
class TwoStagesTruth:
    """The ground truth of the two-stage model.

    Attributes:
        stages: first and last depth of each stage; depth i is after block i - 1.
        writers: the neuron that writes each stage.
        erasers: the neurons that erase a stage.
        sink_heads: the heads that read each stage.
        circuit_depth: number of first blocks in which recognition happens.
        cosine: between the directions of the two stages.
    """

    stages: tuple[tuple[int, int], ...] = ((2, 3), (5, 6))
    writers: tuple[Neuron, ...] = ((1, SINK_NEURON), (4, SECOND_SINK_NEURON))
    erasers: tuple[Neuron, ...] = ((3, ERASER),)
    sink_heads: tuple[tuple[Head, ...], ...] = tuple(
        tuple((layer, head) for head in SINK_STRENGTHS) for layer in (2, 5)
    )
    circuit_depth: int = 1
    cosine: float = 0.0


def two_stages_weights(*, seed: int = 0) -> Weights:
    """Construct all weights with rotary positions, in float64, with HookedTransformer's names and shapes.

    Args:
        seed: rotates the residual stream; the circuit stays the same.
    """
    space, square = residual_subspaces(seed), 1 + RULER**2 + ECHO**2 + MARK**2
    weights = blank_weights(N_LAYERS) | wired_weights("rotary", seed=seed)
    gain = 1 / (P0_NORM / math.sqrt(square + P0_NORM**2) - ERASER_THRESHOLD)
    set_neuron(weights, 3, ERASER, reads=gain * space.p0, bias=-gain * ERASER_THRESHOLD, writes=-P0_NORM * space.p0)
    gain = 1 / (MARK / math.sqrt(square) - MARK_THRESHOLD)
    set_neuron(
        weights,
        4,
        SECOND_SINK_NEURON,
        reads=gain * space.mark,
        bias=-gain * MARK_THRESHOLD,
        writes=P0_NORM * space.second_p0,
    )
    for head, strength in SINK_STRENGTHS.items():
        weights["blocks.5.attn.b_Q"][head, -1] = 1.0
        weights["blocks.5.attn.W_K"][head, :, -1] = strength * math.sqrt(D_HEAD) * space.second_p0
    return weights


def two_stages_model(
    positions: Positions = "rotary",
    *,
    seed: int = 0,
    backend: str = "auto",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> HookedModel:
    """Build the model with two stages: 6 layers, 5 heads of 32, d_model 160, 64 tokens, 256 positions.

    Args:
        positions: "rotary"; there is no other.
        seed: rotates the residual stream; the circuit stays the same.
        backend: "auto", "hooked" or "bridge".
        dtype: of the weights.
        device: of the weights.

    Returns:
        A hooked model in eval mode, named `wired-two-stages`.

    Raises:
        ModelError: for other positions, and for a backend that TransformerLens does not have.
    """
    if positions != "rotary":
        raise ModelError(f"positions={positions!r}, but the two-stage model exists with 'rotary' only")
    return model_from_weights(
        two_stages_weights(seed=seed), "wired-two-stages", "rotary", backend=backend, dtype=dtype, device=device
    )
