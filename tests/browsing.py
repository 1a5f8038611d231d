"""What the tests of pages have in common."""

import shutil

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


def foreign(url: str, address: str) -> bool:
    """Whether a page at an address asked another one."""
    return not url.startswith((address, "data:", "blob:"))
