"""What the fuzz tests share: how many tries, from which seed, and the table of what came of them
(docs/robustness.md).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

FULL = 10  # times the tries of the quick suite


class Tally:
    """Counts the outcomes of one area's tries. Every try must end in one of three ways; anything else fails
    the test.

    right: the input meant something, and what came out is that. counted: the input was left out, with a
    reason by which such inputs are counted. named: the input was refused by an error that names it.
    """

    OUTCOMES = ("right", "counted", "named")

    def __init__(self, area: str, mode: str) -> None:
        self.area, self.mode = area, mode
        self.counts: Counter[str] = Counter()

    def tries(self, quick: int) -> int:
        """How many tries: `quick` in the quick suite, ten times as many with `--full`."""
        return quick * (FULL if self.mode == "full" else 1)

    def draws(self, quick: int) -> Iterator[random.Random]:
        """One generator a try, the same in every run; `--full` begins with other seeds than the quick
        suite.
        """
        for i in range(self.tries(quick)):
            yield random.Random(f"{self.area} {self.mode} {i}")

    def add(self, outcome: str) -> None:
        """Count a try that ended as it should; raises `AssertionError` for an outcome that is none of the
        three.
        """
        assert outcome in self.OUTCOMES, (
            f"{outcome!r} is no outcome; a try ends in {', '.join(self.OUTCOMES)}"
        )
        self.counts[outcome] += 1

    def row(self) -> str:
        """A row of the table: area, tries, and each outcome."""
        return (
            f"| {self.area} | {self.mode} | {self.counts.total()} | "
            + " | ".join(str(self.counts[outcome]) for outcome in self.OUTCOMES)
            + " |"
        )


@pytest.fixture(params=["quick", pytest.param("full", marks=pytest.mark.slow)])
def tally(request: pytest.FixtureRequest, row: Callable[[str], None]) -> Iterator[Tally]:
    """A `Tally` named after the test; its row is shown when the run ends."""
    found = Tally(request.node.originalname.removeprefix("test_").replace("_", " "), request.param)
    yield found
    assert found.counts, "a fuzz test that counts nothing has tried nothing"
    row(found.row())
