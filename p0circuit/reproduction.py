"""The whole reproduction of one model: every experiment, the controls, and `claims.json`.

1. One clean recording is made for all experiments; what they will take, in passes, is said before they start.
2. Every experiment runs on the model's prompts; its result is on disk before the next one starts. A result that is
   there already, of the same weights, prompts, settings and code, is read instead of measured again.
3. The claims run again where they must fail: on the model untrained, on the model with its neurons shuffled, and on
   the decoy, whose P0 has a high norm and no sink. (A random position instead of P0 is a control inside each claim.)
4. Every claim gets its entry in `claims.json`. If an experiment raises, its error is stored there, its traceback in
   `<experiment>.traceback.txt` beside, and the others go on.

    <out>/<model>/<experiment>.json, tables/, figures/      <out>/<model>/claims.json, report.html, report.md
    <out>/<model>/controls/<control>/<experiment>.json      <out>/<model>/manifest.json (last: the run came to its end)
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from p0circuit.experiments import EXPERIMENTS, RUN_EXPERIMENTS
from p0circuit.experiments.base import Experiment, NotApplicable, is_large
from p0circuit.experiments.clean_recording import CLEAN_PASSES, record_clean
from p0circuit.experiments.sink_condition import find_condition
from p0circuit.experiments.training.runs_experiment import RunsExperiment
from p0circuit.hooked_model import HookedModel
from p0circuit.io import code_fingerprint, write_atomically, write_json
from p0circuit.log import report_progress
from p0circuit.models import ModelError, describe, device_of, forward, list_checkpoints, load_model
from p0circuit.models.controls import shuffled_neurons, untrained_weights
from p0circuit.models.device_map import placement_of
from p0circuit.models.memory import return_freed_memory
from p0circuit.models.passes import count_passes
from p0circuit.prompts import PromptSet, random_tokens
from p0circuit.recording.batch_size import batch_size_for
from p0circuit.recording.fingerprint import weights_fingerprint
from p0circuit.recording.memory import remember_rows
from p0circuit.results import Judgement, Result, claim_entry, write_manifest
from p0circuit.training.runs import Run

SAMPLES = 1024
"""Prompts of a full run."""
QUICK_SAMPLES, QUICK_SAMPLES_LARGE, LARGE_PARAMETERS = 128, 32, 20_000_000
CONTROL_SAMPLES = 128
"""The most prompts of a control, which takes a quarter of the prompts: enough to see that there is nothing."""
FEWEST_CONTROL_SAMPLES = 8
FORWARD_PASSES = 200
"""About how many forward passes over all prompts the experiments amount to, before a model is loaded and known."""
LONG_MINUTES = 20.0
"""From here on a person is told how to make it shorter."""


def reproduce(
    model: HookedModel,
    prompts: PromptSet,
    directory: Path,
    experiments: Sequence[Experiment],
    beginner: Any = None,
    controls: bool = True,
) -> list[dict[str, Any]]:
    """Run the experiments and their controls on one model, leave everything in `directory`, return the claims.

    The prompts are put after BOS first where the model has its sink only there (`find_condition`).
    `beginner` is the model's own first checkpoint, as `initial_checkpoint_of` gives it; without one its architecture
    is given new weights. If an experiment raises, its error is stored in its claim's entry; `failed` finds those.
    Without `controls` the claims are not tried where they must fail.
    """
    started = time.time()
    (directory / "manifest.json").unlink(missing_ok=True)
    info = describe(model)
    with count_passes() as count:
        condition = find_condition(model, prompts)
    prompts = condition.prompts
    report_progress(condition.summary)
    used = {"condition": count.passes(prompts.n, prompts.length, info.n_layers)}
    declared = {experiment.id: experiment.passes(model, prompts) for experiment in experiments}
    # What the same experiments take in a run that is not quick.
    full = {name: EXPERIMENTS[name]().passes(model, prompts) for name in declared if name in EXPERIMENTS}
    report_progress(f"{info.title}: {_estimate(model, prompts, CLEAN_PASSES + sum(declared.values()))}")
    entries: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    broken: dict[str, str] = {}
    with remember_rows(), count_passes() as count:
        record_clean(model, prompts)
        used["clean recording"] = count.passes(prompts.n, prompts.length, info.n_layers)
        for number, experiment in enumerate(experiments, 1):
            measured = partial(run_or_read, experiment, model, prompts, directory)
            with count_passes() as own:
                entry = _entry(experiment, info.name, measured, directory, f"{number}/{len(experiments)} ")
            used[experiment.id] = own.passes(prompts.n, prompts.length, info.n_layers)
            if experiment.claim is not None:
                entries.append(entry | {"quantisation": info.quantisation, "controls": []})
            if entry["error"]:
                broken[experiment.id] = entry["error"]
            elif entry["verdict"] == "not applicable":
                left_out[experiment.id] = entry["why"]
            _write_claims(directory, entries)
    tested = [experiment for experiment in experiments if experiment.claim is not None]
    for name, opened in _controls(model, prompts, beginner).items() if controls else ():
        try:
            with opened() as (control, its_prompts), remember_rows(), count_passes() as count:
                for experiment, entry in zip(tested, entries, strict=True):
                    if is_large(info) and not experiment.needs_control:
                        continue
                    place = directory / "controls" / name.replace(" ", "-")
                    measured = partial(run_or_read, experiment, control, its_prompts, place, figures=False)
                    found = _entry(experiment, describe(control).name, measured, place, f"control, {name}: ")
                    entry["controls"].append(_as_control(name, found))
                # The decoy is another, smaller model, whose blocks are not this one's.
                if name != DECOY:
                    used[f"control, {name}"] = count.passes(prompts.n, prompts.length, info.n_layers)
        except ModelError as reason:
            report_progress(f"control, {name}: left out: {reason}")
        _write_claims(directory, entries)
    write_manifest(
        directory,
        sys.argv[1:],
        started,
        model=describe(model).name,
        quantisation=describe(model).quantisation,
        weights=weights_fingerprint(model),
        prompts=prompts.fingerprint(),
        text=prompts.description.get("source", prompts.description.get("builder")),
        samples=prompts.n,
        length=prompts.length,
        condition=condition.to_json(),
        # Whether a large model's experiments ran smaller: the commands for single experiments have to say so.
        quick=is_large(info) and all(experiment.quick(info).config == experiment.config for experiment in experiments),
        seed=prompts.seed,
        device=str(device_of(model)),
        experiments=[experiment.id for experiment in experiments if experiment.id not in left_out | broken],
        left_out=left_out,
        broken=broken,
        passes={
            name: {"full": full.get(name), "declared": declared.get(name), "used": value}
            for name, value in used.items()
        },
    )
    report_progress(
        f"{info.title}: {sum(used.values()):.1f} passes over {prompts.n} prompts in {time.time() - started:.0f} s"
    )
    return entries


def quick_samples(parameters: int) -> int:
    """How many prompts a quick run takes: decided by the size of the model alone, before anything is measured."""
    return QUICK_SAMPLES if parameters <= LARGE_PARAMETERS else QUICK_SAMPLES_LARGE


def initial_checkpoint_of(source: str | Path, load: Callable[[int], Any]) -> Any:
    """The model's own first checkpoint, untrained, as `load` loads it by its step; None where none is kept."""
    try:
        return load(0) if 0 in list_checkpoints(source) else None
    except ModelError:
        # Constructed models have no training, and a hub need not be reachable for one in the local cache.
        return None


