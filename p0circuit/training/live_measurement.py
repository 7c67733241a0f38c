"""Measure P0 in a model that is being trained, without changing the model or the training.

1. The prompts run once, with hooks on the decoder layers (`layer_hooks.py`). Each layer's attention is reduced to sink
   scores as soon as it is computed.
2. For the causal concentration the prompts run again, with P0's stream after block 1 taken from the shifted run. The
   stream at a position depends on earlier positions only, so the shifted run is the prefix and that token alone.
3. The state of the model, of training and of the random generators is restored (`model_state.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from p0circuit import sink
from p0circuit.errors import NotFiniteError
from p0circuit.models.errors import ModelError
from p0circuit.sink import CONTROL, sink_heads
from p0circuit.training.decoder import Decoder, decoder_of
from p0circuit.training.formation import EARLY_BLOCKS, lost_share, observed_concentration
from p0circuit.training.layer_hooks import run_layers
from p0circuit.training.model_state import preserve_model_state

SHIFT = 8
"""Number of random tokens before P0's token in the shifted run."""


@dataclass(frozen=True)
class Measurement:
    """The P0 sink of a model at one moment of its training, as means over the prompts.

    Norms and directions are those of the residual stream.

    Attributes:
        sink_rate: share of (prompt, head) pairs with a sink score above 0.3 (Gu et al. 2025, section 3).
        sink_rate_from_layer_2: the same from layer 2 on, `Sink[2:]`; None where no such layer has attention.
        norm_ratio: norm at P0 over the median norm of the other positions, after block 1.
        largest_norm_ratio: the largest norm ratio before any block or after the last.
        direction_consistency: cosine of P0 with the mean P0 direction of all prompts, after block 1.
        concentration_observed: share of P0's gain in log norm, from the embedding to its largest norm, that blocks 0
            and 1 write. It is negative where they reduce the norm, and None where the norm grows by less than a tenth.
        concentration_causal: share of `Sink[2:]` that is lost when P0's stream after block 1 is replaced with that of
            the same token after 8 random ones. It is negative where the rate grows, as it may while few heads are above
            0.3, and None where fewer than one head in a thousand is.
        excess: sink score of P0 minus that of position 8, in the heads with the highest sink scores
            (`sink.sink_heads`), which are selected on the even prompts and measured on the odd ones.
    """

    sink_rate: float
    sink_rate_from_layer_2: float | None
    norm_ratio: float
    largest_norm_ratio: float
    direction_consistency: float
    concentration_observed: float | None
    concentration_causal: float | None
    excess: float


@dataclass(frozen=True)
class _Pass:
    """What one pass over the prompts gave; `attention_layers` are the layers that have attention."""

    attention_layers: list[int]
    scores: Float[Tensor, "batch layer head"]
    control: Float[Tensor, "batch layer head"]
    at_p0: Float[Tensor, "batch depth d_model"]
    ratios: Float[Tensor, "batch depth"]

    def sink_rate(self, from_layer: int = 0) -> float | None:
        below = sum(layer < from_layer for layer in self.attention_layers)
        if below == len(self.attention_layers):
            return None
        return float(sink.sink_rate(self.scores, from_layer=below).mean())


