"""A page in headless Chromium, which notes whatever should not happen."""

import shutil
from contextlib import contextmanager

import pytest
from letters import Letters

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
HOSTILE = "</script><img src=x onerror=document.title='broken'>"


class Hostile(Letters):
    """A tokenizer whose tokens try to leave the page's data."""

    def decode(self, ids):
        return HOSTILE if ids and ids[0] % 7 == 0 else super().decode(ids)


@contextmanager
def open_page(file):
    """The page in ``file``, open; what it logs, and asks for beside itself, is in ``noted``."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    own = (file.as_uri(), "blob:")

    def note_message(message):
        if message.type in ("error", "warning"):
            page.noted.append(message.text)

    def note_request(request):
        if not request.url.startswith(own):
            page.noted.append(request.url)

    with playwright.sync_playwright() as runner:
        browser = runner.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1366, "height": 768})
        page.noted = []
        page.on("console", note_message)
        page.on("pageerror", lambda error: page.noted.append(str(error)))
        page.on("request", note_request)
        page.goto(file.as_uri())
        yield page
        browser.close()
