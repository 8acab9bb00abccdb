"""The server's page in Chromium; every error of the page and every request to another server is a failure."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_MS = 20_000
SCREENSHOTS = Path(__file__).resolve().parents[1] / "test-output"
NEEDED = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium")

NewPage = Callable[..., Page]
"""Opens a page with a given screen size and preferred theme."""


@contextmanager
def browsing(server: str, *expected: str) -> Iterator[NewPage]:
    """Opens pages of a server in a separate browser, see `pages`."""
    with chromium() as browser, pages(browser, server, *expected) as new:
        yield new


@contextmanager
def chromium() -> Iterator[Browser]:
    assert CHROMIUM is not None
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@contextmanager
def pages(browser: Browser, server: str, *expected: str) -> Iterator[NewPage]:
    """Yields a function that opens pages of a server. expected: texts of the browser's errors that are no failure."""
    wrong: list[str] = []
    with ExitStack() as contexts:

        def new(width: int = 1440, height: int = 900, theme: Any = "light", **options: Any) -> Page:
            size: Any = {"width": width, "height": height}
            context = contexts.enter_context(browser.new_context(viewport=size, color_scheme=theme, **options))
            context.set_default_timeout(PATIENCE_MS)
            page = context.new_page()
            page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
            page.on("console", lambda told: wrong.append(told.text) if told.type in ("error", "warning") else None)
            page.on("request", lambda asked: None if asked.url.startswith(server) else wrong.append(asked.url))
            return page

        yield new
    assert [text for text in wrong if not any(known in text for known in expected)] == []


def photograph(page: Page, name: str) -> None:
    """Saves a screenshot in `test-output/`."""
    SCREENSHOTS.mkdir(exist_ok=True)
    # Playwright would write the file in a thread that outlives the test.
    (SCREENSHOTS / f"dashboard-{name}.png").write_bytes(page.screenshot(animations="disabled"))
