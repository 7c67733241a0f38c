"""The page of advice: one HTML file that opens offline, and its JSON."""

from __future__ import annotations

import base64
from pathlib import Path

from p0circuit.advice.answers import Advice
from p0circuit.advice.figure import draw_costs
from p0circuit.advice.statement import LOSS_SHARE
from p0circuit.io import write_atomically, write_json
from p0circuit.results import figure_bytes


def write_advice(advice: Advice, directory: Path) -> list[Path]:
    """Write `advice.json` and `advice.html`.

    Args:
        advice: the answers.
        directory: where to write; created if needed.

    Returns:
        The paths of both files.
    """
    from p0circuit.report.html import render

    figure = draw_costs(advice)
    picture = figure and "data:image/svg+xml;base64," + base64.b64encode(figure_bytes(figure, "svg")).decode()
    page = render("advice.html.j2", advice=advice, picture=picture, limit=f"{LOSS_SHARE:.0%}")
    written = write_json(directory / "advice.json", advice.to_json())
    html = directory / "advice.html"
    write_atomically(html, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return [written, html]
