"""The contents of a report, read from the files of a run."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p0circuit.errors import P0Error
from p0circuit.io import write_json
from p0circuit.report.published import Comparison, comparisons_for
from p0circuit.results import Result, model_title

CLAIMS = "claims.json"
OVERVIEW = "overview.json"
BROKE_OFF = "broke off"
"""Shown as the verdict of a claim whose measurement ended in an error."""


@dataclass(frozen=True)
class Reproduction:
    """The run of `p0circuit reproduce` on one model.

    Attributes:
        directory: directory of the run.
        model: name of the model.
        claims: entries of claims.json, in the order of their numbers.
        results: results by experiment.
        unreadable: the reason for each experiment whose result could not be read.
        manifest: provenance of the run; empty for a run that did not finish.
    """

    directory: Path
    model: str
    claims: list[dict[str, Any]]
    results: dict[str, Result]
    unreadable: dict[str, str]
    manifest: dict[str, Any]

    @property
    def title(self) -> str:
        """The model's name, with its quantisation if its weights are quantised."""
        entries = [self.manifest, *self.claims]
        return model_title(self.model, next((one["quantisation"] for one in entries if one.get("quantisation")), None))

    @property
    def controls(self) -> list[str]:
        """The names of all controls, in the order of their first appearance."""
        return list(dict.fromkeys(control["control"] for claim in self.claims for control in claim.get("controls", ())))

    @property
    def about_training(self) -> bool:
        """Whether the run is about training runs instead of a model."""
        return "runs" in self.manifest

    @property
    def samples(self) -> int | None:
        """The number of prompts, of which an experiment may use fewer; None if it is not known."""
        counts = [result.provenance["samples"] for result in self.results.values() if "samples" in result.provenance]
        return self.manifest.get("samples") or max(counts, default=None)

    @property
    def condition(self) -> str | None:
        """The condition of the prompts, "without BOS" or "with BOS"; None if it is not known."""
        return self.manifest.get("condition", {}).get("name")

    @property
    def control_cells(self) -> Counter[str]:
        """The number of tests of claims on controls, by verdict."""
        return Counter(shown_verdict(entry) for claim in self.claims for entry in claim.get("controls", ()))

    @property
    def has_views(self) -> bool:
        """Whether any result has interactive attention patterns."""
        return any(result.view is not None for result in self.results.values())

    @property
    def other_results(self) -> list[Result]:
        """The results of experiments that test no claim."""
        claimed = {claim["experiment"] for claim in self.claims}
        return [result for name, result in self.results.items() if name not in claimed]

    @property
    def comparisons(self) -> list[Comparison]:
        """The values that papers published about this model, each compared with ours."""
        return comparisons_for(self.model, self.results.values())


def find_reproductions(directory: Path) -> list[Reproduction]:
    """Read the run in a directory, or the runs in its sub-directories if it holds none itself.

    Args:
        directory: directory of one run, or of several.

    Returns:
        The runs, in the order of the overview.

    Raises:
        P0Error: there is none, or its claims.json is not a list of claims.
    """
    alone = (directory / CLAIMS).is_file()
    paths = [directory] if alone else sorted(path.parent for path in directory.glob(f"*/{CLAIMS}"))
    order = read_overview(directory)["models"]
    paths.sort(key=lambda path: order.index(path.name) if path.name in order else len(order))
    if not paths:
        raise P0Error(
            f"no {CLAIMS} in {str(directory)!r} or in a directory in it; name one `p0circuit reproduce` has written"
        )
    return [_read_run(path) for path in paths]


def write_overview(directory: Path, runs: Sequence[Path], left_out: Mapping[str, str]) -> Path:
    """Write the order of the runs and the missing ones, for the page over several models.

    Args:
        directory: directory of the runs.
        runs: directory of each run, in order.
        left_out: the reason for each model that has no run.

    Returns:
        The path of the file.
    """
    return write_json(directory / OVERVIEW, {"models": [run.name for run in runs], "left_out": dict(left_out)})


def read_overview(directory: Path) -> dict[str, Any]:
    """Read what `write_overview` wrote; without the file, both entries are empty.

    Args:
        directory: directory of the runs.
    """
    empty: dict[str, Any] = {"models": [], "left_out": {}}
    path = directory / OVERVIEW
    return empty | (json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})


