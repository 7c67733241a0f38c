"""Every experiment on one model, and every claim on its controls.

1. The condition is chosen: text as it is, or text after BOS if the model has its sink only there.
2. One clean recording serves all experiments.
3. The experiments run one after the other. Each result is saved before the next experiment starts; a result of the same
   weights, prompts, configuration and code is read instead of measured again.
4. The claims about blocks 0 and 1 are measured with the blocks where the circuit was found, beside their verdicts.
5. The claims are tested on the controls, where they must not be reproduced.
6. The manifest is written last, so its presence means that the run is complete.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from p0circuit.experiments import EXPERIMENTS, Depth
from p0circuit.experiments.base import Experiment, is_large
from p0circuit.experiments.clean_recording import CLEAN_PASSES, record_clean
from p0circuit.experiments.sink_condition import SinkCondition, find_condition
from p0circuit.hooked_model import HookedModel
from p0circuit.log import report_progress
from p0circuit.models import ModelError, ModelInfo, describe, device_of
from p0circuit.models.passes import PassCount, count_passes
from p0circuit.prompts import PromptSet
from p0circuit.recording.fingerprint import weights_fingerprint
from p0circuit.recording.memory import remember_rows
from p0circuit.reproduction.controls import DECOY, controls_of
from p0circuit.reproduction.cost import run_estimate
from p0circuit.reproduction.entries import Outcome, control_entry, measure_entry, write_claims
from p0circuit.reproduction.located import depends_on_blocks, located_blocks, located_note, located_row, with_blocks
from p0circuit.reproduction.stored import run_or_read
from p0circuit.results import Result, write_manifest


def reproduce_model(
    model: HookedModel,
    prompts: PromptSet,
    directory: Path,
    experiments: Sequence[Experiment[Any]],
    initial_checkpoint: HookedModel | None = None,
    controls: bool = True,
) -> list[dict[str, Any]]:
    """Run experiments on one model, and their claims on its controls; save everything in a directory.

    If an experiment raises, its error is stored in its claim's entry and the others go on (see `failed_claims`).

    Args:
        model: the model under study.
        prompts: natural text without BOS. BOS is prepended if the model has its sink only after BOS.
        directory: folder of the run: results, claims.json, manifest.json.
        experiments: the experiments, configured.
        initial_checkpoint: the model's own step-0 checkpoint (`initial_checkpoint_of`), for the untrained control.
            Without it the control is the same architecture with new weights.
        controls: whether to test the claims on the controls.

    Returns:
        The entries of claims.json.
    """
    started = time.time()
    (directory / "manifest.json").unlink(missing_ok=True)
    info = describe(model)
    with count_passes() as count:
        condition = find_condition(model, prompts)
    prompts = condition.prompts
    report_progress(condition.summary)
    passes = _PassTable(model, prompts, experiments)
    passes.add("condition", count)
    report_progress(f"{info.title}: {run_estimate(model, prompts, CLEAN_PASSES + passes.declared_by_experiments)}")
    entries: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    broken: dict[str, str] = {}
    depth: Result | None = None
    with remember_rows():
        with count_passes() as count:
            record_clean(model, prompts)
        passes.add("clean recording", count)
        for number, experiment in enumerate(experiments, 1):
            label = f"{number}/{len(experiments)} "
            measure = partial(run_or_read, experiment, model, prompts, directory)
            with count_passes() as count:
                outcome = measure_entry(experiment, info.name, measure, directory, label)
            passes.add(experiment.id, count, outcome)
            entry = outcome.entry
            if experiment.claim is not None:
                entries.append(entry | {"quantisation": info.quantisation, "controls": []})
            if entry["error"]:
                broken[experiment.id] = entry["error"]
            elif entry["verdict"] == "not applicable":
                left_out[experiment.id] = entry["why"]
            write_claims(directory, entries)
            if experiment.id == Depth.id and outcome.result is not None:
                depth = outcome.result
        if depth is not None:
            _measure_located(model, prompts, directory, experiments, entries, passes, depth)
    if controls:
        _test_controls(model, prompts, directory, experiments, entries, passes, initial_checkpoint)
    write_manifest(
        directory,
        sys.argv[1:],
        started,
        **_description(model, condition, experiments),
        experiments=[experiment.id for experiment in experiments if experiment.id not in left_out | broken],
        left_out=left_out,
        broken=broken,
        passes=passes.rows,
        passes_of_this_run=round(passes.of_this_run, 2),
    )
    seconds = time.time() - started
    report_progress(f"{info.title}: {passes.of_this_run:.1f} passes over {prompts.n} prompts in {seconds:.0f} s")
    return entries


def _measure_located(
    model: HookedModel,
    prompts: PromptSet,
    directory: Path,
    experiments: Sequence[Experiment[Any]],
    entries: list[dict[str, Any]],
    passes: _PassTable,
    depth: Result,
) -> None:
    """Add to the claims about blocks 0 and 1 what is measured with the blocks where the circuit was found."""
    blocks, subject = located_blocks(depth), describe(model).name
    by_experiment = {entry["experiment"]: entry for entry in entries}
    for experiment in experiments:
        entry = by_experiment.get(experiment.id)
        if entry is None or entry["error"] or not depends_on_blocks(experiment):
            continue
        variant, measured_entry = experiment, entry
        if blocks and blocks != experiment.blocks:
            variant = with_blocks(experiment, blocks)
            measure = partial(run_or_read, variant, model, prompts, directory / "located", figures=False)
            with count_passes() as count:
                outcome = measure_entry(variant, subject, measure, directory / "located", "with the blocks of C21: ")
            passes.add(f"{experiment.id}, located", count, outcome)
            measured_entry = outcome.entry
        row = located_row(variant, blocks, measured_entry)
        entry["located"] = row
        entry["notes"] = [*entry["notes"], located_note(row)]
    write_claims(directory, entries)


def _test_controls(
    model: HookedModel,
    prompts: PromptSet,
    directory: Path,
    experiments: Sequence[Experiment[Any]],
    entries: list[dict[str, Any]],
    passes: _PassTable,
    initial_checkpoint: HookedModel | None,
) -> None:
    """Test the claims on the controls, and add the verdicts to their entries."""
    testing = [experiment for experiment in experiments if experiment.claim is not None]
    large = is_large(describe(model))
    for name, open_control in controls_of(model, prompts, initial_checkpoint).items():
        folder = directory / "controls" / name.replace(" ", "-")
        try:
            with open_control() as (control, control_prompts), remember_rows():
                subject = describe(control).name
                for experiment, entry in zip(testing, entries, strict=True):
                    if large and not experiment.needs_control:
                        continue
                    measure = partial(run_or_read, experiment, control, control_prompts, folder, figures=False)
                    with count_passes() as count:
                        outcome = measure_entry(experiment, subject, measure, folder, f"control, {name}: ")
                    entry["controls"].append(control_entry(name, outcome.entry))
                    # The blocks of the decoy are smaller than those of the model, so its passes are not comparable.
                    if name != DECOY:
                        passes.add(f"control, {name}", count, outcome)
        except ModelError as reason:
            report_progress(f"control, {name}: left out: {reason}")
        write_claims(directory, entries)


class _PassTable:
    """Passes of each part of a run: with the full configuration, declared, and used.

    `used` is what a result took when it was measured, also if this run read it from disk; `of_this_run` is what this
    run took itself.
    """

    def __init__(self, model: HookedModel, prompts: PromptSet, experiments: Sequence[Experiment[Any]]) -> None:
        self._prompts, self._info = prompts, describe(model)
        self._declared = {experiment.id: experiment.passes(model, prompts) for experiment in experiments}
        self._full = {
            name: EXPERIMENTS[name]().passes(model, prompts) for name in self._declared if name in EXPERIMENTS
        }
        self.declared_by_experiments = sum(self._declared.values())
        self.rows: dict[str, dict[str, float | None]] = {}
        self.of_this_run = 0.0

    def add(self, name: str, count: PassCount, outcome: Outcome | None = None) -> None:
        """Add what was counted, or what the outcome's result says it took, to a row of the table."""
        counted = count.passes(self._prompts.n, self._prompts.length, self._info.n_layers)
        self.of_this_run += counted
        used = counted
        if outcome is not None and outcome.result is not None:
            provenance = outcome.result.provenance
            # A control has fewer prompts; its passes are converted to passes over all prompts of the run.
            prompts = provenance["samples"] * provenance["length"] / (self._prompts.n * self._prompts.length)
            used = provenance["passes"]["used"] * prompts * provenance["model"]["n_layers"] / self._info.n_layers
        row = self.rows.setdefault(
            name, {"full": self._full.get(name), "declared": self._declared.get(name), "used": 0.0}
        )
        row["used"] = (row["used"] or 0.0) + used


def _description(
    model: HookedModel, condition: SinkCondition, experiments: Sequence[Experiment[Any]]
) -> dict[str, Any]:
    """Return the part of the manifest that describes model and prompts."""
    info, prompts = describe(model), condition.prompts
    return {
        "model": info.name,
        "quantisation": info.quantisation,
        "weights": weights_fingerprint(model),
        "prompts": prompts.fingerprint(),
        "text": prompts.description.get("source", prompts.description.get("builder")),
        "samples": prompts.n,
        "length": prompts.length,
        "condition": condition.to_json(),
        "quick": _is_quick(info, experiments),
        "seed": prompts.seed,
        "device": str(device_of(model)),
    }


def _is_quick(info: ModelInfo, experiments: Sequence[Experiment[Any]]) -> bool:
    """Whether a large model's experiments had smaller configurations; the commands for single experiments repeat it."""
    return is_large(info) and all(experiment.quick(info).config == experiment.config for experiment in experiments)
