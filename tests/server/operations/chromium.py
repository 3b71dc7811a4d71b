"""The browser that the dashboard is tried in."""

import pytest

from tools.browser import VARIABLE, find_chromium

CHROMIUM = find_chromium()
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason=f"no Chromium is found: install the package chromium, or name it in {VARIABLE}"
)
