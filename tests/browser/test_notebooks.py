"""The shipped notebooks as pages: attention views answer to a click, formulas are drawn, nothing is asked for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from p0circuit.course import build as notebooks
from p0circuit.course.export import notebook_page

pytestmark = pytest.mark.browser

NAMES = notebooks.names()
TOKEN = ".attention-view button"
COLOURS = f"[...document.querySelectorAll('{TOKEN}')].map(one => one.style.backgroundColor)"


def source(name: str) -> str:
    return (notebooks.folder() / f"{name}.py").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_page(tmp_path: Path, open_page: Callable[..., Any], name: str) -> None:
    path = tmp_path / f"{name}.html"
    path.write_text(notebook_page(notebooks.folder() / f"{name}.ipynb"), encoding="utf-8")
    opened = open_page(path, viewport={"width": 1000, "height": 900})
    page = opened.page
    assert page.title() == notebooks.title(name) == page.inner_text("h1")
    widths = page.eval_on_selector_all("img", "all => all.map(one => one.naturalWidth)")
    assert widths and min(widths) > 0
    told = page.eval_on_selector_all("img", "all => all.map(one => one.alt)")
    assert all(one and not one.startswith("No desc") for one in told) and len(set(told)) == len(told)
    assert page.locator("math[display=block]").count() == source(name).count("\n# $$")
    assert not re.search(r"\$|FORMULA\d", "".join(page.locator(".text_cell p").all_inner_texts()))
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the screen"
    views = page.locator(".attention-view")
    assert views.count() == source(name).count("view_heads(")
    if views.count():
        page.wait_for_selector(TOKEN)
        before = page.evaluate(COLOURS)
        page.click(f"{TOKEN} >> nth=5")
        page.mouse.move(0, 0)
        page.wait_for_function(f"before => {COLOURS}.some((colour, place) => colour !== before[place])", arg=before)
    solutions = page.locator("details")
    for number in range(solutions.count()):
        solution = solutions.nth(number)
        assert not solution.locator(".highlight").is_visible()
        solution.locator("summary").click()
        assert solution.locator(".highlight").is_visible()
    assert (opened.asked_for, opened.errors) == ([], [])


def test_links_lead_to_pages_or_nowhere(tmp_path: Path) -> None:
    page = notebook_page(notebooks.folder() / f"{NAMES[0]}.ipynb")
    links = re.findall(r'href="([^"]+)"', page)
    assert "01_meet_the_sink.html" in links
    assert all(link.startswith(("https://", "#")) or link.removesuffix(".html") in NAMES for link in links)
    assert '<span title="../p0circuit/experiments/paper/c01_sink_map.py">' in page


@pytest.mark.parametrize(("formula", "told"), [("x_", "Missing"), ("\\nosuch{x}", r"\\nosuch is not known")])
def test_a_formula_that_cannot_be_read_is_shown(tmp_path: Path, formula: str, told: str) -> None:
    import nbformat

    cell = nbformat.v4.new_markdown_cell(f"# Title\n\nCode `$x_$` stays, but ${formula}$ is broken.")
    path = tmp_path / "broken.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    with pytest.raises(ValueError, match=f"the formula .* cannot be read: .*{told}"):
        notebook_page(path)
    with pytest.raises(ValueError, match="there is no notebook at"):
        notebook_page(tmp_path / "none.ipynb")
