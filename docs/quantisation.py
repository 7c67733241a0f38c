"""Measure what GGUF's kinds of quantisation do to the sink of a model whose weights are known; write the page on it.

    python docs/quantisation.py OUT [SAMPLES]

1. Write p0-nano to a GGUF file of each kind, and load it as any GGUF file is loaded.
2. Test every claim on each, without its controls, on the same prompts; what OUT holds already is read.
3. Put verdicts and metrics side by side into docs/quantisation.md. No number of that page is typed by hand.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from p0circuit.report.contents import Reproduction, find_reproductions, number, shown_verdict

MODEL = "p0-nano"
KINDS = ("F16", "Q8_0", "Q4_1")
SAMPLES, LENGTH, TEXT = 128, 64, "stdlib"
PAGE = Path(__file__).with_suffix(".md")


def measure(out: Path, samples: int = SAMPLES) -> list[Reproduction]:
    """The runs of p0-nano as each kind of GGUF file, F16 first."""
    from p0circuit.experiments import EXPERIMENTS
    from p0circuit.experiments.conditions import pooled_prompts_for
    from p0circuit.io import data_dir
    from p0circuit.models import load_model, one_thread_if_small
    from p0circuit.models.gguf_writer import write_gguf
    from p0circuit.reproduction import reproduce_model

    runs = []
    for kind in KINDS:
        name = f"{MODEL}-{kind}"
        model = load_model(write_gguf(data_dir() / "models" / MODEL, out / f"{name}.gguf", kind))
        one_thread_if_small(model)
        prompts = pooled_prompts_for(model, TEXT, samples, LENGTH, 0)
        reproduce_model(model, prompts, out / name, [make() for make in EXPERIMENTS.values()], controls=False)
        runs += find_reproductions(out / name)
    return runs


def page(runs: Sequence[Reproduction], sizes: dict[str, int]) -> str:
    """The page about the runs of one model in several kinds of quantisation.

    Args:
        runs: one for each kind, the kind that others are compared with first.
        sizes: bytes of each model's file, by the model's name.
    """
    kinds = [str(run.manifest.get("quantisation") or run.model) for run in runs]
    changed = [_changed(runs[0], run) for run in runs[1:]]
    lines = [
        "# What quantisation does to the measurements",
        "",
        f"The named real models come as GGUF files whose weights were rounded to a few bits (`Q4_1`, `Q4_K_M`). Their "
        f"originals are not measured here, so the effect of the rounding is shown on {MODEL}, whose weights are known: "
        f"the same model written as {', '.join(kinds)}, every claim and every metric side by side. {kinds[0]} holds "
        "the shipped weights exactly. Matrices whose rows do not fill GGUF's blocks of 32 are F16 in every file, and "
        "vectors are F32.",
        "",
        "This page is made by `python docs/quantisation.py OUT`; no number of it is typed by hand.",
        "",
        f"- Files: {', '.join(f'{kind} {sizes[run.model]:,} bytes' for kind, run in zip(kinds, runs, strict=True))}.",
        *(
            f"- {kind}: {_listed(names)} from {kinds[0]}; {_moved(runs[0], run)}."
            for kind, names, run in zip(kinds[1:], changed, runs[1:], strict=True)
        ),
        "",
        "## Verdicts",
        "",
        _row(["claim", *kinds]),
        _row(["---"] * (len(kinds) + 1)),
    ]
    entries = [{entry["id"]: entry for entry in run.claims} for run in runs]
    for identity, entry in entries[0].items():
        verdicts = [shown_verdict(others[identity]) if identity in others else "" for others in entries]
        lines.append(_row([f"{identity} {entry['title']}", *verdicts]))
    lines += ["", "## Metrics", "", "Means with their 95 % bootstrap intervals over prompts."]
    for experiment, result in runs[0].results.items():
        if not result.metrics:
            continue
        lines += ["", f"### {experiment}", "", _row(["metric", *kinds]), _row(["---"] * (len(kinds) + 1))]
        for metric in result.metrics:
            lines.append(_row([f"`{metric}`", *(_value(run, experiment, metric) for run in runs)]))
    return "\n".join(lines) + "\n"


def _changed(first: Reproduction, other: Reproduction) -> list[str]:
    """The claims whose verdicts differ."""
    verdicts = {entry["id"]: shown_verdict(entry) for entry in first.claims}
    return [entry["id"] for entry in other.claims if shown_verdict(entry) != verdicts.get(entry["id"])]


def _listed(names: Sequence[str]) -> str:
    return f"the verdicts of {', '.join(names)} differ" if names else "no verdict differs"


def _moved(first: Reproduction, other: Reproduction) -> str:
    """How many metrics leave the interval of the first run."""
    apart = total = 0
    for experiment, result in first.results.items():
        metrics = other.results[experiment].metrics if experiment in other.results else {}
        for name in result.metrics.keys() & metrics.keys():
            ours, theirs = result.metrics[name], metrics[name]
            total += 1
            apart += not (ours.low <= theirs.high and theirs.low <= ours.high)
    return f"of {total} metrics {apart} have intervals that do not overlap"


def _value(run: Reproduction, experiment: str, metric: str) -> str:
    interval = run.results[experiment].metrics.get(metric) if experiment in run.results else None
    if interval is None:
        return ""
    return f"{number(interval.value)} [{number(interval.low)}, {number(interval.high)}]"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    measured = measure(directory, int(sys.argv[2]) if len(sys.argv) > 2 else SAMPLES)
    files = {run.model: (directory / f"{run.model}.gguf").stat().st_size for run in measured}
    PAGE.write_text(page(measured, files), encoding="utf-8")
