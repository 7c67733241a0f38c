"""The report as a browser shows it: nothing asked for outside, no error, figures there, tokens as text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from p0circuit.figures import attention_view as module
from p0circuit.figures.attention_view import visible
from p0circuit.report.html import write_report
from tests.report.made_up import HOSTILE, view, write_run

pytestmark = pytest.mark.browser

TOKEN = ".attention-view button"
COLOURS = f"[...document.querySelectorAll('{TOKEN}')].map(one => one.style.backgroundColor)"
SCREENS = {
    "desktop": {"viewport": {"width": 1280, "height": 900}},
    "phone": {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("out")
    write_run(directory / "one", "one")
    write_run(directory / "two", "two")
    write_report(directory)
    return directory


def colours(page: Any) -> list[str]:
    return page.evaluate(COLOURS)


def lightness(page: Any, what: str, name: str) -> float:
    shown = page.eval_on_selector(what, f"one => getComputedStyle(one).{name}")
    return sum(map(float, shown[shown.index("(") + 1 : -1].split(",")[:3])) / 3 / 255


@pytest.mark.parametrize("screen", SCREENS)
def test_report(out: Path, open_page: Callable[..., Any], screen: str) -> None:
    opened = open_page(out / "one" / "report.html", **SCREENS[screen])
    page = opened.page
    page.wait_for_selector(TOKEN)
    widths = page.eval_on_selector_all("img", "all => all.map(one => one.naturalWidth)")
    assert len(widths) == 3 and min(widths) > 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the screen"
    background, text = lightness(page, "body", "backgroundColor"), lightness(page, "body", "color")
    assert (background < 0.2 and text > 0.8) if screen == "dark" else (background > 0.9 and text < 0.2)
    assert (opened.asked_for, opened.errors) == ([], [])


def test_overview_leads_to_a_claim(out: Path, open_page: Callable[..., Any]) -> None:
    opened = open_page(out / "report.html")
    opened.page.click("tr:has-text('C10') td:nth-child(3) a")
    opened.page.wait_for_selector("h2#C10")
    assert opened.page.url == (out / "two" / "report.html").as_uri() + "#C10"
    assert opened.errors == []


def test_tokens_are_text_and_a_click_answers(out: Path, open_page: Callable[..., Any]) -> None:
    opened = open_page(out / "one" / "report.html")
    page = opened.page
    page.wait_for_selector(TOKEN)
    shown = page.eval_on_selector_all(TOKEN, "all => all.map(one => [one.textContent, one.childElementCount])")
    assert shown == [[visible(token), 0] for token in HOSTILE]
    assert page.locator(".attention-view figcaption").all_inner_texts() == ["1.0", "1.1", "</script>"]
    before = colours(page)
    page.click(f"{TOKEN} >> nth=1")
    page.mouse.move(0, 0)
    page.wait_for_function(f"before => {COLOURS}.some((colour, place) => colour !== before[place])", arg=before)
    after = colours(page)
    # The second token attends to the first two, half and half, and to nothing after.
    assert after[0] == after[1] != "rgb(255, 255, 255)"
    assert set(after[2:]) == {"rgb(255, 255, 255)"}
    assert (opened.asked_for, opened.errors) == ([], [])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["script first", "script last"])
def test_views_of_a_notebook_share_one_script(
    tmp_path: Path, open_page: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, order: tuple[int, int]
) -> None:
    monkeypatch.setattr(module, "_carrier", None)
    outputs = [view()._repr_html_(), view()._repr_html_()]
    body = "".join(f"<div>{outputs[place]}</div>" for place in order)
    path = tmp_path / "notebook.html"
    path.write_text(f"<!DOCTYPE html><meta charset='utf-8'><body>{body}")
    opened = open_page(path)
    opened.page.wait_for_function(f"count => {COLOURS}.length === count", arg=2 * len(HOSTILE))
    assert (opened.asked_for, opened.errors) == ([], [])