TRAINING = "training"
"""The directory, and what stands for a model's name, of the claims about training."""
PLAIN = "baseline"
"""The variant whose runs are the control: plain text, and nothing that encourages a sink."""


def reproduce_training(runs: Sequence[Run], directory: Path) -> list[dict[str, Any]]:
    """Test the claims about training on the traces of runs, with their control; the counterpart of `reproduce`.

    `runs` as `training.runs.as_trained` gives them.
    """
    started = time.time()
    (directory / "manifest.json").unlink(missing_ok=True)
    entries: list[dict[str, Any]] = []
    for experiment in (make() for make in RUN_EXPERIMENTS.values()):
        entry = _entry(experiment, TRAINING, partial(_run_and_save, experiment, runs, directory), directory)
        control = _entry(
            experiment,
            TRAINING,
            partial(experiment.run, runs, PLAIN),
            directory / "controls" / "plain-text",
            "control, plain text: ",
        )
        entries.append(entry | {"quantisation": None, "controls": [_as_control("plain text", control)]})
        _write_claims(directory, entries)
    unmeasured = [entry for entry in entries if entry["verdict"] == "not applicable"]
    write_manifest(
        directory,
        sys.argv[1:],
        started,
        model=TRAINING,
        runs=[f"{run.name} ({run.first})" for run in runs],
        experiments=[entry["experiment"] for entry in entries if entry not in unmeasured],
        left_out={entry["experiment"]: entry["why"] for entry in unmeasured if not entry["error"]},
        broken={entry["experiment"]: entry["error"] for entry in unmeasured if entry["error"]},
    )
    return entries


