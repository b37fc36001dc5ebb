"""Whatever the data holds, the page shows it as text, runs no script and asks for nothing."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_evomoe.observe.data_page import Histogram, Section, ShownSample, Table, data_page

HOSTILE = [
    "<script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked = 1">',
    "</pre></article><iframe src=https://example.org></iframe>",
    "<style>@import url(https://example.org/x.css)</style>",
    "javascript:alert(1)",
    "&lt;b&gt; &amp;",
    "\ud800 \x00 \x1b[31m \r \u202e \x7f",
    "</title><script>window.hacked = 1</script>",
    "<!-- --> ]]> <!",
]
TEXT = st.one_of(
    st.sampled_from(HOSTILE), st.text(max_size=20), st.text(alphabet="<>&\"'/!-= a\x00", max_size=9)
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def page_of(text: str, image: np.ndarray) -> str:
    """A page that has `text` in each place that takes text."""
    sample = ShownSample(text, text, [(text, True), (text, False)], [image], expected=text)
    skipped = ShownSample(text, problem=text)
    table = Table(text, text, (text, "n"), [(text, "1")])
    histogram = Histogram(text, text, np.array([1, 5, 5, 9]), 7, text)
    return data_page(text, [Section(text, text, [table, histogram], [sample, skipped])])


class Reader(HTMLParser):
    """What a browser would make of the page: open elements, tags with attributes, and texts."""

    VOID = frozenset(["meta", "img", "rect", "line"])

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts, self.comments = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def handle_comment(self, data):
        self.comments.append(data)


IMAGE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(TEXT)
def test_text_stays_text(text):
    page = page_of(text, IMAGE)
    page.encode()
    found, plain = Reader(page), Reader(page_of("x", IMAGE))
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in plain.tags]  # no text becomes an element
    names = {name for _, attributes in found.tags for name in attributes}
    assert not [name for name in names if name.startswith("on")] and "href" not in names
    sources = [attributes["src"] for _, attributes in found.tags if "src" in attributes]
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,")
    assert not found.comments
    if text.isprintable() and text:
        said = "".join(data for tag, data in found.texts if tag == "mark")
        assert said == "marked" + text
    assert not set(page) & {chr(c) for c in (*range(9), *range(11, 32), *range(127, 160))}


def test_pictures_are_those_that_the_model_sees():
    image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page_of("x", image))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), image)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 5000), max_size=30), st.one_of(st.none(), st.integers(1, 5000)))
def test_bars_add_up_and_stay_inside(values, limit):
    page = data_page("x", [Section("x", "", [Histogram("h", "", np.array(values, int), limit, "limit")])])
    counts = [int(n) for n in re.findall(r"<title>\d+ to \d+: (\d+)</title>", page)]
    assert sum(counts) == len(values)
    for x, y, width, height in re.findall(
        r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', page
    ):
        assert float(x) + float(width) <= 760.6 and float(y) + float(height) <= 180.2
    assert page.count("<line") == (limit is not None and bool(values))


def test_in_a_browser(tmp_path):
    """The page is opened in a real browser: nothing runs, nothing is asked for, nothing is complained of."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} on PATH, and CHROMIUM is not set")
    file = tmp_path / "page.html"
    file.write_bytes(page_of(" ".join(HOSTILE), IMAGE).encode())
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page()
        requests, complaints = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(file.as_uri())
        assert [url for url in requests if not url.startswith("data:")] == [file.as_uri()]
        assert not complaints
        assert page.evaluate("window.hacked") is None
        assert page.evaluate("document.scripts.length") == 0
        assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth == 4)")
        assert page.locator("mark").nth(1).is_visible() and page.locator("svg rect").first.is_visible()
        browser.close()
