"""The whole reproduction of one model: every experiment, the controls, and `claims.json`.

1. One clean recording is made for all experiments; what they will take, in passes, is said before they start.
2. Every experiment runs on the model's prompts; its result is on disk before the next one starts. A result that is
   there already, of the same weights, prompts, settings and code, is read instead of measured again.
3. The claims run again where they must fail: on the model untrained, on the model with its neurons shuffled, and on
   the decoy, whose P0 has a high norm and no sink. (A random position instead of P0 is a control inside each claim.)
4. Every claim gets its entry in `claims.json`. One that breaks off is named there and loses none of the others.

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from p0circuit.activations import batch_size_for, weights_fingerprint
from p0circuit.console import say
from p0circuit.experiments import EXPERIMENTS, RUN_EXPERIMENTS
from p0circuit.experiments.base import Experiment, NotApplicable, is_large
from p0circuit.experiments.claim import Judgement
from p0circuit.experiments.clean_recording import CLEAN_PASSES, record_clean
from p0circuit.experiments.over_runs import RunsExperiment
from p0circuit.experiments.sink_condition import find_condition
from p0circuit.files import write_json
from p0circuit.models import ModelError, describe, device_of, forward, list_checkpoints, load_model
from p0circuit.models.controls import shuffled_neurons, untrained
from p0circuit.models.device_map import placement_of
from p0circuit.models.memory import return_freed_memory
from p0circuit.models.passes import count_passes
from p0circuit.paths import code_fingerprint
from p0circuit.prompts import PromptSet, random_tokens
from p0circuit.results import Result, write_manifest
from p0circuit.row_memory import remember_rows
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
    model: Any,
    prompts: PromptSet,
    directory: Path,
    experiments: Sequence[Experiment],
    beginner: Any = None,
    controls: bool = True,
) -> list[dict[str, Any]]:
    """Run the experiments and their controls on one model, leave everything in `directory`, return the claims.

    The prompts are put after BOS first where the model has its sink only there (`find_condition`).
    `beginner` is the model's own first checkpoint, as `beginner_of` gives it; without one its architecture is given
    new weights. An experiment that breaks off is told of in its claim's entry; `failed` finds those. Without `controls`
    the claims are not tried where they must fail.
    """
    started = time.time()
    (directory / "manifest.json").unlink(missing_ok=True)
    info = describe(model)
    with count_passes() as count:
        condition = find_condition(model, prompts)
    prompts = condition.prompts
    say(condition.summary)
    used = {"condition": count.passes(prompts.n, prompts.length, info.layers)}
    declared = {experiment.id: experiment.passes(model, prompts) for experiment in experiments}
    # What the same experiments take in a run that is not quick.
    full = {name: EXPERIMENTS[name]().passes(model, prompts) for name in declared if name in EXPERIMENTS}
    say(f"{info.title}: {_estimate(model, prompts, CLEAN_PASSES + sum(declared.values()))}")
    entries: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    broken: dict[str, str] = {}
    with remember_rows(), count_passes() as count:
        record_clean(model, prompts)
        used["clean recording"] = count.passes(prompts.n, prompts.length, info.layers)
        for number, experiment in enumerate(experiments, 1):
            measured = partial(run_or_read, experiment, model, prompts, directory)
            with count_passes() as own:
                entry = _entry(experiment, info.name, measured, f"{number}/{len(experiments)} ")
            used[experiment.id] = own.passes(prompts.n, prompts.length, info.layers)
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
                    found = _entry(experiment, describe(control).name, measured, f"control, {name}: ")
                    entry["controls"].append(_as_control(name, found))
                # The decoy is another, smaller model, whose blocks are not this one's.
                if name != DECOY:
                    used[f"control, {name}"] = count.passes(prompts.n, prompts.length, info.layers)
        except ModelError as reason:
            say(f"control, {name}: left out: {reason}")
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
    say(f"{info.title}: {sum(used.values()):.1f} passes over {prompts.n} prompts in {time.time() - started:.0f} s")
    return entries


def quick_samples(parameters: int) -> int:
    """How many prompts a quick run takes: decided by the size of the model alone, before anything is measured."""
    return QUICK_SAMPLES if parameters <= LARGE_PARAMETERS else QUICK_SAMPLES_LARGE


def beginner_of(source: str | Path, load: Callable[[int], Any]) -> Any:
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
        entry = _entry(experiment, TRAINING, partial(_run_and_save, experiment, runs, directory))
        control = _entry(experiment, TRAINING, partial(experiment.run, runs, PLAIN), "control, plain text: ")
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
    experiment: Experiment, model: Any, prompts: PromptSet, directory: Path, figures: bool = True
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
    result = experiment.run(model, prompts)
    result.provenance["key"] = key
    if not figures:
        result.figures = {}
    result.save(directory)
    return result


def _entry(
    experiment: Experiment | RunsExperiment, subject: str, measure: Callable[[], Result], label: str = ""
) -> dict[str, Any]:
    """The experiment's line in claims.json, whatever becomes of the measurement; `subject` is what it is about."""
    started, error = time.monotonic(), None
    return_freed_memory()
    told = f"{experiment.claim.id} {experiment.id}" if experiment.claim else experiment.id
    try:
        result = measure()
    except NotApplicable as reason:
        judgement, measured, notes = Judgement("not applicable", str(reason)), {}, []
    except (ValueError, RuntimeError, FloatingPointError, KeyError, IndexError) as problem:
        # One claim that breaks off must not lose the others; what it was is in the entry and in the exit code.
        error = f"{type(problem).__name__}: {problem}"
        judgement, measured, notes = Judgement("not applicable", f"its measurement broke off: {error}"), {}, []
    else:
        measured, notes = result.metrics, result.notes
        found = result.claim or {"verdict": "reproduced", "why": ""}
        judgement = Judgement(found["verdict"], found["why"])
    verdict = judgement.verdict if experiment.claim or judgement.verdict == "not applicable" else "measured"
    say(f"{label}{told}: {verdict} ({time.monotonic() - started:.1f} s)" + (f": {judgement.why}" if error else ""))
    record = experiment.claim.record(judgement, measured) if experiment.claim else asdict(judgement)
    return record | {"experiment": experiment.id, "model": subject, "notes": notes, "error": error}