def _run_and_save(experiment: RunsExperiment, runs: Sequence[Run], directory: Path) -> Result:
    # What an earlier run left must not stand for one that breaks off.
    (directory / f"{experiment.id}.json").unlink(missing_ok=True)
    result = experiment.run(runs)
    result.save(directory)
    return result


def failed(entries: Sequence[dict[str, Any]]) -> list[str]:
    """The ids of claims whose measurement broke off, on the model or on a control."""
    return [
        entry["id"] for entry in entries if entry["error"] or any(control["error"] for control in entry["controls"])
    ]


def run_or_read(
    experiment: Experiment, model: HookedModel, prompts: PromptSet, directory: Path, figures: bool = True
) -> Result:
    """The experiment's result, from `directory` where the same run has left it, else measured and saved there.

    Raises:
        NotApplicable: there is nothing to measure on this model or these prompts.
    """
    key = result_key(experiment, model, prompts)
    path = directory / f"{experiment.id}.json"
    with contextlib.suppress(ValueError, KeyError, TypeError):
        kept = Result.load(path)
        if kept.provenance["key"] == key:
            return kept
    result = experiment.run(model, prompts, figures=figures)
    result.provenance["key"] = key
    result.save(directory)
    return result


def _entry(
    experiment: Experiment | RunsExperiment,
    subject: str,
    measure: Callable[[], Result],
    directory: Path,
    label: str = "",
) -> dict[str, Any]:
    """Measure, and make the experiment's entry in claims.json, whatever becomes of the measurement.

    An experiment that raises must not lose the others: its error is in the entry, and its traceback in
    `<id>.traceback.txt` in `directory`. `subject` is what the entry is about: a model or "training".
    """
    started, error = time.monotonic(), None
    trace = directory / f"{experiment.id}.traceback.txt"
    trace.unlink(missing_ok=True)
    return_freed_memory()
    name = f"{experiment.claim.id} {experiment.id}" if experiment.claim else experiment.id
    try:
        result = measure()
    except NotApplicable as reason:
        judgement, measured, notes = Judgement("not applicable", str(reason)), {}, []
    except Exception as problem:
        write_atomically(trace, lambda temporary: temporary.write_text(traceback.format_exc()))
        error = f"{type(problem).__name__}: {problem}"
        reason = f"its measurement broke off: {error} ({trace.name} has the traceback)"
        judgement, measured, notes = Judgement("not applicable", reason), {}, []
    else:
        measured, notes = result.metrics, result.notes
        judgement = result.judgement or Judgement("reproduced", "")
    verdict = judgement.verdict if experiment.claim or judgement.verdict == "not applicable" else "measured"
    report_progress(
        f"{label}{name}: {verdict} ({time.monotonic() - started:.1f} s)" + (f": {judgement.reason}" if error else "")
    )
    claim = experiment.claim
    entry = claim_entry(claim.to_json(), measured, judgement) if claim else judgement.to_json()
    return entry | {"experiment": experiment.id, "model": subject, "notes": notes, "error": error}