def _read_run(directory: Path) -> Reproduction:
    claims = json.loads((directory / CLAIMS).read_text(encoding="utf-8"))
    keys = ("id", "title", "statement", "measure", "threshold", "measured", "verdict", "why", "experiment")
    for entry in claims if isinstance(claims, list) else [claims]:
        if not isinstance(entry, dict) or (missing := [key for key in keys if key not in entry]):
            lacking = f"a claim without {', '.join(missing)}" if isinstance(entry, dict) else repr(entry)
            raise P0Error(f"{directory / CLAIMS} holds {lacking}; run `p0circuit reproduce` again")
    manifest_file = directory / "manifest.json"
    manifest = json.loads(manifest_file.read_text(encoding="utf-8")) if manifest_file.is_file() else {}
    results, unreadable = {}, {}
    for path in sorted(directory.glob("*.json")):
        if path.name in (CLAIMS, manifest_file.name):
            continue
        try:
            results[path.stem] = Result.load(path)
        except (ValueError, KeyError, TypeError, OSError) as reason:
            # The report is written without this result.
            unreadable[path.stem] = str(reason)
    model = manifest.get("model") or next((claim["model"] for claim in claims if claim.get("model")), directory.name)
    return Reproduction(directory, model, sorted(claims, key=claim_number), results, unreadable, manifest)


def claim_number(claim: dict[str, Any]) -> tuple[int, str]:
    """Return the sort key of a claim, which puts C2 before C10.

    Args:
        claim: an entry of claims.json.
    """
    digits = "".join(sign for sign in claim["id"] if sign.isdigit())
    return int(digits or 0), claim["id"]


def shown_verdict(entry: Mapping[str, Any]) -> str:
    """Return the verdict of a claim or of its control as the report shows it.

    Args:
        entry: an entry of claims.json, or of its controls.
    """
    return BROKE_OFF if entry.get("error") else entry["verdict"]


def verdict_of_control(claim: dict[str, Any], control: str) -> str:
    """Return the verdict of a claim on a control; empty if it was not tested there.

    Args:
        claim: an entry of claims.json.
        control: name of the control.
    """
    return next((shown_verdict(entry) for entry in claim.get("controls", ()) if entry["control"] == control), "")


def condition_in_words(condition: str | None) -> str:
    """Return the condition of the prompts in words.

    Args:
        condition: "without BOS", "with BOS", or None if it is not known.
    """
    words = {None: "–", "without BOS": "text as it is", "with BOS": "text after BOS"}
    return words.get(condition, str(condition))


def tally(claims: Iterable[dict[str, Any]]) -> str:
    """Return the number of claims by verdict as text: "9 reproduced, 2 not reproduced".

    Args:
        claims: entries of claims.json.
    """
    counts = Counter(map(shown_verdict, claims))
    order = ("reproduced", "not reproduced", "not applicable", BROKE_OFF)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in order if counts[verdict]) or "no claims"


def command_for(experiment: str, model: str, result: Result | None, quick: bool = False) -> str:
    """Return the command that runs one experiment alone, on the same prompts.

    Args:
        experiment: id of the experiment.
        model: name of the model.
        result: its result, which holds the settings of the prompts; None if there is none.
        quick: whether the run was quick; then the number of prompts follows from the size of the model.
    """
    words = ["p0circuit", "run", experiment]
    if result is not None and "runs" in result.provenance:
        return shlex.join(words)
    words.append(model)
    if result is not None:
        prompts = result.provenance.get("prompts", {})
        given = {"text": prompts.get("source"), "samples": None if quick else result.provenance.get("samples")}
        given |= {"length": result.provenance.get("length"), "seed": prompts.get("seed")}
        words += [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
        words += ["--quick"] if quick else []
    return shlex.join(words)


def number(value: float) -> str:
    """Format a measured value: three decimals, or three significant digits for very small and very large values.

    Args:
        value: the value; NaN is shown as a dash.
    """
    if value != value:
        return "–"
    return f"{value:.3f}" if value == 0 or 0.001 <= abs(value) < 10_000 else f"{value:.3g}"


def plain(value: object) -> str:
    """Format an entry of the provenance as one line of text.

    Args:
        value: any JSON value; in the description of a model, `window` is a list with one entry per layer.
    """
    if isinstance(value, dict):
        parts = (f"{key} {_windows(one) if key == 'window' else plain(one)}" for key, one in value.items())
        return ", ".join(parts) or "none"
    if isinstance(value, list):
        return " ".join(map(plain, value)) or "none"
    return "not known" if value is None else str(value)


def _windows(windows: object) -> str:
    """Format the sliding windows of all layers: "none" if no layer has one, otherwise "full" for those without."""
    if not isinstance(windows, list):
        return plain(windows)
    return " ".join("full" if window is None else str(window) for window in windows) if any(windows) else "none"
