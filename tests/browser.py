"""A headless Chromium for tests of pages; without one they are skipped, and say why.

``SAE_ATTN_CHROMIUM`` names the program; set to ``required``, a missing one is a failure.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def _missing(reason: str) -> NoReturn:
    if os.environ.get("SAE_ATTN_CHROMIUM") == "required":
        pytest.fail(reason)
    pytest.skip(reason)


def _program(playwright: Any) -> str:
    named = os.environ.get("SAE_ATTN_CHROMIUM", "")
    if named not in ("", "required"):
        return named
    own = playwright.chromium.executable_path  # of `playwright install chromium`
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None and Path(own).exists():
        found = own
    if found is None:
        _missing(
            "no Chromium found: install one (apt-get install chromium, or playwright install "
            "chromium), or name it in SAE_ATTN_CHROMIUM"
        )
    return found


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser; the test is skipped where none is installed."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("playwright is not installed: pip install playwright")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_program(playwright), args=_FLAGS)
        yield browser
        browser.close()
