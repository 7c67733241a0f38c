"""How large a reproduction is: the number of prompts by the size of the model, and an estimate of time and memory."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import torch
from safetensors import SafetensorError

from p0circuit.hooked_model import HookedModel
from p0circuit.models import describe, forward, load_model, named_model
from p0circuit.models.device_map import placement_of
from p0circuit.models.model_files import count_parameters
from p0circuit.models.names import CONSTRUCTED_MODELS
from p0circuit.models.source import resolve
from p0circuit.prompts import PromptSet
from p0circuit.recording.batch_size import batch_size_for

SAMPLES = 1024
"""Prompts of a full run."""
QUICK_SAMPLES, QUICK_SAMPLES_LARGE = 128, 32
"""Prompts of a quick run, and of a quick run of a large model."""
LARGE_PARAMETERS = 20_000_000
"""A model with more parameters is large: a quick run of it takes `QUICK_SAMPLES_LARGE` prompts."""
FORWARD_PASSES = 200
"""Approximate number of passes of all experiments, for an estimate made before the model is loaded."""
LONG_MINUTES = 20.0
"""If a run is estimated to take longer, the estimate names the options that make it shorter."""


def quick_samples(parameters: int) -> int:
    """Return the number of prompts of a quick run; only the size of the model decides.

    Args:
        parameters: number of the model's parameters.
    """
    return QUICK_SAMPLES if parameters <= LARGE_PARAMETERS else QUICK_SAMPLES_LARGE


def parameter_count(model: str | Path, checkpoint: str | int | None = None) -> int:
    """Return the number of a model's parameters, from the headers of its files wherever they can be read.

    A constructed model has no files: it is built and its parameters are counted.

    Args:
        model: name, directory, GGUF file or hub id, as `load_model` takes it.
        checkpoint: step, revision or label of a checkpoint.

    Raises:
        ModelError: there is no such model or checkpoint.
    """
    entry = named_model(str(model))
    if entry is not None:
        return entry.parameters
    # If the headers are damaged, loading the model raises an error that says so.
    with contextlib.suppress(SafetensorError):
        if model not in CONSTRUCTED_MODELS:
            return count_parameters(resolve(model, checkpoint).folder)
    return sum(weight.numel() for weight in load_model(model, checkpoint=checkpoint).parameters())


@torch.no_grad()
def run_estimate(model: HookedModel, prompts: PromptSet, passes: float) -> str:
    """Estimate the time and memory of a number of passes by timing one pass over a few prompts.

    Args:
        model: the model to run.
        prompts: the prompts of the run.
        passes: how often all prompts go through all blocks.

    Returns:
        One line, with prompts, passes, minutes and gigabytes.
    """
    # Offloaded weights are loaded once for every batch, so only the time of a full batch is representative.
    limit = 16 if placement_of(model) is None else prompts.n
    rows = min(prompts.n, limit, batch_size_for(model, prompts.length, with_logits=True))
    # Most experiments stop before the unembedding, and so does this pass.
    end = describe(model).n_layers
    forward(model, prompts.ids[:rows], prompts.attention_mask[:rows], stop_at_layer=end)
    started = time.perf_counter()
    forward(model, prompts.ids[:rows], prompts.attention_mask[:rows], stop_at_layer=end)
    minutes = passes * (time.perf_counter() - started) * prompts.n / rows / 60
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 2**30
    estimate = (
        f"{prompts.n} prompts of {prompts.length} tokens; about {passes:.0f} passes, {max(1, round(minutes))} min, "
        f"{weights + 1.5:.1f} GB"
    )
    if minutes > LONG_MINUTES:
        estimate += "; shorter with fewer --samples, a smaller --dtype, a --device, or only the first --layers"
    return estimate
