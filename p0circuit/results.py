"""The result of an experiment: measured values with intervals, tables, figures, and their provenance.

<run>/<experiment>.json   metrics, provenance and the names of the files below; written last, so it means "complete"
<run>/tables/*.csv        <run>/figures/*.png and *.svg        <run>/attention/<experiment>.json
<run>/manifest.json       command, versions and machine (`write_manifest`)
"""

from __future__ import annotations

import contextlib
import json
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from p0circuit.errors import P0Error
from p0circuit.io import write_atomically, write_json
from p0circuit.stats import Interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from p0circuit.figures.attention_view import AttentionView

FIGURE_DPI = 200
"""Dots per inch of PNG files."""
_LIBRARIES = ("p0circuit", "torch", "transformer-lens", "transformers", "numpy", "pandas", "matplotlib")

Verdict = Literal["reproduced", "not reproduced", "not applicable"]


@dataclass(frozen=True)
class Judgement:
    """The verdict on a claim.

    Attributes:
        verdict: whether the claim's criteria hold on the measured values.
        reason: the values that decided, in one sentence.
    """

    verdict: Verdict
    reason: str

    def to_json(self) -> dict[str, str]:
        """Return it as it stands in claims.json, where the reason is named "why"."""
        return {"verdict": self.verdict, "why": self.reason}


@dataclass
class Result:
    """The result of one experiment on one model.

    Attributes:
        experiment: id of the experiment, also the name of its file.
        title: heading in the report.
        metrics: the values that summarise the result, each with its interval.
        tables: everything measured, as data frames.
        figures: matplotlib figures; after `load`, the paths of their PNG files.
        provenance: model, prompts, configuration, seconds, and which recordings came from the cache.
        notes: remarks for the reader, such as a condition that could not be measured and why.
        view: interactive view of attention patterns, for the report and notebooks; None if there is none.
        claim: the texts of the claim that was tested (`Claim.to_json`); None if the experiment tests none.
        judgement: the verdict on that claim; None if the experiment tests none.
        drawing: numbers for `Experiment.draw` that no table holds. They are not saved: a result read from disk is
            drawn without them.
    """

    experiment: str
    title: str
    metrics: dict[str, Interval]
    tables: dict[str, pd.DataFrame]
    figures: Mapping[str, Figure | Path] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    view: AttentionView | None = None
    claim: dict[str, str] | None = None
    judgement: Judgement | None = None
    drawing: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def model_title(self) -> str:
        """Name of the measured model with the quantisation of its weights; empty if the provenance has no model."""
        model = self.provenance.get("model", {})
        return model_title(model.get("name", ""), model.get("quantisation"))

    def claim_entry(self) -> dict[str, Any] | None:
        """Return the claim's texts, measured values and verdict as they stand in claims.json; None without a claim."""
        return None if self.claim is None else claim_entry(self.claim, self.metrics, self.judgement)

    def save(self, directory: Path) -> Path:
        """Write tables, figures and, last, `<experiment>.json`.

        All files are made before the first one is written: if a figure cannot be drawn, the directory stays as it was.

        Args:
            directory: directory of the run; created if needed.

        Returns:
            The path of the JSON file.
        """
        files: dict[Path, bytes] = {}
        for name, table in self.tables.items():
            path = directory / "tables" / f"{self.experiment}-{name}.csv"
            files[path] = table.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode()
        for name, figure in self.figures.items():
            path = directory / "figures" / f"{self.experiment}-{name}.png"
            if isinstance(figure, Path):
                files |= {path.with_suffix(end): figure.with_suffix(end).read_bytes() for end in (".png", ".svg")}
            else:
                files |= {path.with_suffix(end): figure_bytes(figure, end[1:]) for end in (".png", ".svg")}
        summary = {
            "experiment": self.experiment,
            "title": self.title,
            "metrics": {name: interval.to_json() for name, interval in self.metrics.items()},
            "tables": list(self.tables),
            "figures": list(self.figures),
            "notes": self.notes,
            "claim": self.claim_entry(),
            "provenance": self.provenance,
        }
        summary_path = directory / f"{self.experiment}.json"
        # The summary of an earlier run would declare files complete that are still being written.
        summary_path.unlink(missing_ok=True)
        for path, content in files.items():
            write_atomically(path, lambda temporary, content=content: temporary.write_bytes(content))
        if self.view is not None:
            from p0circuit.figures.attention_view import save_view

            save_view(directory, self.experiment, self.view)
        return write_json(summary_path, summary)

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read a result that `save` wrote.

        Args:
            path: path of its JSON file.

        Returns:
            The result; its figures are paths of PNG files.

        Raises:
            P0Error: there is no such result, or one of its tables or figures is missing.
        """
        import pandas as pd

        from p0circuit.figures.attention_view import load_view

        if not path.is_file():
            results = sorted(other.stem for other in path.parent.glob("*.json") if other.stem != "manifest")
            raise P0Error(f"no result at {str(path)!r}; this directory holds: {', '.join(results) or 'none'}")
        summary = json.loads(path.read_text())
        name, directory = summary["experiment"], path.parent
        claim, judgement = _claim_of(summary["claim"])
        tables = {table: directory / "tables" / f"{name}-{table}.csv" for table in summary["tables"]}
        figures = {figure: directory / "figures" / f"{name}-{figure}.png" for figure in summary["figures"]}
        for file in (*tables.values(), *figures.values()):
            if not file.is_file():
                raise P0Error(f"the result {path.name} names {file.name}, which is missing; run the experiment again")
        return cls(
            experiment=name,
            title=summary["title"],
            metrics={metric: Interval(**value) for metric, value in summary["metrics"].items()},
            # Tokens such as "null" and "NA" are text, not gaps.
            tables={table: pd.read_csv(file, keep_default_na=False, na_values=[""]) for table, file in tables.items()},
            figures=figures,
            provenance=summary["provenance"],
            notes=summary["notes"],
            view=load_view(directory, name),
            claim=claim,
            judgement=judgement,
        )


def claim_entry(
    claim: Mapping[str, str], measured: Mapping[str, Interval], judgement: Judgement | None
) -> dict[str, Any]:
    """Return a claim's entry in claims.json.

    Args:
        claim: the texts of the claim (`Claim.to_json`).
        measured: the metrics of its experiment.
        judgement: its verdict.
    """
    values = {name: interval.to_json() for name, interval in measured.items()}
    return {**claim, "measured": values, **(judgement.to_json() if judgement else {})}


def _claim_of(entry: dict[str, Any] | None) -> tuple[dict[str, str] | None, Judgement | None]:
    """Take a claim's entry apart into its texts and its judgement."""
    if entry is None:
        return None, None
    texts = {key: value for key, value in entry.items() if key not in ("measured", "verdict", "why")}
    return texts, Judgement(entry["verdict"], entry["why"])


