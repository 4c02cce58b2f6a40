"""Settings for all tests, and the browser that those of pages and figures share."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples in every run, so that a failure can be repeated; no deadline, since machines differ in speed.
settings.register_profile("lossbook", deadline=None, derandomize=True)
settings.load_profile("lossbook")

CHROMIUM = os.environ.get("LOSSBOOK_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
# Chromium on its own asks its maker for updates at every start.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def browser():
    """Chromium for the whole run; without it the tests are skipped, or fail where LOSSBOOK_REQUIRE_BROWSER is set."""
    if not CHROMIUM:
        message = "Chromium is missing, so NO PAGE IS READ IN A BROWSER: apt-get install chromium"
        if os.environ.get("LOSSBOOK_REQUIRE_BROWSER"):
            pytest.fail(message)
        pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


def pytest_make_parametrize_id(val, argname):
    """Bytes are named by their argument: packed files hold the time, and two processes must collect the same names."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture
def book_sources() -> None:
    """For tests that read the chapters: these do not travel with the sdist, whose tests run, too."""
    if not (Path(__file__).parents[1] / "_toc.yml").exists():
        pytest.skip("needs the chapters, which only the repository has")
