"""One HTML file that shows what a model is trained on; it needs nothing beside it and runs no code.

Whatever comes from the data is escaped, and the page forbids itself scripts and requests, so it can be opened
and passed on whatever the data holds.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
from PIL import Image

_BINS = 48
_WIDTH, _HEIGHT, _LEFT, _FOOT = 760, 180, 52, 34  # of a histogram, in pixels
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --mark: #1a7f37; --bar: #4078c0; --soft: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--soft); }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; }
td, th { border-bottom: 1px solid var(--soft); vertical-align: top; overflow-wrap: anywhere; }
article { border: 1px solid var(--soft); border-radius: 6px; padding: .6rem 1rem; margin: 1rem 0; }
article h3 { margin: 0; font-size: 1rem; overflow-wrap: anywhere; } .facts { opacity: .75; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
mark { background: none; color: var(--mark); font-weight: 600; border-bottom: 2px solid var(--mark); }
img { max-width: 20rem; margin: .3rem .6rem .3rem 0; image-rendering: auto; border: 1px solid var(--soft); }
.problem { color: #c33; } bdi { unicode-bidi: isolate; } svg text { fill: currentColor; font-size: 12px; }
"""


@dataclass
class ShownSample:
    """A sample as the model sees it."""

    title: str
    facts: str = ""
    spans: Sequence[tuple[str, bool]] = ()
    """The text, in spans; each with whether it is supervised."""
    images: Sequence[np.ndarray] = ()
    """uint8 [height, width, 3] each."""
    problem: str | None = None
    """Why the sample is not used."""
    expected: str | None = None
    """The answer that a held-out question expects."""


@dataclass
class Table:
    """A table under a heading, with a sentence on what it shows."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Histogram:
    """How many of some numbers lie where; `limit` is drawn as a line."""

    title: str
    note: str
    values: np.ndarray
    limit: int | None = None
    limit_name: str = ""


@dataclass
class Section:
    """What the stages of a run that see the same data are trained on."""

    title: str
    note: str
    parts: list[Table | Histogram] = field(default_factory=list)
    samples: list[ShownSample] = field(default_factory=list)


def data_page(title: str, sections: Iterable[Section]) -> str:
    """The whole page."""
    body = f"<h1>{_text(title)}</h1>" + "".join(text for section in sections for text in _section(section))
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )


def _text(text: str) -> str:
    """Text for any place in the page; control characters, which HTML forbids, become visible."""
    shown = "".join(
        c if c.isprintable() or c in "\n\t " or ord(c) > 159 else f"\\x{ord(c):02x}" for c in text
    )
    return escape(shown.encode(errors="backslashreplace").decode())


def _section(section: Section) -> Iterator[str]:
    yield f"<section><h2>{_text(section.title)}</h2><p>{_text(section.note)}</p>"
    for part in section.parts:
        yield from _table(part) if isinstance(part, Table) else _histogram(part)
    if section.samples:
        yield "<h3>Samples</h3><p>What is <mark>marked</mark> is supervised.</p>"
    for sample in section.samples:
        yield from _sample(sample)
    yield "</section>"


def _sample(sample: ShownSample) -> Iterator[str]:
    yield f"<article><h3><bdi>{_text(sample.title)}</bdi></h3><p class=facts>{_text(sample.facts)}</p>"
    if sample.problem is not None:
        yield f"<p class=problem>skipped: <bdi>{_text(sample.problem)}</bdi></p>"
    for image in sample.images:
        height, width = image.shape[:2]
        yield f'<img alt="picture" width="{width}" height="{height}" src="{_data_uri(image)}">'
    if sample.spans:
        marked = (f"<mark>{_text(text)}</mark>" if answer else _text(text) for text, answer in sample.spans)
        yield f"<pre>{''.join(marked)}</pre>"
    if sample.expected is not None:
        yield f"<p>expected:</p><pre>{_text(sample.expected)}</pre>"
    yield "</article>"


def _data_uri(image: np.ndarray) -> str:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def _table(table: Table) -> Iterator[str]:
    yield f"<h3>{_text(table.title)}</h3><p>{_text(table.note)}</p><table><tr>"
    yield "".join(f"<th>{_text(column)}</th>" for column in table.columns)
    for row in table.rows:
        yield "</tr><tr>" + "".join(f"<td><bdi>{_text(cell)}</bdi></td>" for cell in row)
    yield "</tr></table>"


def _histogram(histogram: Histogram) -> Iterator[str]:
    yield f"<h3>{_text(histogram.title)}</h3><p>{_text(histogram.note)}</p>"
    values, limit = histogram.values, histogram.limit
    if not len(values):
        yield "<p>None.</p>"
        return
    top = int(max(values.max(), limit or 0)) + 1
    counts, edges = np.histogram(values, bins=min(_BINS, top), range=(0, top))
    most = max(int(counts.max()), 1)
    scale = (_WIDTH - _LEFT) / top
    yield f'<svg role="img" viewBox="0 0 {_WIDTH} {_HEIGHT + _FOOT}" width="{_WIDTH}">'
    for count, low, high in zip(counts.tolist(), edges[:-1], edges[1:], strict=True):
        tall = count / most * (_HEIGHT - 20)
        yield (
            f'<rect x="{_LEFT + low * scale:.1f}" y="{_HEIGHT - tall:.1f}" '
            f'width="{max((high - low) * scale - 1, 0.5):.1f}" height="{tall:.1f}" fill="var(--bar)">'
            f"<title>{low:.0f} to {high:.0f}: {count}</title></rect>"
        )
    yield f'<text x="0" y="24">{most}</text><text x="{_LEFT}" y="{_HEIGHT + 16}">0</text>'
    yield f'<text x="{_WIDTH}" y="{_HEIGHT + 16}" text-anchor="end">{top - 1}</text>'
    if limit is not None:
        at = _LEFT + limit * scale
        yield f'<line x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{_HEIGHT}" stroke="#c33" stroke-dasharray="4"/>'
        yield f'<text x="{at:.1f}" y="{_HEIGHT + 30}" text-anchor="end">{_text(histogram.limit_name)}</text>'
    yield "</svg>"
