"""What a run prints: one live line on a terminal, plain lines elsewhere (log files, pipes, CI)."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

FACTS = ("lm loss", "learning-rate", "grad-norm", "tokens/s")
ETA_WINDOW = 50
"""Steps whose mean time predicts the remaining time: enough to smooth it, few enough to drop a slow start."""


class ConsoleReport:
    """Progress, messages and tables on stdout.

    On a terminal each step replaces the line of the step before. Elsewhere every `interval`-th step, and the
    last one, is printed on a line of its own.
    """

    def __init__(self, interval: int):
        self.interval = max(1, interval)
        self._console = Console(highlight=False)
        self.is_live = self._console.is_terminal
        self._progress: Progress | None = None
        self._stage, self._total = "", 0
        self._clock: deque[tuple[float, int]] = deque(maxlen=ETA_WINDOW)

    def start_stage(self, name: str, total_steps: int, start_step: int) -> None:
        """Begin a new progress line below that of the stage before."""
        self.stop()
        self._stage, self._total = name, total_steps
        self._clock.clear()
        self._clock.append((time.perf_counter(), start_step))
        if self.is_live:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                console=self._console,
                refresh_per_second=4,
            )
            self._progress.add_task(name, total=total_steps, completed=start_step, facts="starting")
            self._progress.start()

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Show `step`'s metrics."""
        self._clock.append((time.perf_counter(), step))
        eta = self._eta(step)
        if self._progress is not None:
            facts = facts_of(metrics, eta, names=("lm loss", "tokens/s"))
            self._progress.update(self._progress.task_ids[0], completed=step, facts=facts)
        elif step % self.interval == 0 or step == self._total:
            self.say(f"[{self._stage} {step}/{self._total}] {facts_of(metrics, eta)}")

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self.is_live:
            self._console.print(text, markup=False)
            return
        # on a full disk or a closed pipe the line is lost; the JSONL files have the numbers
        with contextlib.suppress(OSError):
            print(text, flush=True)  # not by rich, which would wrap at 80 columns and break a search by grep

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Print a table, drawn by rich on a terminal and as aligned text elsewhere."""
        if not self.is_live:
            self.say(plain_table(title, columns, rows))
            return
        table = Table(title=title, title_justify="left")
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if _is_numeric([r[i] for r in rows]) else "left")
        for row in rows:
            table.add_row(*map(cell, row))
        self._console.print(table)

    def stop(self) -> None:
        """End the live line. May be called twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _eta(self, step: int) -> float | None:
        (then, first), (now, _) = self._clock[0], self._clock[-1]
        return (now - then) / (step - first) * (self._total - step) if step > first else None


def facts_of(metrics: dict[str, Any], eta: float | None, names: Sequence[str] = FACTS) -> str:
    """Metrics as `lm loss 1.234 | lr 9.9e-04 | grad-norm 0.53 | 12.3k tokens/s | eta 0:42`.

    Args:
        eta: remaining seconds.
        names: the metrics to show; those that are missing are left out.
    """
    spelled = {
        "lm loss": lambda v: f"lm loss {v:.3f}",
        "learning-rate": lambda v: f"lr {v:.1e}",
        "grad-norm": lambda v: f"grad-norm {v:.2f}",
        "tokens/s": lambda v: f"{short(v)} tokens/s",
    }
    parts = [spelled[n](float(metrics[n])) for n in names if metrics.get(n) is not None]
    if eta is not None:
        parts.append(f"eta {duration(eta)}")
    return " | ".join(parts)


def short(value: float) -> str:
    """12345 -> 12.3k, 1.2e6 -> 1.2M, 987 -> 987."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.1f}{letter}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """42 -> 0:42, 3725 -> 1:02:05."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def cell(value: Any) -> str:
    """The text of a table cell: floats with 4 significant digits, none as a dash, strings as they are."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table as text: columns aligned with spaces, numbers to the right, a rule under the header."""
    texts = [list(columns), *([cell(v) for v in row] for row in rows)]
    widths = [max(len(row[i]) for row in texts) for i in range(len(columns))]
    right = [_is_numeric([r[i] for r in rows]) for i in range(len(columns))]

    def aligned(row: list[str]) -> str:
        return "  ".join(
            t.rjust(w) if r else t.ljust(w) for t, w, r in zip(row, widths, right, strict=True)
        ).rstrip()

    lines = [aligned(row) for row in texts]
    return "\n".join([title, lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def _is_numeric(values: Sequence[Any]) -> bool:
    """Whether a column holds numbers, or strings that begin with one ("91.2 %", "12.3k")."""
    texts = [cell(v) for v in values if v is not None]
    return bool(texts) and all(
        t.lstrip("-+<>≤≥ ")[:1].isdigit() or t in ("–", "nan", "inf", "-inf") for t in texts
    )
