"""`report.md`: the claims for pasting into an issue, a review or a README."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from p0circuit.report.contents import Reproduction, shown_verdict, tally, verdict_of_control
from p0circuit.stats import Interval


def to_markdown(runs: Sequence[Reproduction]) -> str:
    """The claims of one or several models as Markdown."""
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
    if run.beside:
        lines += ["", "Published figures beside ours:", "", *(f"- {_text(str(row))}" for row in run.beside)]
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown table, with an empty line after it."""
    cells = [list(head), ["---"] * len(head), *map(list, rows)]
    return [*("| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in row) + " |" for row in cells), ""]


def _text(text: str) -> str:
    """Text that Markdown shows as it is: token text may hold anything."""
    return re.sub(r"[\\`*<|~]|\](?=\()|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(text.split()))