def _as_control(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    return {"control": name} | {key: entry[key] for key in ("verdict", "why", "error")}


def _write_claims(directory: Path, entries: list[dict[str, Any]]) -> None:
    write_json(directory / "claims.json", entries)


DECOY = "decoy"
Control = Callable[[], AbstractContextManager[tuple[Any, PromptSet]]]


def _controls(model: HookedModel, prompts: PromptSet, beginner: Any) -> dict[str, Control]:
    fewer = prompts.subset(slice(0, min(CONTROL_SAMPLES, max(FEWEST_CONTROL_SAMPLES, prompts.n // 4))))

    @contextlib.contextmanager
    def on_untrained() -> Iterator[tuple[Any, PromptSet]]:
        if beginner is not None:
            yield beginner, fewer
        else:
            with untrained_weights(model):
                yield model, fewer

    @contextlib.contextmanager
    def on_shuffled() -> Iterator[tuple[Any, PromptSet]]:
        with shuffled_neurons(model):
            yield model, fewer

    @contextlib.contextmanager
    def on_decoy() -> Iterator[tuple[Any, PromptSet]]:
        decoy = load_model("wired-decoy", device=model.cfg.device)
        size = describe(decoy).vocab_size
        yield decoy, random_tokens(size, n=fewer.n, length=fewer.length, seed=prompts.seed)

    return {"untrained": on_untrained, "shuffled neurons": on_shuffled, DECOY: on_decoy}


def result_key(experiment: Experiment, model: HookedModel, prompts: PromptSet) -> str:
    """A hash of all that decides the result: weights, hooks under way, prompts, settings and code."""
    parts = {
        "weights": weights_fingerprint(model),
        "hooks": sorted(f"{name} {len(point.fwd_hooks)}" for name, point in model.hook_dict.items() if point.fwd_hooks),
        "prompts": prompts.fingerprint(),
        # What an experiment may put back at the end of a row when it takes BOS away.
        "cut_off": None if prompts.overflow is None else prompts.overflow.tolist(),
        "config": repr(experiment.config),
        # That of the experiment too, which need not be one of the package's own.
        "code": [code_fingerprint(), inspect.getsource(sys.modules[type(experiment).__module__])],
        "claim": repr(experiment.claim),
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@torch.no_grad()
def _estimate(model: HookedModel, prompts: PromptSet, passes: float) -> str:
    """What so many passes will take in time and memory, from a timed pass over a few rows.

    Most experiments stop before the unembedding, and so does this pass.
    """
    # Where weights are brought for every batch, it is a whole batch that tells.
    most = 16 if placement_of(model) is None else prompts.n
    rows = min(prompts.n, most, batch_size_for(model, prompts.length, with_logits=True))
    end = describe(model).n_layers
    forward(model, prompts.ids[:rows], prompts.attention_mask[:rows], stop_at_layer=end)
    started = time.perf_counter()
    forward(model, prompts.ids[:rows], prompts.attention_mask[:rows], stop_at_layer=end)
    minutes = passes * (time.perf_counter() - started) * prompts.n / rows / 60
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 2**30
    told = (
        f"{prompts.n} prompts of {prompts.length} tokens; about {passes:.0f} passes, {max(1, round(minutes))} min, "
        f"{weights + 1.5:.1f} GB"
    )
    if minutes > LONG_MINUTES:
        told += "; fewer --samples, a smaller --dtype, a --device or the first --layers alone make it shorter"
    return told
