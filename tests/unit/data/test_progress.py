"""Progress is said in lines where there is no terminal, and not too often."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from megatron_evomoe.data import progress
from megatron_evomoe.data.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """The time that `progress` sees, as a list of one number."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines(clock):
    said = []
    with Progress("counting", "things", 100, said.append) as shown:
        for done in range(0, 101, 5):
            shown.at(done)
            shown.at(done)
            clock[0] += 2
    assert said == [
        "counting: 0 of 100 things",
        "counting: 25 of 100 things, 2 a second, 30 s left",
        "counting: 50 of 100 things, 2 a second, 20 s left",
        "counting: 75 of 100 things, 2 a second, 10 s left",
        "counting: 100 of 100 things, 2 a second",
    ]


def test_work_that_was_begun_before_does_not_count_for_the_rate(clock):
    said = []
    with Progress("counting", "things", 100, said.append) as shown:
        shown.at(90)
        clock[0] += 5
        shown.at(100)
    assert said[-1] == "counting: 100 of 100 things, 2 a second"


def test_bar_on_a_terminal(monkeypatch):
    screen, said = io.StringIO(), []
    terminal = Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr(progress, "Console", lambda: terminal)
    with Progress("[counting]", "things", 100, said.append) as shown:
        shown.at(100)
    assert not said and "[counting]" in screen.getvalue() and "100/100" in screen.getvalue()
    with Progress("hidden", "things", 100, None) as shown:
        shown.at(100)
    assert "hidden" not in screen.getvalue()
