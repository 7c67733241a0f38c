"""Measure one checkpoint of a run: loss, sink, norm and direction of P0, concentration and induction."""

from __future__ import annotations

import math
from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from p0circuit import sink
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.ablation import ablate
from p0circuit.interventions.pairs import patch_values, shifted_pair
from p0circuit.models import ModelError, describe
from p0circuit.models.vocabulary import sampleable_vocabulary
from p0circuit.prompts import PromptSet, from_ids, random_tokens
from p0circuit.recording.quantities import (
    NORM_RATIO,
    RESIDUAL_NORMS,
    SINK_SCORE,
    TOKEN_LOSSES,
    Batch,
    Quantity,
    residual_at,
    score_at,
)
from p0circuit.recording.record import record
from p0circuit.sink import CONTROL
from p0circuit.training.formation import EARLY_BLOCKS, lost_share, observed_concentration
from p0circuit.training.live_measurement import SHIFT


class CheckpointMeasurement(TypedDict):
    """What is measured of one checkpoint. Names shared with `live_measurement.Measurement` have the same definition.

    Attributes:
        loss: nats per token, without the prediction made at P0, which the TNLM loss does not train.
        sink_rate: share of (prompt, head) pairs with a sink score above 0.3.
        sink_rate_from_layer_2: the same from layer 2 on.
        norm_ratio: norm of P0 over the median of the other positions, after block 1.
        largest_norm_ratio: the largest norm ratio along the layers.
        direction_consistency: cosine of P0 with the mean P0 direction, after block 1.
        concentration_observed: share of P0's log-norm gain that blocks 0 and 1 write; None without a gain.
        concentration_causal: share of `sink_rate_from_layer_2` lost when P0's residual after block 1 is that of the
            shifted run; None without a sink to lose.
        induction_score: `induction_score` of the best head.
        scores_first_half: sink score by layer and head, on the first half of the prompts.
        excess_second_half: excess score by layer and head, on the second half.
    """

    loss: float
    sink_rate: float
    sink_rate_from_layer_2: float
    norm_ratio: float
    largest_norm_ratio: float
    direction_consistency: float
    concentration_observed: float | None
    concentration_causal: float | None
    induction_score: float
    scores_first_half: list[list[float]]
    excess_second_half: list[list[float]]


@torch.no_grad()
def measure_checkpoint(model: HookedModel, prompts: PromptSet) -> CheckpointMeasurement:
    """Measure the P0 sink of a checkpoint.

    Args:
        model: the checkpoint.
        prompts: the prompts, in two halves for choosing and for measuring sink heads.

    Raises:
        ModelError: the model has no blocks beyond the first two.
    """
    info = describe(model)
    if info.n_layers <= EARLY_BLOCKS:
        raise ModelError(
            f"{info.name} has {info.n_layers} layers; a trace needs blocks beyond the first {EARLY_BLOCKS}"
        )
    control = score_at(CONTROL)
    quantities = [SINK_SCORE, control, NORM_RATIO, RESIDUAL_NORMS, TOKEN_LOSSES, residual_at()]
    recording = record(model, prompts, quantities, cache=None)
    scores, ratios = recording[SINK_SCORE].double(), recording[NORM_RATIO].double().mean(0)
    half = prompts.n // 2
    consistency = sink.direction_cosines(recording[residual_at()]).double().mean(0)
    norms = recording[RESIDUAL_NORMS].double()[torch.arange(prompts.n), :, prompts.p0]
    return {
        "loss": float(mask_p0_losses(recording[TOKEN_LOSSES], prompts).double().nanmean()),
        "sink_rate": float(sink.sink_rate(scores).mean()),
        "sink_rate_from_layer_2": float(sink.sink_rate(scores, from_layer=EARLY_BLOCKS).mean()),
        "norm_ratio": float(ratios[EARLY_BLOCKS]),
        "largest_norm_ratio": float(ratios.max()),
        "direction_consistency": float(consistency[EARLY_BLOCKS]),
        "concentration_observed": observed_concentration(norms),
        "concentration_causal": causal_concentration(model, prompts, scores),
        "induction_score": induction_score(model, prompts),
        "scores_first_half": scores[:half].mean(0).tolist(),
        "excess_second_half": (scores - recording[control].double())[half:].mean(0).tolist(),
    }


def mask_p0_losses(losses: Float[Tensor, "sample pos"], prompts: PromptSet) -> Float[Tensor, "sample pos"]:
    """Replace the loss of the prediction made at P0 with NaN.

    Args:
        losses: next-token losses.
        prompts: the prompts they were measured on.
    """
    positions = torch.arange(losses.shape[1], device=losses.device)
    return losses.masked_fill(positions == prompts.p0.to(losses.device)[:, None], math.nan)


def causal_concentration(
    model: HookedModel, prompts: PromptSet, clean: Float[Tensor, "sample layer head"]
) -> float | None:
    """Return the share of `Sink[2:]` that is lost when P0's residual after block 1 is that of the shifted run.

    Args:
        model: the checkpoint.
        prompts: the prompts; in the shifted run each follows 8 random tokens.
        clean: sink scores without the intervention.

    Returns:
        The share; None where fewer than one head in a thousand is a sink.
    """

    def rate(scores: Float[Tensor, "sample layer head"]) -> float:
        return float(sink.sink_rate(scores.double(), from_layer=EARLY_BLOCKS).mean())

    def rate_with_shifted_residual() -> float:
        pair = shifted_pair(model, prompts, SHIFT, prompts.seed)
        node = f"resid_post.{EARLY_BLOCKS - 1}"
        intervention = ablate(model, prompts, [node], patch_values(model, pair, [node]))
        return rate(record(model, prompts, SINK_SCORE, cache=None, interventions=[intervention]))

    return lost_share(rate(clean), rate_with_shifted_residual)


def induction_score(model: HookedModel, prompts: PromptSet, rows: int = 32) -> float:
    """Return the induction score of the best head (Olsson et al. 2022, arXiv 2209.11895).

    It is the mean attention, in the second half of a repeated random sequence, to the token that followed the same
    token in the first half.

    Args:
        model: the checkpoint.
        prompts: decide the length of the sequences and the seed.
        rows: number of sequences.
    """
    vocabulary, special = sampleable_vocabulary(model)
    half = prompts.length // 2
    once = random_tokens(vocabulary, n=rows, length=half, seed=prompts.seed, special=special).ids
    twice = torch.cat([once, once], dim=1)
    repeated = from_ids(twice, torch.ones_like(twice, dtype=torch.bool), vocabulary)
    return float(record(model, repeated, INDUCTION, cache=None).mean(0).max())


def _induction(pattern: Float[Tensor, "batch head query key"], batch: Batch) -> Float[Tensor, "batch head"]:
    half = pattern.shape[-1] // 2
    return pattern.diagonal(1 - half, dim1=-2, dim2=-1)[..., 1:].mean(-1)


INDUCTION = Quantity("induction", ("attn.hook_pattern",), _induction)
"""[sample, layer, head] on repeated sequences: attention to the token after the same one in the first half."""
