"""The documentation site builds without a warning, and its pages open in a real browser."""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the built site."""
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Address of a local server that serves the site."""
    handler = functools.partial(_Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Do not log requests."""


@pytest.fixture(scope="module")
def browser():  # type: ignore[no-untyped-def]
    """A headless Chromium installed on this machine; CHROMIUM names another one."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} on PATH, and CHROMIUM is not set")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


def pages(site: Path) -> list[str]:
    """Every page of the site as a path relative to its root."""
    return sorted(str(p.relative_to(site)) for p in site.rglob("*.html") if p.name != "404.html")


def test_every_flag_and_command_is_listed(site):
    from megatron_evomoe import cli
    from megatron_evomoe.config.run import FLAT

    fields = (site / "reference/fields.html").read_text(encoding="utf-8")
    listed = set(re.findall(r'<code id="([\w-]+)">--', fields))
    assert listed == {flat.replace("_", "-") for flat in FLAT}
    commands = (site / "reference/commands.html").read_text(encoding="utf-8")
    assert [c.name for c in cli.COMMANDS if f'<h2 id="{c.name}"' not in commands] == []


def test_nothing_is_loaded_from_elsewhere(site):
    loaded = {
        target
        for page in pages(site)
        for tag in re.findall(r"<(?:script|link|img|iframe)[^>]*>", (site / page).read_text(encoding="utf-8"))
        for target in re.findall(r'(?:src|href)="((?:https?:)?//[^"]*)"', tag)
    }
    assert loaded == set()


@pytest.mark.parametrize(("scheme", "shown", "some"), [("light", "default", 99), ("dark", "slate", 4)])
def test_pages_open_in_a_browser(site, address, browser, scheme, shown, some):
    """Pages open without errors and without requests to other hosts.

    Each page has a heading and does not scroll sideways, on a wide and on a narrow screen.
    """
    page = browser.new_page(color_scheme=scheme)
    # Loading the search index takes most of a page's time, so one with a single entry replaces it.
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    short = json.dumps({**index, "docs": index["docs"][:1]})
    page.route("**/search_index.json", lambda route: route.fulfill(body=short))
    faults: list[str] = []
    page.on("console", lambda said: faults.append(f"console: {said.text}") if said.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(f"script: {error}"))
    page.on("requestfailed", lambda request: faults.append(f"{request.failure}: {request.url}"))
    page.on("response", lambda got: faults.append(f"{got.status}: {got.url}") if got.status >= 400 else None)
    page.on("request", lambda asked: faults.append(f"asked: {asked.url}") if address not in asked.url else 0)
    for name in pages(site)[:some]:
        page.set_viewport_size({"width": 1280, "height": 800})
        page.goto(f"{address}/{name}")
        for width in (1280, 375):
            page.set_viewport_size({"width": width, "height": 800})
            if not page.locator("article h1").first.is_visible():
                faults.append(f"{name}: no visible heading at {width} pixels")
            found = page.evaluate("document.documentElement.scrollWidth")
            if found > width:
                faults.append(f"{name}: {found} pixels wide on a screen of {width}")
        if (found := page.evaluate("document.body.getAttribute('data-md-color-scheme')")) != shown:
            faults.append(f"{name}: colour scheme {found}")
    page.close()
    # Going to the next page aborts requests of the last one that are still under way.
    found = [fault for fault in faults if not fault.startswith("net::ERR_ABORTED")]
    assert not found, "\n".join(found)


def test_search_finds_a_flag(address, browser):
    page = browser.new_page()
    page.goto(f"{address}/index.html", wait_until="networkidle")
    page.locator("input[name=query]").click()
    page.keyboard.type("capacity factor")
    page.locator(".md-search-result__item").first.wait_for(timeout=30_000)
    assert page.locator(".md-search-result__item").count() > 0
    page.close()
