"""A Chromium that is there, driven by Playwright, to see pages as readers do.

It is looked for where DELTAWEIGHTS_CHROMIUM says, else by its usual names. Without one, tests are skipped.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def chromium_path() -> str | None:
    """The program, if there is one."""
    named = os.environ.get("DELTAWEIGHTS_CHROMIUM")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def started() -> Iterator[Browser]:
    """A browser for the block. It may ask for nothing but files."""
    path = chromium_path()
    if not path or not importlib.util.find_spec("playwright"):
        pytest.skip("needs Chromium and Playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


class Shown:
    """A page as it is shown, and what went on meanwhile.

    Attributes:
        page: Playwright's.
        requests: the addresses that were asked for, besides the page itself.
        messages: what the console showed, and errors of scripts.
    """

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.requests: list[str] = []
        self.messages: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: self.messages.append(message.text))
        page.on("pageerror", lambda error: self.messages.append(str(error)))
        page.goto(address)
        self.requests.remove(address)

    def texts(self, selector: str) -> list[str]:
        """The visible text of each element that fits."""
        found = self.page.locator(selector).all()
        return [element.inner_text() for element in found if element.is_visible()]

    def overflow(self) -> int:
        """By how many pixels the page is wider than the window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth"))