def figure_bytes(figure: Figure, kind: str) -> bytes:
    """Render a figure to the content of a file. Equal figures give equal files, and text in an SVG stays text.

    Args:
        figure: a matplotlib figure.
        kind: "png" or "svg".
    """
    import io

    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "p0circuit", "svg.fonttype": "none"}):
        # By default matplotlib writes the date into an SVG.
        figure.savefig(buffer, format=kind, dpi=FIGURE_DPI, metadata={"Date": None} if kind == "svg" else {})
    return buffer.getvalue()


def metric_name(label: str) -> str:
    """Turn a label of figures and tables into a part of a metric's name: "P0 in, clipped" becomes "p0_in_clipped".

    Args:
        label: the label.
    """
    return label.lower().replace("'", "").replace(",", "").replace(" ", "_")


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that the numbers depend on, by name."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def peak_memory_mb() -> float | None:
    """Return the peak memory of this process so far, in MiB; None where the system does not measure it (Windows)."""
    # On Linux `getrusage` starts from the peak of the parent process; VmHWM is the peak of this process alone.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def write_manifest(directory: Path, command: list[str], started: float, **details: object) -> Path:
    """Write `manifest.json`: the command, versions, machine, duration and peak memory.

    Args:
        directory: directory of the run.
        command: arguments of the command line.
        started: time at which the run started, in seconds since the epoch (`time.time()`).
        **details: further entries; their values must be JSON.

    Returns:
        The path of the file.
    """
    import torch

    manifest = {
        "command": command,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.time() - started, 1),
        "peak_memory_mb": round(peak, 1) if (peak := peak_memory_mb()) is not None else None,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
        **details,
    }
    return write_json(directory / "manifest.json", manifest)


def model_title(name: str, quantisation: str | None) -> str:
    """Join a model's name and the quantisation of its weights, as in "smollm2-135m (Q4_1)".

    Args:
        name: name of the model.
        quantisation: name of the quantisation; None for weights that are not quantised.
    """
    return f"{name} ({quantisation})" if quantisation else name
