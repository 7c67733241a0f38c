"""Entries of claims.json: the verdict on one claim, also if its experiment raised an error."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from p0circuit.experiments.base import Experiment, NotApplicable
from p0circuit.experiments.training.runs_experiment import RunsExperiment
from p0circuit.io import write_atomically, write_json
from p0circuit.log import report_progress
from p0circuit.models.memory import return_freed_memory
from p0circuit.results import Judgement, Result, claim_entry


class Outcome(NamedTuple):
    """What became of one experiment.

    Attributes:
        entry: its entry in claims.json; without the claim's texts if it tests none.
        result: its result; None if there is none.
    """

    entry: dict[str, Any]
    result: Result | None


def measure_entry(
    experiment: Experiment[Any] | RunsExperiment,
    subject: str,
    measure: Callable[[], Result],
    directory: Path,
    label: str = "",
) -> Outcome:
    """Measure, and return the experiment's entry for claims.json whether or not the measurement succeeds.

    If the experiment raises, its error is in the entry and its traceback in `<id>.traceback.txt` in `directory`.

    Args:
        experiment: the experiment, for its id and claim.
        subject: what is measured: a model's name, or "training".
        measure: returns the result.
        directory: folder for a traceback.
        label: text before the progress message.
    """
    started, error, result = time.monotonic(), None, None
    trace = directory / f"{experiment.id}.traceback.txt"
    trace.unlink(missing_ok=True)
    return_freed_memory()
    name = f"{experiment.claim.id} {experiment.id}" if experiment.claim else experiment.id
    try:
        result = measure()
    except NotApplicable as reason:
        judgement = Judgement("not applicable", str(reason))
    except Exception as problem:
        write_atomically(trace, lambda temporary: temporary.write_text(traceback.format_exc()))
        error = f"{type(problem).__name__}: {problem}"
        reason = f"its measurement broke off: {error} ({trace.name} has the traceback)"
        judgement = Judgement("not applicable", reason)
    else:
        judgement = result.judgement or Judgement("reproduced", "")
    verdict = "measured" if result is not None and result.judgement is None else judgement.verdict
    report_progress(
        f"{label}{name}: {verdict} ({time.monotonic() - started:.1f} s)" + (f": {judgement.reason}" if error else "")
    )
    claim, measured = experiment.claim, result.metrics if result else {}
    entry = claim_entry(claim.to_json(), measured, judgement) if claim else judgement.to_json()
    notes = result.notes if result else []
    return Outcome(entry | {"experiment": experiment.id, "model": subject, "notes": notes, "error": error}, result)


def control_entry(control: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Return the short form of an entry that stands among the controls of a claim.

    Args:
        control: name of the control.
        entry: entry of the claim, measured on the control.
    """
    return {"control": control} | {key: entry[key] for key in ("verdict", "why", "error")}


def write_claims(directory: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Write claims.json.

    Args:
        directory: folder of the run.
        entries: the entries, in the order of the claims.
    """
    write_json(directory / "claims.json", list(entries))


def failed_claims(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Return the ids of claims whose experiment raised an error, on the model or on a control.

    Args:
        entries: entries of claims.json.
    """
    return [
        entry["id"] for entry in entries if entry["error"] or any(control["error"] for control in entry["controls"])
    ]
