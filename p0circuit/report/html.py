"""The report of a run: `report.html`, one file that opens offline, and `report.md`.

1. Read claims.json, the results, the attention views and the manifest (`contents`).
2. Fill the templates. Figures, style and scripts are embedded, so the page loads nothing.
3. For several models: one report each, and a page with the claims of all.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from p0circuit.figures.attention_view import script, visible
from p0circuit.io import write_atomically
from p0circuit.report import contents
from p0circuit.report.contents import Reproduction, find_reproductions
from p0circuit.report.markdown import to_markdown
from p0circuit.report.published import TOLERANCE

MOST_ROWS = 20
"""Rows of a table that the page shows; the CSV file has them all."""
# Sign and style class. Sign and text carry the verdict too, for readers who cannot tell the colours apart.
_BADGES = {
    "reproduced": ("✓", "yes"),
    "not reproduced": ("✗", "no"),
    "not applicable": ("–", "none"),
    contents.BROKE_OFF: ("!", "error"),
}


def write_report(directory: Path) -> list[Path]:
    """Write `report.html` and `report.md` of one or several runs.

    Args:
        directory: directory of one run, or of several; with several, each run gets its own report and `directory` gets
            an
            overview.

    Returns:
        The paths of the files.

    Raises:
        P0Error: there is no run, or it cannot be read.
    """
    runs = find_reproductions(directory)
    written = []
    for run in runs:
        written += _write(run.directory, render("model.html.j2", run=run, script=script), to_markdown([run]))
    if [run.directory for run in runs] != [directory]:
        left_out = contents.read_overview(directory)["left_out"]
        written += _write(directory, render("overview.html.j2", runs=runs, left_out=left_out), to_markdown(runs))
    return written


def _write(directory: Path, page: str, text: str) -> list[Path]:
    files = {directory / "report.html": page, directory / "report.md": text}
    for path, content in files.items():
        write_atomically(path, lambda temporary, content=content: temporary.write_text(content, encoding="utf-8"))
    return list(files)


def render(template: str, **values: object) -> str:
    """Render a page from a template.

    Args:
        template: file name of the template.
        **values: variables of the template.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": contents.number,
        "plain": contents.plain,
        "tally": contents.tally,
        "shown_verdict": contents.shown_verdict,
        "condition": contents.condition_in_words,
        "picture": _picture,
        "cell": _cell,
        "breakable": _breakable,
    }
    environment.globals |= {
        "badge_of": lambda verdict: _BADGES.get(verdict, ("?", "none")),
        "command_for": contents.command_for,
        "verdict_of_control": contents.verdict_of_control,
        "decides": _decides,
        "models_and_claims": _models_and_claims,
        "most_rows": MOST_ROWS,
        "tolerance": TOLERANCE,
    }
    return environment.get_template(template).render(**values)


def _picture(png: Path) -> str:
    """Return the SVG version of a PNG figure as a data URL; it stays sharp in print."""
    return "data:image/svg+xml;base64," + base64.b64encode(png.with_suffix(".svg").read_bytes()).decode()


def _cell(value: object) -> str:
    """Format a cell of a table: short numbers, and text with visible blanks."""
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e6 else contents.number(value)
    return visible(value).replace("\u00a0", " ") if isinstance(value, str) else str(value)


def _breakable(text: str) -> Markup:
    """Allow line breaks after underscores, for long names on narrow screens."""
    return escape(text).replace("_", Markup("_<wbr>"))


def _decides(metric: str, threshold: str) -> bool:
    """Tell whether a threshold names a metric."""
    return re.search(rf"(?<!\w){re.escape(metric)}(?!\w)", threshold) is not None


def _models_and_claims(runs: Sequence[Reproduction]) -> dict[str, dict[str, Any]]:
    """Return, by claim id, the claim and every model's entry of it."""
    claims: dict[str, dict[str, Any]] = {}
    for run in runs:
        for claim in run.claims:
            claims.setdefault(claim["id"], {"claim": claim, "entries": {}})["entries"][run.model] = claim
    return dict(sorted(claims.items(), key=lambda item: contents.claim_number(item[1]["claim"])))
