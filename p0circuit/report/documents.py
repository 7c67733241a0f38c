"""Fill the marked parts of Markdown files with figures from runs.

A part is marked by comments, which Markdown does not show. Everything between them is replaced:

    <!-- claims: smollm2-135m, p0-nano -->  ...  <!-- end -->

claims     a table of claims by models; each cell is a verdict with the values that decided it
verdicts   the same in short; each cell is a mark and the first value that decided it
misses     one line for each claim that was not reproduced, with the reason
controls   the number of tests on controls, by verdict
passes     for one model, the passes that each experiment declared and used, and those of its full configuration
mitigations  for each mitigation, the loss added, and what is left of sink, norm and int8 error
depth      for each model, the stages of P0's stream and the components that write and erase them
training   the claims about training runs, like `claims`

    python -m p0circuit.report.documents OUT README.md docs/results.md
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from p0circuit.errors import P0Error
from p0circuit.io import write_atomically
from p0circuit.report.contents import Reproduction, claim_number, find_reproductions, shown_verdict
from p0circuit.report.markdown import table
from p0circuit.stats import Interval

_PART = re.compile(
    r"(<!-- (claims|verdicts|misses|controls|passes|mitigations|depth|training)(?:: ([^>]*?))? -->\n).*?(<!-- end -->)",
    re.DOTALL,
)
TRAINING = "training"
_MARKS = {"reproduced": "✓", "not reproduced": "✗", "not applicable": "–"}


def fill_documents(directory: Path, documents: Sequence[Path]) -> list[Path]:
    """Fill the marked parts of documents from runs.

    Args:
        directory: directory of the runs.
        documents: Markdown files.

    Returns:
        The documents that changed.

    Raises:
        P0Error: a document has no marked part, or names a model that has no run in `directory`.
    """
    runs = {run.directory.name: run for run in find_reproductions(directory)}
    filled_documents = []
    for path in documents:
        text = path.read_text(encoding="utf-8")
        if not _PART.search(text):
            raise P0Error(f"{path} has no part to fill; expected one such as <!-- claims: p0-nano --> … <!-- end -->")
        filled = _PART.sub(lambda part, path=path: _filled(part, runs, path), text)
        if filled != text:
            write_atomically(path, lambda temporary, filled=filled: temporary.write_text(filled, encoding="utf-8"))
            filled_documents.append(path)
    return filled_documents


def _filled(part: re.Match[str], runs: Mapping[str, Reproduction], path: Path) -> str:
    opening, kind, named, closing = part[1], part[2], part[3], part[4]
    names = [TRAINING] if kind == TRAINING else [name.strip() for name in (named or "").split(",") if name.strip()]
    if missing := [name for name in names if name not in runs]:
        raise P0Error(f"{path} names {', '.join(missing)}, of which there is no run; there are {', '.join(runs)}")
    lines = _KINDS[kind]([runs[name] for name in names])
    return "\n".join([opening, *lines, closing])


def claims_table(runs: Sequence[Reproduction]) -> list[str]:
    """Make a table with a row for each claim and a column for each model: the verdict and the values that decided it.

    Args:
        runs: one per model.
    """
    return _by_claim(runs, _cell)


def verdicts_table(runs: Sequence[Reproduction]) -> list[str]:
    """Make a table like `claims_table` in short: each cell is a mark and the first value that decided the verdict.

    Args:
        runs: one per model.
    """
    return _by_claim(runs, _short_cell)


def _by_claim(runs: Sequence[Reproduction], cell: Callable[[Mapping[str, Any] | None], str]) -> list[str]:
    entries: dict[str, dict[str, Any]] = {}
    for run in runs:
        for claim in run.claims:
            entries.setdefault(claim["id"], {})[run.model] = claim
    rows = []
    for by_model in sorted(entries.values(), key=lambda one: claim_number(next(iter(one.values())))):
        first = next(iter(by_model.values()))
        rows.append([f"{first['id']} {first['title']}", *(cell(by_model.get(run.model)) for run in runs)])
    return table(["claim", *(run.title for run in runs)], rows)


def misses(runs: Sequence[Reproduction]) -> list[str]:
    """List the claims that were not reproduced or not tested, each with its reason in one line.

    Args:
        runs: one per model.
    """
    lines = []
    for run in runs:
        for claim in run.claims:
            if shown_verdict(claim) != "reproduced":
                reason = claim["why"].replace("_", " ")
                about = f"{run.title}, " if len(runs) > 1 else ""
                lines.append(f"- {about}{claim['id']} {claim['title']}, {shown_verdict(claim)}: {reason}.")
    return [*(lines or ["All claims are reproduced."]), ""]


def controls_table(runs: Sequence[Reproduction]) -> list[str]:
    """Make a table of the number of tests on controls, by model and verdict.

    Args:
        runs: one per model.
    """
    verdicts = list(_MARKS)
    rows = [[run.title, *(str(run.control_cells[verdict]) for verdict in verdicts)] for run in runs]
    return table(["model", *verdicts], rows)


def passes_table(runs: Sequence[Reproduction]) -> list[str]:
    """Make a table of the passes that each experiment declared and used, and of those of its full configuration.

    Args:
        runs: exactly one.
    """
    (run,) = runs
    rows, totals = [], [0.0, 0.0, 0.0]
    for name, passes in run.manifest["passes"].items():
        values = [passes.get("full"), passes["declared"], passes["used"]]
        rows.append([name, *("" if value is None else f"{value:.1f}" for value in values)])
        totals = [total + (value or 0.0) for total, value in zip(totals, values, strict=True)]
    rows.append(["all", *(f"{total:.1f}" for total in totals)])
    about = f"{run.title}, {run.samples} prompts of {run.manifest['length']} tokens."
    return [about, "", *table(["experiment", "full configuration", "declared", "used"], rows)]


def mitigations_table(runs: Sequence[Reproduction]) -> list[str]:
    """Make a table for each model of what each mitigation does to loss, sink, norm and int8 error.

    Args:
        runs: one per model, with results of the experiment "remedies".
    """
    columns = {"loss_added": "loss added", "excess": "sink", "norm_ratio": "norm", "int8_error": "int8 error"}
    lines = []
    for run in runs:
        measured = run.results["remedies"].tables["remedies"]
        rows = []
        for name, part in measured.groupby("remedy", sort=False):
            of = {line["measured"]: line for line in part.to_dict("records")}
            values = [_short(Interval(*(of[key][end] for end in ("value", "low", "high", "n")))) for key in columns]
            rows.append([str(name), *values])
        lines += [
            f"{run.title}, {run.condition or 'text as it is'}:",
            "",
            *table(["mitigation", *columns.values()], rows),
        ]
    return lines


def depth_tables(runs: Sequence[Reproduction]) -> list[str]:
    """Make tables of each model's circuit depth, of the stages of P0's stream, and of their writers and erasers.

    Args:
        runs: one per model, with results of the experiment "depth".
    """
    lines = []
    for run in runs:
        result = run.results["depth"]
        depth = result.metrics["circuit_depth"]
        stages: list[dict[Any, Any]] = result.tables["stages"].to_dict("records")
        roles: list[dict[Any, Any]] = result.tables["roles"].to_dict("records")
        lines += [
            f"**{run.title}**, {run.condition or 'text as it is'}: circuit depth {depth.value:.0f} ({depth.low:.0f} to "
            f"{depth.high:.0f} by prompt seed).",
            "",
            *table(
                ["stage", "after blocks", "norm ratio", "sink heads", "cosine to stage 1"],
                [
                    [
                        str(stage["stage"]),
                        _after_blocks(stage["first_depth"], stage["last_depth"]),
                        f"{stage['norm_ratio']:.1f}",
                        str(stage["sink_heads"]),
                        f"{stage['cosine_to_first_stage']:.2f}",
                    ]
                    for stage in stages
                ],
            ),
            *table(
                ["stage", "role", "component", "what its output at P0 does"],
                [
                    [
                        str(role["stage"]),
                        role["role"],
                        f"`{role['node']}`",
                        f"{_short(Interval(role['effect'], role['effect_low'], role['effect_high'], role['n']))} "
                        + _ROLES[role["role"]],
                    ]
                    for role in roles
                ],
            ),
        ]
    return lines


_ROLES = {
    "writer": "of the excess score of the stage's heads is lost without it",
    "eraser": "of the projection onto the stage's direction is taken away by it",
}


def _after_blocks(first: int, last: int) -> str:
    """Name the depths of the residual stream from `first` to `last`; depth 0 is the embedding."""
    names = ["embedding" if depth == 0 else str(depth - 1) for depth in dict.fromkeys((first, last))]
    return " to ".join(names)


def _cell(claim: Mapping[str, Any] | None) -> str:
    if claim is None:
        return ""
    verdict = shown_verdict(claim)
    values = [Interval(**claim["measured"][name]) for name in deciding(claim)]
    return f"{_MARKS.get(verdict, '!')} {verdict}" + (f"<br>{', '.join(map(_short, values[:2]))}" if values else "")


def _short_cell(claim: Mapping[str, Any] | None) -> str:
    if claim is None:
        return ""
    values = [f"{claim['measured'][name]['value']:.2f}" for name in deciding(claim)]
    return " ".join([_MARKS.get(shown_verdict(claim), "!"), *values[:1]])


def deciding(claim: Mapping[str, Any]) -> list[str]:
    """Return the metrics that the reason of a verdict names, in the same order.

    Args:
        claim: an entry of claims.json.
    """
    matches = {name: re.search(rf"(?<!\w){re.escape(name)} is ", claim["why"]) for name in claim["measured"]}
    starts = {name: match.start() for name, match in matches.items() if match}
    return sorted(starts, key=starts.__getitem__)


def _short(interval: Interval) -> str:
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


_KINDS: dict[str, Callable[[Sequence[Reproduction]], list[str]]] = {
    "claims": claims_table,
    "verdicts": verdicts_table,
    "training": claims_table,
    "misses": misses,
    "controls": controls_table,
    "passes": passes_table,
    "mitigations": mitigations_table,
    "depth": depth_tables,
}


if __name__ == "__main__":
    for document in fill_documents(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]]):
        print(f"{document} was filled from {sys.argv[1]}")
