"""Results on disk: a result is measured only if the same measurement has not been saved before."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch

from p0circuit.experiments.base import Experiment
from p0circuit.hooked_model import HookedModel
from p0circuit.io import code_fingerprint
from p0circuit.prompts import PromptSet
from p0circuit.recording.fingerprint import weights_fingerprint
from p0circuit.results import Result


def run_or_read(
    experiment: Experiment[Any], model: HookedModel, prompts: PromptSet, directory: Path, figures: bool = True
) -> Result:
    """Return the experiment's result from `directory` if its key is the same; otherwise measure it and save it there.

    Args:
        experiment: the experiment, configured.
        model: the model to measure.
        prompts: the prompts to measure on.
        directory: folder of the run.
        figures: whether to draw figures of a new result.

    Raises:
        NotApplicable: there is nothing to measure on this model or these prompts.
    """
    key = result_key(experiment, model, prompts)
    with contextlib.suppress(ValueError, KeyError, TypeError):
        stored = Result.load(directory / f"{experiment.id}.json")
        if stored.provenance["key"] == key:
            return stored
    result = experiment.run(model, prompts, figures=figures)
    result.provenance["key"] = key
    result.save(directory)
    return result


def result_key(experiment: Experiment[Any], model: HookedModel, prompts: PromptSet) -> str:
    """Return a hash of everything that decides a result: weights, active hooks, prompts, configuration and code.

    Args:
        experiment: the experiment, configured.
        model: the model to measure.
        prompts: the prompts to measure on.
    """
    parts = {
        "weights": weights_fingerprint(model),
        "hooks": sorted(f"{name} {len(point.fwd_hooks)}" for name, point in model.hook_dict.items() if point.fwd_hooks),
        "prompts": prompts.fingerprint(),
        # Tokens that an experiment may put back at the end of a row when it removes BOS.
        "cut_off": None if prompts.overflow is None else prompts.overflow.tolist(),
        "config": repr(experiment.config),
        # The experiment may come from outside the package.
        "code": [code_fingerprint(), inspect.getsource(sys.modules[type(experiment).__module__])],
        "claim": repr(experiment.claim),
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
