"""Draws `figures/rooms.svg`, the picture of the rooms, from the imports in the package.

Run it with ``python docs/rooms_picture.py``; tests/unit/test_rooms.py compares the file with what it draws.
The boxes and their questions are the table in `architecture.md`. An arrow leads from a room to a room that it
imports; arrows that follow from others are left out.
"""

from __future__ import annotations

import re
import textwrap
from html import escape
from pathlib import Path

import grimp

DOCS = Path(__file__).parent
PICTURE = DOCS / "figures" / "rooms.svg"
PACKAGE = "megatron_evomoe"

# (column, floor) of each room; floor 0 is the ground.
PLACES = {
    "__main__": (1.5, 11),
    "cli": (1.5, 10),
    "commands": (1.5, 9),
    "evaluation": (0, 8),
    "train": (2, 8),
    "generate": (0, 7),
    "plan": (1, 7),
    "diagnose": (3, 7),
    "hf": (0, 6),
    "model": (1, 5),
    "checkpoint": (2, 5),
    "observe": (3, 5),
    "moe": (1, 4),
    "parallel": (1.5, 3),
    "data": (1.5, 2),
    "config": (1.5, 1),
    "errors": (1.5, 0),
}
BY_NAME = {("cli", "commands")}
"""`cli` imports the module of the command that was asked for, by its name (importlib)."""

WIDTH, HEIGHT, ACROSS, UP, MARGIN = 230, 62, 246, 96, 8


def table() -> dict[str, str]:
    """Room -> the question that it answers, in the order of the table in `architecture.md`."""
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z_]+)(?:/|\.py)` \| ([^|]+) \|", page, re.MULTILINE)
    return {room: question.strip() for room, question in rows}


def imports() -> set[tuple[str, str]]:
    """(room, room that it imports), lazy imports included."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    found = set(BY_NAME)
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            if "." in module and "." in imported:
                found.add((module.split(".")[1], imported.split(".")[1]))
    return {(above, below) for above, below in found if above != below}


def arrows(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """`edges` without those that a path of others implies."""

    def reaches(start: str, goal: str, without: tuple[str, str]) -> bool:
        below = [b for a, b in edges if a == start and (a, b) != without]
        return goal in below or any(reaches(room, goal, without) for room in below)

    return {edge for edge in edges if not reaches(*edge, without=edge)}


def draw(questions: dict[str, str], edges: set[tuple[str, str]]) -> str:
    """The picture as SVG text."""
    if lacking := (questions.keys() | {room for edge in edges for room in edge}) ^ PLACES.keys():
        raise ValueError(
            f"{', '.join(sorted(lacking))}: a room needs a row in docs/architecture.md and a place in "
            f"{__file__}"
        )
    floors = max(floor for _, floor in PLACES.values())
    columns = max(column for column, _ in PLACES.values())
    width, height = columns * ACROSS + WIDTH + 2 * MARGIN, floors * UP + HEIGHT + 2 * MARGIN

    def corner(room: str) -> tuple[float, float]:
        column, floor = PLACES[room]
        return MARGIN + column * ACROSS, MARGIN + (floors - floor) * UP

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        'font-family="system-ui, sans-serif">',
        "<title>The rooms of megatron_evomoe and their imports</title>",
        '<marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#5c6bc0"/></marker>',
        "<style>text{text-anchor:middle} .name{font-size:17px;font-weight:600;fill:#1a237e}"
        ".question{font-size:13px;fill:#37474f} .room{fill:#e8eaf6;stroke:#5c6bc0}"
        "line{stroke:#5c6bc0;stroke-width:1.5}</style>",
        f'<rect width="{width:g}" height="{height:g}" rx="8" fill="#ffffff"/>',
    ]
    for above, below in sorted(arrows(edges)):
        (x1, y1), (x2, y2) = corner(above), corner(below)
        dashes = ' stroke-dasharray="5 4"' if (above, below) in BY_NAME else ""
        lines.append(
            f'<line x1="{x1 + WIDTH / 2:g}" y1="{y1 + HEIGHT:g}" x2="{x2 + WIDTH / 2:g}" y2="{y2:g}" '
            f'marker-end="url(#tip)"{dashes}/>'
        )
    for room in PLACES:
        lines += _box(room, questions[room], *corner(room))
    return "\n".join([*lines, "</svg>", ""])


def _box(room: str, question: str, x: float, y: float) -> list[str]:
    text = textwrap.wrap(question.replace("`", ""), 29)
    top = y + (26 if len(text) == 1 else 20)
    lines = [
        f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="6" class="room"/>',
        f'<text x="{x + WIDTH / 2:g}" y="{top:g}" class="name">{escape(room)}</text>',
    ]
    for i, line in enumerate(text):
        place = f'x="{x + WIDTH / 2:g}" y="{top + 18 + 15 * i:g}"'
        lines.append(f'<text {place} class="question">{escape(line)}</text>')
    return lines


if __name__ == "__main__":
    PICTURE.write_text(draw(table(), imports()), encoding="utf-8")
