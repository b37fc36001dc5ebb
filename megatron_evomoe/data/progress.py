"""Shows how far a long piece of work is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich import progress
from rich.console import Console

_SAY_EVERY = 10.0
"""Seconds between two lines."""


class Progress:
    """A context in which work on `total` things is shown, beginning with the first call of `at`."""

    def __init__(self, title: str, unit: str, total: int, say: Callable[[str], None] | None) -> None:
        """See the class.

        Args:
            title: what is worked on.
            unit: what is counted, in the plural.
            say: is given each line where there is no terminal. None shows nothing at all.
        """
        self._title, self._unit, self._total, self._say = title, unit, total, say
        self._began: tuple[float, int] | None = None
        self._last = (0.0, -1)
        console = Console()
        self._bar = _bar(title, unit, console) if say is not None and console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
            self._bar.add_task("", total=self._total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def at(self, done: int) -> None:
        """Show that `done` things are done; lines come every ten seconds, at the beginning and at the end."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done)
        elif self._say is not None:
            now, (then, before) = time.monotonic(), self._last
            if self._began is None:
                self._began = now, done
            if now - then >= _SAY_EVERY or (done == self._total and done != before):
                self._last = now, done
                self._say(f"{self._title}: {done} of {self._total} {self._unit}{self._rate(now, done)}")

    def _rate(self, now: float, done: int) -> str:
        assert self._began is not None
        began, first = self._began
        if done == first:
            return ""
        rate = (done - first) / max(now - began, 1e-9)
        rest = "" if done == self._total else f", {(self._total - done) / rate:.0f} s left"
        return f", {rate:.0f} a second{rest}"


def _bar(title: str, unit: str, console: Console) -> progress.Progress:
    return progress.Progress(
        progress.TextColumn(title, markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn(unit, markup=False),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=console,
    )
