"""What the fuzz tests share: tries, seeds, and the table of outcomes in docs/robustness.md."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

FULL = 10  # the full suite makes ten times the tries of the quick suite


class Tally:
    """Counts the outcomes of the tries of one area.

    Every try must end in one of three ways; anything else fails the test.

    right: the input had a meaning, and the result is that meaning. counted: the input was left out, under a
    reason by which such inputs are counted. named: the input was refused by an error that names it.
    """

    OUTCOMES = ("right", "counted", "named")

    def __init__(self, area: str, mode: str) -> None:
        self.area, self.mode = area, mode
        self.counts: Counter[str] = Counter()

    def tries(self, quick: int) -> int:
        """The number of tries: `quick` in the quick suite, ten times as many with `--full`."""
        return quick * (FULL if self.mode == "full" else 1)

    def draws(self, quick: int) -> Iterator[random.Random]:
        """Yield one random generator per try.

        The generators are the same in every run; `--full` uses other seeds than the quick suite.
        """
        for i in range(self.tries(quick)):
            yield random.Random(f"{self.area} {self.mode} {i}")

    def add(self, outcome: str) -> None:
        """Count a try with this outcome; raises `AssertionError` if it is none of the three."""
        assert outcome in self.OUTCOMES, (
            f"{outcome!r} is no outcome; a try ends in {', '.join(self.OUTCOMES)}"
        )
        self.counts[outcome] += 1

    def row(self) -> str:
        """The area's row of the table: area, suite, tries, and the count of each outcome."""
        return (
            f"| {self.area} | {self.mode} | {self.counts.total()} | "
            + " | ".join(str(self.counts[outcome]) for outcome in self.OUTCOMES)
            + " |"
        )


@pytest.fixture(params=["quick", pytest.param("full", marks=pytest.mark.slow)])
def tally(request: pytest.FixtureRequest, row: Callable[[str], None]) -> Iterator[Tally]:
    """A `Tally` named after the test; its row is printed at the end of the run."""
    found = Tally(request.node.originalname.removeprefix("test_").replace("_", " "), request.param)
    yield found
    assert found.counts, "a fuzz test that counts nothing has tried nothing"
    row(found.row())
