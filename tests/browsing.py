"""What the tests of pages have in common."""

import shutil
from typing import Any

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
PATIENCE = 300_000  # milliseconds; a step takes seconds where others want the cores
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


def foreign(url: str, address: str) -> bool:
    """Whether a page at an address asked another one."""
    return not url.startswith((address, "data:", "blob:"))


def new_context(browser: Any, **options: object) -> Any:
    """A visitor of a browser, with patience: a test that passes does not wait."""
    context = browser.new_context(**options)
    context.set_default_timeout(PATIENCE)
    return context