def _as_control(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    return {"control": name} | {key: entry[key] for key in ("verdict", "why", "error")}


def _write_claims(directory: Path, entries: list[dict[str, Any]]) -> None:
    write_json(directory / "claims.json", entries)


DECOY = "decoy"
Control = Callable[[], AbstractContextManager[tuple[Any, PromptSet]]]


def _controls(model: Any, prompts: PromptSet, beginner: Any) -> dict[str, Control]:
    fewer = prompts.subset(slice(0, min(CONTROL_SAMPLES, max(FEWEST_CONTROL_SAMPLES, prompts.n // 4))))

    @contextlib.contextmanager
    def on_untrained() -> Iterator[tuple[Any, PromptSet]]:
        if beginner is not None:
            yield beginner, fewer
        else:
            with untrained(model):
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


def result_key(experiment: Experiment, model: Any, prompts: PromptSet) -> str:
    """A hash of all that decides the result: weights, hooks under way, prompts, settings and code."""
    parts = {
        "weights": weights_fingerprint(model),
        "hooks": sorted(f"{name} {len(point.fwd_hooks)}" for name, point in model.hook_dict.items() if point.fwd_hooks),
        "prompts": prompts.fingerprint(),
        # What an experiment may put back at the end of a row when it takes BOS away.
        "cut_off": None if prompts.cut_off is None else prompts.cut_off.tolist(),
        "config": repr(experiment.config),
        # That of the experiment too, which need not be one of the package's own.
        "code": [code_fingerprint(), inspect.getsource(sys.modules[type(experiment).__module__])],
        "claim": repr(experiment.claim),
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@torch.no_grad()
def _estimate(model: Any, prompts: PromptSet, passes: float) -> str:
    """What so many passes will take in time and memory, from a timed pass over a few rows.

    Most experiments stop before the unembedding, and so does this pass.
    """
    # Where weights are brought for every batch, it is a whole batch that tells.
    most = 16 if placement_of(model) is None else prompts.n
    rows = min(prompts.n, most, batch_size_for(model, prompts.length, with_logits=True))
    end = describe(model).layers
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
