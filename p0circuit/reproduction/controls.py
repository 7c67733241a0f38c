"""Controls: models on which a claim must not be reproduced.

1. The model untrained: its own initial checkpoint, or its architecture with new weights.
2. The model with the neurons of every MLP shuffled.
3. A decoy whose P0 has a large norm, but no sink.

A fourth control, a random position in place of P0, is part of the experiments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeAlias

from p0circuit.hooked_model import HookedModel
from p0circuit.models import ModelError, describe, list_checkpoints, load_model
from p0circuit.models.controls import shuffled_neurons, untrained_weights
from p0circuit.prompts import PromptSet, random_tokens

DECOY = "decoy"
"""Name of the control that is another model."""
MAX_SAMPLES, MIN_SAMPLES = 128, 8
"""Bounds of the number of prompts of a control, which is otherwise a quarter of the prompts."""

Control: TypeAlias = Callable[[], AbstractContextManager[tuple[HookedModel, PromptSet]]]
"""Opens a control: a context manager that gives the model and prompts to measure."""


def controls_of(
    model: HookedModel, prompts: PromptSet, initial_checkpoint: HookedModel | None = None
) -> dict[str, Control]:
    """Return the controls of a model by name.

    Args:
        model: the model under study. Its weights are replaced while a control of it is open.
        prompts: the prompts of the run; a control takes the first quarter of them.
        initial_checkpoint: the model's own step-0 checkpoint; without it the untrained control gets new weights.
    """
    subset = prompts.subset(slice(0, min(MAX_SAMPLES, max(MIN_SAMPLES, prompts.n // 4))))

    @contextlib.contextmanager
    def untrained() -> Iterator[tuple[HookedModel, PromptSet]]:
        if initial_checkpoint is not None:
            yield initial_checkpoint, subset
        else:
            with untrained_weights(model):
                yield model, subset

    @contextlib.contextmanager
    def shuffled() -> Iterator[tuple[HookedModel, PromptSet]]:
        with shuffled_neurons(model):
            yield model, subset

    @contextlib.contextmanager
    def decoy() -> Iterator[tuple[HookedModel, PromptSet]]:
        other = load_model("wired-decoy", device=model.cfg.device)
        size = describe(other).vocab_size
        yield other, random_tokens(size, n=subset.n, length=subset.length, seed=prompts.seed)

    return {"untrained": untrained, "shuffled neurons": shuffled, DECOY: decoy}


def initial_checkpoint_of(source: str | Path, load: Callable[[int], HookedModel]) -> HookedModel | None:
    """Load the model's own initial (step-0) checkpoint; None if there is none.

    Args:
        source: name, directory or hub id of the model.
        load: loads the checkpoint of a step.
    """
    try:
        return load(0) if 0 in list_checkpoints(source) else None
    except ModelError:
        # A constructed model has no training, and the hub may be unreachable for a model in the local cache.
        return None
