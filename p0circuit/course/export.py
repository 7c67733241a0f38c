"""Export a notebook as one HTML page that opens offline.

1. Formulas become MathML, which browsers display without a script. They are replaced by marks before Markdown is
   rendered, so that Markdown does not read their symbols as markup, and are put back afterwards.
2. nbconvert renders the cells. Its own page would load scripts from outside hosts, so only the cells are used.
3. Links between notebooks lead to their pages. Links to files of the repository become text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from p0circuit.errors import P0Error

_MATH = re.compile(
    r"(?P<code>^```.*?^```|`[^`\n]*`)|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$]+?)\$", re.DOTALL | re.MULTILINE
)
_LINK = re.compile(r'<a href="(?P<to>(?!https?:|#)[^"]*)">(?P<text>.*?)</a>', re.DOTALL)


def notebook_page(path: Path) -> str:
    """Return the HTML page of an executed notebook.

    Args:
        path: path of the notebook.

    Raises:
        P0Error: there is no such notebook, or a formula cannot be converted.
    """
    import nbformat
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    from p0circuit.report.html import render

    if not path.is_file():
        raise P0Error(f"there is no notebook at {str(path)!r}")
    notebook = nbformat.read(path, as_version=4)
    formulas: list[str] = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _without_math(cell.source, formulas)
    lines = (line for cell in notebook.cells if cell.cell_type == "markdown" for line in cell.source.splitlines())
    heading = next((line[2:] for line in lines if line.startswith("# ")), path.stem)
    exporter: Any = HTMLExporter(template_name="basic", exclude_anchor_links=True)
    body, _ = exporter.from_notebook_node(notebook)
    body = _LINK.sub(_link, body)
    body = re.sub(r"FORMULA(\d+)FORMULA", lambda match: formulas[int(match.group(1))], body)
    style = HtmlFormatter(style="default").get_style_defs(".highlight")
    return render("notebook.html.j2", title=heading, body=body, highlighting=style)


def _without_math(source: str, formulas: list[str]) -> str:
    """Replace each formula in Markdown by a mark, and append its MathML to `formulas`."""
    from latex2mathml.converter import convert

    def mark(match: re.Match[str]) -> str:
        if match.group("code"):
            return match.group()
        display = "block" if match.group("block") else "inline"
        latex = (match.group("block") or match.group("inline")).strip()
        try:
            formula = convert(latex, display=display)
        except Exception as error:
            raise P0Error(f"the formula {latex!r} cannot be read: {type(error).__name__} {error}") from error
        # The converter leaves unknown commands unchanged.
        if unknown := re.search(r"\\\w+", formula):
            raise P0Error(f"the formula {latex!r} cannot be read: {unknown.group()} is not known")
        formulas.append(formula)
        return f"FORMULA{len(formulas) - 1}FORMULA"

    return _MATH.sub(mark, source)


def _link(match: re.Match[str]) -> str:
    to, text = match.group("to", "text")
    if to.endswith(".ipynb") and "/" not in to:
        return f'<a href="{to.removesuffix(".ipynb")}.html">{text}</a>'
    return f'<span title="{to}">{text}</span>'
