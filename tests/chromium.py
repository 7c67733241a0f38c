"""A headless Chromium that watches what a page says and asks for; without one these tests are skipped, plainly."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NONE_FOUND = "no Chromium was found (chromium, chromium-browser or google-chrome): tests in a browser were skipped"
# A browser looks for its maker's servers by itself.
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """One for the whole run: two of Playwright's loops do not fit into a process."""
    if CHROMIUM is None:
        pytest.skip(NONE_FOUND)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page, what it asked for other than itself, and the errors it had."""

    page: Any
    asked_for: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[..., Opened]]:
    """Opens a file as a reader would, offline; `options` are those of a browser context."""
    contexts = []

    def opening(path: Path, **options: Any) -> Opened:
        context = chromium.new_context(offline=True, **options)
        contexts.append(context)
        context.set_default_timeout(60_000)
        opened, address = Opened(context.new_page()), path.as_uri()
        page = opened.page

        def asked(request: Any) -> None:
            if request.url != address and not request.url.startswith("data:"):
                opened.asked_for.append(request.url)

        page.on("request", asked)
        page.on("console", lambda said: opened.errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: opened.errors.append(str(error)))
        page.on("dialog", lambda dialog: (opened.errors.append(dialog.message), dialog.dismiss()))
        page.goto(address)
        return opened

    yield opening
    for context in contexts:
        context.close()
