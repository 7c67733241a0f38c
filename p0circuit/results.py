"""What an experiment leaves behind: tables, measured values with intervals, figures, and where all of it came from.

<run>/<experiment>.json   metrics, provenance and the names of the files below; written last, so it means "complete"
<run>/tables/*.csv        <run>/figures/*.png and *.svg        <run>/attention/<experiment>.json
<run>/manifest.json       the command and the machine's part (`write_manifest`)
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
    """The outcome of one experiment on one model.

    Attributes:
        experiment: its id, also the name of its file.
        metrics: the few values that sum it up, each with its interval.
        tables: everything measured, as data frames.
        figures: matplotlib figures; after `load`, the paths of their PNG files.
        provenance: model, prompts, configuration, seconds, what came from the cache.
        notes: what a reader has to know, such as a condition that could not be measured and why.
        view: attention patterns to click through, for the report and notebooks; None where there are none.
        claim: the texts of the claim that was tested (`Claim.to_json`); None if the experiment tests none.
        judgement: the verdict on that claim; None if the experiment tests none.
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

    @property
    def model_title(self) -> str:
        """The measured model's name with the quantisation of its weights; empty before `run` recorded the model."""
        model = self.provenance.get("model", {})
        return titled(model.get("name", ""), model.get("quantisation"))

    def claim_entry(self) -> dict[str, Any] | None:
        """Return the claim's texts, measured values and verdict as they stand in claims.json; None without a claim."""
        return None if self.claim is None else claim_entry(self.claim, self.metrics, self.judgement)

    def save(self, directory: Path) -> Path:
        """Write tables, figures and, last, `<experiment>.json`; returns the path of that file.

        All of it is made before any of it is written: a figure that cannot be drawn leaves the directory as it was.
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
                files |= {path.with_suffix(end): drawn(figure, end[1:]) for end in (".png", ".svg")}
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
        whole = directory / f"{self.experiment}.json"
        # That of an earlier run must not vouch for what is written now.
        whole.unlink(missing_ok=True)
        for path, content in files.items():
            write_atomically(path, lambda temporary, content=content: temporary.write_bytes(content))
        if self.view is not None:
            from p0circuit.figures.attention_view import save_view

            save_view(directory, self.experiment, self.view)
        return write_json(whole, summary)

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read back what `save` wrote, given the path of its JSON file.

        Raises:
            P0Error: there is no such result, or one of its tables or figures is missing.
        """
        import pandas as pd

        from p0circuit.figures.attention_view import load_view

        if not path.is_file():
            found = sorted(other.stem for other in path.parent.glob("*.json") if other.stem != "manifest")
            raise P0Error(f"no result at {str(path)!r}; this directory holds: {', '.join(found) or 'none'}")
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


def drawn(figure: Figure, kind: str) -> bytes:
    """The file of a figure; equal figures give equal files, and text in an SVG stays text."""
    import io

    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "p0circuit", "svg.fonttype": "none"}):
        # matplotlib dates an SVG unless told otherwise.
        figure.savefig(buffer, format=kind, dpi=FIGURE_DPI, metadata={"Date": None} if kind == "svg" else {})
    return buffer.getvalue()


def metric_name(label: str) -> str:
    """What is shown to people as "P0 in, clipped", as a part of a metric's name: p0_in_clipped."""
    return label.lower().replace("'", "").replace(",", "").replace(" ", "_")


def library_versions() -> dict[str, str]:
    """The versions that a reproduction would have to match."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def peak_memory_mb() -> float | None:
    """The most memory this process has held so far, in MiB; None where the system does not say (Windows)."""
    # On Linux `getrusage` starts from the peak of the process that started this one; VmHWM is this one's own.
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


def write_manifest(directory: Path, command: list[str], started: float, **details: Any) -> Path:
    """Write `manifest.json`: the command, versions, machine, seconds since `started` (time.time()) and peak memory."""
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


def titled(name: str, quantisation: str | None) -> str:
    """A model's name with the quantisation of its weights, as in "smollm2-135m (Q4_1)"."""
    return f"{name} ({quantisation})" if quantisation else name
