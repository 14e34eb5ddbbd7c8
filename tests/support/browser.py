"""A page opened in headless Chromium: its errors, requests and layout."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = (390, 1280)
"""Widths of a phone and of a desktop, in pixels."""


@dataclass(frozen=True)
class Opened:
    """Observations on an opened page.

    Attributes:
        errors: messages of the console, and uncaught errors.
        requests: addresses requested in addition to the page itself.
        width: of the page, in pixels.
        charts: widths of the drawings.
        smallest: height of the smallest text in a drawing, in pixels.
        violations: rules of accessibility (axe-core) that the page breaks.
    """

    errors: list[str]
    requests: list[str]
    width: int
    charts: list[float]
    smallest: float
    violations: list[str]


def violations(page: Any) -> list[str]:
    """Rules of axe-core that an opened page breaks, each with the first offending element."""
    from axe_playwright_python.sync_playwright import Axe

    actual = Axe().run(page).response["violations"]
    return [f"{rule['id']}: {rule['nodes'][0]['html'][:200]}" for rule in actual]


def opened(path: Path, width: int, scheme: str = "light") -> Opened:
    """Open a page in a colour scheme; skips the test if there is no Chromium."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    errors, requests = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.on("request", lambda r: requests.append(r.url))
        page.goto(path.as_uri())
        page.wait_for_load_state("networkidle")
        actual = page.evaluate("document.documentElement.scrollWidth")
        texts = "[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)"
        smallest = page.evaluate(f"Math.min(...{texts})")
        charts = page.evaluate("[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width)")
        broken = violations(page)
        browser.close()
    return Opened(
        errors, [r for r in requests if not r.startswith(("file:", "data:"))], actual, charts, smallest, broken
    )
