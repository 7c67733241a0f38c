"""`reproduce`: from the name of a model to its claims and its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from p0circuit.experiments import EXPERIMENTS, find_experiment
from p0circuit.experiments.base import Experiment
from p0circuit.experiments.conditions import pooled_prompts_for
from p0circuit.hooked_model import HookedModel
from p0circuit.models import ModelInfo, describe, load_model
from p0circuit.report.contents import Reproduction, find_reproductions
from p0circuit.report.html import write_report
from p0circuit.reproduction.controls import initial_checkpoint_of
from p0circuit.reproduction.cost import SAMPLES, parameter_count, quick_samples
from p0circuit.reproduction.model import reproduce_model


def reproduce(
    model: str | Path | HookedModel,
    claims: Sequence[str] | None = None,
    out: str | Path = "out",
    *,
    text: str | None = None,
    samples: int | None = None,
    length: int = 64,
    seed: int = 0,
    quick: bool = False,
    controls: bool = True,
    initial_checkpoint: HookedModel | None = None,
) -> Reproduction:
    """Test claims on one model and on its controls, and write claims, figures and a report to `out`/MODEL.

    It does what `p0circuit reproduce MODEL` does. Results that are in `out` already are read, not measured again.

    Args:
        model: name, directory, GGUF file or hub id of a model, or a loaded model.
        claims: ids of claims, as in "C1", or of experiments, as in "sink-map"; all experiments if None.
        out: directory of all runs.
        text: docs, english, code, stdlib, or a text file or directory; chosen by the model if None.
        samples: number of prompts. If None: 1,024, or with `quick` 128, or 32 for a model of more than 20 million
            parameters.
        length: tokens per prompt.
        seed: first of the three seeds of the prompts.
        quick: whether to take fewer prompts, and smaller configurations for a large model.
        controls: whether to test the claims on controls too.
        initial_checkpoint: the model's own step-0 checkpoint, for the untrained control. If `model` is a name, it is
            found by itself.

    Returns:
        The run as it is on disk: `claims` (entries of claims.json), `results` by experiment, `directory`.

    Raises:
        P0Error: there is no such model, claim or text, or the text is too short.

    Example:
        run = reproduce("p0-nano", claims=["C1", "C8"], out="out", quick=True)
        for claim in run.claims:
            print(claim["id"], claim["verdict"], claim["why"])
    """
    # Errors in the names of claims are raised before the model is loaded.
    selected = select_experiments(claims)
    if isinstance(model, (str, Path)):
        source, parameters = model, parameter_count(model)
        loaded = load_model(source)
        initial_checkpoint = initial_checkpoint or initial_checkpoint_of(
            source, lambda step: load_model(source, checkpoint=step)
        )
    else:
        loaded, parameters = model, sum(weight.numel() for weight in model.parameters())
    info = describe(loaded)
    prompts = pooled_prompts_for(
        loaded, text, samples or (quick_samples(parameters) if quick else SAMPLES), length, seed
    )
    directory = run_directory(out, info)
    reproduce_model(
        loaded,
        prompts,
        directory,
        quick_experiments(selected, info) if quick else selected,
        initial_checkpoint,
        controls,
    )
    write_report(directory)
    return find_reproductions(directory)[0]


def select_experiments(names: Sequence[str] | None = None) -> list[Experiment[Any]]:
    """Return experiments in their default configuration.

    Args:
        names: ids of claims or of experiments; every experiment on a model if None.

    Raises:
        P0Error: there is no such experiment, or it is about training runs.
    """
    return [kind() for kind in EXPERIMENTS.values()] if names is None else [find_experiment(name) for name in names]


def quick_experiments(experiments: Sequence[Experiment[Any]], info: ModelInfo) -> list[Experiment[Any]]:
    """Return the experiments as a quick run of a model has them.

    Args:
        experiments: the experiments.
        info: description of the model, whose size decides.
    """
    return [experiment.quick(info) for experiment in experiments]


def run_directory(out: str | Path, info: ModelInfo) -> Path:
    """Return the directory of a model's run.

    Args:
        out: directory of all runs.
        info: description of the model.
    """
    return Path(out) / info.name.replace("/", "--")
