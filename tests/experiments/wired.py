"""Prompts for the wired models, their sink scores by construction, and a variant with the sink in its embedding."""

from __future__ import annotations

import math

import numpy as np
import torch

from p0circuit.hooked_model import HookedModel
from p0circuit.models.bridge import to_bridge
from p0circuit.models.constructed.build import wired_huggingface
from p0circuit.models.constructed.truth import wired_truth
from p0circuit.models.constructed.weights import purity, residual_subspaces
from p0circuit.models.hooked_transformer import has_hooked_transformer, to_hooked
from p0circuit.prompts import PromptSet, from_ids


def distinct(n: int, length: int, seed: int = 0) -> PromptSet:
    """Rows of different tokens, on which the wired model recognises nothing but P0."""
    generator = torch.Generator().manual_seed(seed)
    return from_ids(torch.stack([torch.randperm(64, generator=generator)[:length] for _ in range(n)]))


def predicted_scores(ids: torch.Tensor, position: int, also: int | None = None) -> np.ndarray:
    """The attention of the wired sink heads to a position of each row, by construction.

    All positions of purity above 3/4 are recognised as P0 and share the sink with each other and with `also`.
    """
    recognised = purity(ids) > 0.75
    if also is not None:
        recognised[:, also] = True
    seen = torch.arange(1, ids.shape[1] + 1)
    count = recognised.cumsum(1)
    scores = []
    for strength in wired_truth().sink_strengths:
        weight = torch.where(recognised[:, position], math.exp(strength), 1.0)[:, None]
        scores.append((weight / (count * math.exp(strength) + seen - count))[:, position:].mean(1))
    return torch.stack(scores).mean(0).numpy()


def embedded_sink() -> HookedModel:
    """The wired model without MLP outputs, the P0 direction being part of the embedding of position 0."""
    module = wired_huggingface("learned")
    with torch.no_grad():
        module.transformer.wpe.weight[0] += 60 * residual_subspaces().p0.float()
        for block in module.transformer.h:
            block.mlp.c_proj.weight.zero_()
    return to_hooked(module, "embedded") if has_hooked_transformer() else to_bridge(module, "embedded")
