"""The documentation as a reader opens it from the disk: complete links, nothing from elsewhere, any screen."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = pytest.mark.docs

LOADED = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}
EXPECTED = {
    "index.html",
    "quick-start.html",
    "results.html",
    "course.html",
    "performance.html",
    "architecture.html",
    "glossary.html",
    "errors.html",
    "limitations.html",
    "api/index.html",
    "concepts/closed-form.html",
    "guides/your-model.html",
    "notebooks/00_tour.html",
}


@dataclass
class Html(HTMLParser):
    """The anchors of a page, where its links lead, and what it loads."""

    anchors: set[str] = field(default_factory=set)
    links: set[str] = field(default_factory=set)
    loaded: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value is not None}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.add(values["href"])
        canonical = tag == "link" and values.get("rel") in ("canonical", "prev", "next")
        self.loaded |= {value for name, value in values.items() if (tag, name) in LOADED and not canonical}


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Html]:
    read = {}
    for path in sorted(site.rglob("*.html")):
        page = read[path.relative_to(site).as_posix()] = Html()
        page.feed(path.read_text(encoding="utf-8"))
    return read


def test_every_page_is_there(pages: dict[str, Html]) -> None:
    assert pages.keys() >= EXPECTED


def test_every_link_and_anchor_leads_somewhere(site: Path, pages: dict[str, Html]) -> None:
    broken = []
    for name, page in pages.items():
        for link in page.links | page.loaded:
            target = urlsplit(link)
            if target.scheme:
                continue
            path = (site / name).parent / unquote(target.path) if target.path else site / name
            if not path.is_file():
                broken.append(f"{name}: {link}")
            elif target.fragment and path.suffix == ".html":
                anchors = pages[path.resolve().relative_to(site.resolve()).as_posix()].anchors
                if unquote(target.fragment) not in anchors:
                    broken.append(f"{name}: {link}")
    assert broken == []


def test_nothing_is_loaded_from_elsewhere(pages: dict[str, Html]) -> None:
    outside = [
        f"{name}: {one[:80]}" for name, page in pages.items() for one in page.loaded if urlsplit(one).scheme != ""
    ]
    assert [one for one in outside if ": data:" not in one] == []


@dataclass
class Tab:
    """A page of the browser, its errors, and its requests to other hosts."""

    page: Any
    errors: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)


SCREENS: dict[str, dict[str, Any]] = {
    "wide": {"viewport": {"width": 1280, "height": 900}},
    "phone, dark": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "color_scheme": "dark"},
}


@pytest.fixture
def open_tab(chromium: Any) -> Iterator[Callable[..., Tab]]:
    contexts = []

    def opening(**screen: Any) -> Tab:
        context = chromium.new_context(offline=True, **screen)
        contexts.append(context)
        context.set_default_timeout(60_000)
        tab = Tab(context.new_page())

        def requested(request: Any) -> None:
            if not request.url.startswith(("file:", "data:", "blob:")):
                tab.outside.append(request.url)

        tab.page.on("request", requested)
        tab.page.on("console", lambda line: tab.errors.append(line.text) if line.type == "error" else None)
        tab.page.on("pageerror", lambda error: tab.errors.append(str(error)))
        return tab

    yield opening
    for context in contexts:
        context.close()


@pytest.mark.browser
@pytest.mark.parametrize("screen", SCREENS)
def test_every_page_opens_offline(
    site: Path, pages: dict[str, Html], open_tab: Callable[..., Tab], screen: str
) -> None:
    tab, problems, width = open_tab(**SCREENS[screen]), [], SCREENS[screen]["viewport"]["width"]
    for name in pages:
        tab.page.goto((site / name).as_uri())
        too_wide = tab.page.evaluate("document.documentElement.scrollWidth") - width
        colour = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
        dark = sum(map(int, re.findall(r"\d+", colour)[:3])) < 3 * 128
        if tab.errors or tab.outside or too_wide > 0 or dark != ("dark" in screen):
            problems.append((name, tab.errors[:], tab.outside[:], too_wide, dark))
            tab.errors.clear(), tab.outside.clear()
    assert problems == []


@pytest.mark.browser
def test_the_search_works_from_the_disk(site: Path, open_tab: Callable[..., Tab]) -> None:
    tab = open_tab(**SCREENS["wide"])
    tab.page.goto((site / "index.html").as_uri())
    tab.page.fill(".md-search__input", "closed form")
    tab.page.wait_for_selector(".md-search-result__link >> text=closed form")
    assert tab.errors == [] and tab.outside == []