def _observe(
    decoder: Decoder,
    ids: Int[Tensor, "batch pos"],
    replacement: tuple[int, Float[Tensor, "batch d_model"]] | None = None,
) -> _Pass:
    """One pass; `replacement` is a depth and P0's stream at that depth.

    Raises:
        ModelError: no attention was computed.
        NotFiniteError: the stream at P0 is not finite.
    """
    scores: dict[int, tuple[Tensor, Tensor]] = {}
    at_p0: list[Tensor] = []
    ratios: list[Tensor] = []
    # The prompts are not padded, so P0 is position 0.
    p0 = torch.zeros(len(ids), dtype=torch.long, device=ids.device)

    def attention(layer: int, pattern: Tensor) -> None:
        precise = pattern.to(torch.promote_types(pattern.dtype, torch.float32))
        positions = p0.to(pattern.device), p0.to(pattern.device) + CONTROL
        first, control = (sink.sink_score(precise, position).cpu() for position in positions)
        scores[layer] = first, control

    def stream(depth: int, residual: Tensor) -> Tensor | None:
        replaced = None
        if replacement is not None and replacement[0] == depth:
            replaced = residual.clone()
            replaced[:, 0] = replacement[1].to(residual)
            residual = replaced
        at_p0.append(residual[:, 0].float().cpu())
        ratios.append(sink.norm_ratio(residual, p0.to(residual.device)).cpu())
        return replaced

    run_layers(decoder, ids, stream, attention)
    if not all(bool(vector.isfinite().all()) for vector in at_p0):
        raise NotFiniteError("the residual stream at P0 is not finite: the weights, or what they compute, are not")
    if not scores:
        raise ModelError(
            f"no attention seen in {type(decoder.model).__name__}: expected layers that compute it through a model of "
            "transformers, through torch's scaled_dot_product_attention, or in a module that returns (output, weights)"
        )
    by_position = zip(*(scores[layer] for layer in sorted(scores)), strict=True)
    first, control = (torch.stack(list(parts), dim=1) for parts in by_position)
    return _Pass(sorted(scores), first, control, torch.stack(at_p0, dim=1), torch.stack(ratios, dim=1))


def _last_position(decoder: Decoder, ids: Int[Tensor, "batch pos"], depth: int) -> Float[Tensor, "batch d_model"]:
    """The stream at the last position after `depth` layers."""
    streams: list[Tensor] = []

    def stream(at: int, residual: Tensor) -> None:
        if at == depth:
            streams.append(residual[:, -1].clone())

    run_layers(decoder, ids, stream, depth=depth)
    return streams[0]


def measure(model: nn.Module, ids: Int[Tensor, "batch pos"], prefix: Int[Tensor, "batch shift"]) -> Measurement:
    """Measure the P0 sink of a causal language model, without changing anything about the model.

    The numbers equal those of `checkpoint_measurement.measure_checkpoint` on the same prompts, under the same names.

    Args:
        model: a causal language model, possibly wrapped for training.
        ids: token ids of the prompts, without padding.
        prefix: random tokens that precede each prompt's first token in the shifted run.

    Raises:
        ModelError: the model is not causal, or its layers or its attention cannot be read.
        NotFiniteError: the stream at P0 is not finite.
    """
    decoder = decoder_of(model)
    device = next(decoder.model.parameters()).device
    ids, prefix = ids.to(device), prefix.to(device)
    depth = min(EARLY_BLOCKS, len(decoder.layers))

    def rate_with_shifted_stream() -> float:
        shifted = _last_position(decoder, torch.cat([prefix, ids[:, :1]], dim=1), depth)
        return _observe(decoder, ids, (depth, shifted)).sink_rate(EARLY_BLOCKS) or 0.0

    with preserve_model_state(decoder.model):
        clean = _observe(decoder, ids)
        later = clean.sink_rate(EARLY_BLOCKS)
        causal = lost_share(later or 0.0, rate_with_shifted_stream)
    heads = sink_heads(clean.scores[::2])
    layers, numbers = (list(part) for part in zip(*heads, strict=True))
    return Measurement(
        sink_rate=clean.sink_rate() or 0.0,
        sink_rate_from_layer_2=later,
        norm_ratio=float(clean.ratios[:, depth].mean()),
        largest_norm_ratio=float(clean.ratios.mean(0).max()),
        direction_consistency=float(sink.direction_cosines(clean.at_p0[:, depth]).mean()),
        concentration_observed=observed_concentration(clean.at_p0.norm(dim=-1), depth),
        concentration_causal=causal,
        excess=float((clean.scores - clean.control)[1::2, layers, numbers].mean()),
    )
