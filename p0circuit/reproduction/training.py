"""The claims about training, tested on the traces of training runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from p0circuit.experiments import RUN_EXPERIMENTS
from p0circuit.experiments.training.runs_experiment import RunsExperiment
from p0circuit.reproduction.entries import control_entry, measure_entry, write_claims
from p0circuit.results import Result, write_manifest
from p0circuit.training.runs import Run

TRAINING = "training"
"""Directory of the claims about training, and their subject in place of a model's name."""
PLAIN = "baseline"
"""Variant whose runs are the control: plain text, and nothing that encourages a sink."""


def reproduce_training(runs: Sequence[Run], directory: Path) -> list[dict[str, Any]]:
    """Test the claims about training on the traces of runs, and on the control.

    Args:
        runs: training runs, as `training.runs.as_trained` returns them.
        directory: where results, claims.json and the manifest are written.

    Returns:
        The entries of claims.json.
    """
    started = time.time()
    (directory / "manifest.json").unlink(missing_ok=True)
    entries: list[dict[str, Any]] = []
    for experiment in (kind() for kind in RUN_EXPERIMENTS.values()):
        entry, _ = measure_entry(experiment, TRAINING, partial(_run_and_save, experiment, runs, directory), directory)
        control, _ = measure_entry(
            experiment,
            TRAINING,
            partial(experiment.run, runs, PLAIN),
            directory / "controls" / "plain-text",
            "control, plain text: ",
        )
        entries.append(entry | {"quantisation": None, "controls": [control_entry("plain text", control)]})
        write_claims(directory, entries)
    without_result = [entry for entry in entries if entry["verdict"] == "not applicable"]
    write_manifest(
        directory,
        sys.argv[1:],
        started,
        model=TRAINING,
        runs=[f"{run.name} ({run.first})" for run in runs],
        experiments=[entry["experiment"] for entry in entries if entry not in without_result],
        left_out={entry["experiment"]: entry["why"] for entry in without_result if not entry["error"]},
        broken={entry["experiment"]: entry["error"] for entry in without_result if entry["error"]},
    )
    return entries


def _run_and_save(experiment: RunsExperiment, runs: Sequence[Run], directory: Path) -> Result:
    # If the experiment raises, the result of an earlier run must not be taken for its own.
    (directory / f"{experiment.id}.json").unlink(missing_ok=True)
    result = experiment.run(runs)
    result.save(directory)
    return result
