"""The claims of a run as Markdown (`report.md`), to paste into an issue or a README."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from p0circuit.report.contents import Reproduction, shown_verdict, tally, verdict_of_control
from p0circuit.stats import Interval


def to_markdown(runs: Sequence[Reproduction]) -> str:
    """Return the claims of one or several models as Markdown.

    Args:
        runs: one per model.
    """
    return "\n".join(_section(run) for run in runs)


def _section(run: Reproduction) -> str:
    lines = [f"# {_text(run.title)}: {tally(run.claims)}", ""]
    lines += table(
        ["claim", "verdict", "why"],
        (
            [f"{claim['id']} {_text(claim['title'])}", f"**{shown_verdict(claim)}**", _text(claim["why"])]
            for claim in run.claims
        ),
    )
    for claim in run.claims:
        measured = "; ".join(f"`{name}` {Interval(**value)}" for name, value in claim["measured"].items())
        lines += [f"- **{claim['id']} {_text(claim['title'])}: {shown_verdict(claim)}.** {_text(claim['statement'])}"]
        lines += [f"  Threshold: {_text(claim['threshold'])}. Measured: {measured or 'nothing'}."]
        lines += [f"  Note: {_text(note)}" for note in claim.get("notes", ())]
    if run.controls:
        rows = ([claim["id"], *(verdict_of_control(claim, name) for name in run.controls)] for claim in run.claims)
        lines += ["", "The same claims on controls:", "", *table(["claim", *run.controls], rows)]
    if run.comparisons:
        lines += ["", "Published values and ours:", "", *(f"- {_text(str(row))}" for row in run.comparisons)]
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table, followed by an empty line.

    Args:
        head: headings of the columns.
        rows: the cells, row by row.
    """
    cells = [list(head), ["---"] * len(head), *map(list, rows)]
    return [*("| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in row) + " |" for row in cells), ""]


def _text(text: str) -> str:
    """Escape text so that Markdown shows it unchanged; tokens can contain any character."""
    return re.sub(r"[\\`*<|~]|\](?=\()|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(text.split()))
