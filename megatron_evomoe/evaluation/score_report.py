"""Writes predictions, metrics and submission files, and prints the metrics as tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_evomoe.data.files import write_atomically
from megatron_evomoe.evaluation.item import Benchmark, BenchmarkError, Item, Metrics


def report(benchmark: Benchmark, items: Sequence[Item], answers: Mapping[str, str], output: Path) -> None:
    """Score the answers, then write and print the results, with predictions in the order of the questions.

    Raises:
        BenchmarkError: a question has no answer; nothing is written.
    """
    missing = [item.id for item in items if item.id not in answers]
    if missing:
        raise BenchmarkError(
            f"{len(missing)} of {len(items)} questions have no answer, the first: {missing[0]}; run the same "
            "command again to answer them"
        )
    metrics = benchmark.score(items, answers)
    lines = [
        json.dumps(
            {"question_id": i.id, "prompt": i.prompt, "text": answers[i.id], "answer": i.metadata["answer"]},
            ensure_ascii=False,
        )
        for i in items
    ]
    document = {"benchmark": benchmark.name, "questions": len(items), "metrics": metrics}
    written = [output / "predictions.jsonl", output / "metrics.json"]
    write_atomically(written[0], ("\n".join(lines) + "\n").encode())
    write_atomically(written[1], (json.dumps(document, indent=1) + "\n").encode())
    if benchmark.submission is not None:
        written += benchmark.submission(items, answers, output)
    _print(f"{benchmark.name}, {len(items)} questions", metrics, written)


def _print(title: str, metrics: Metrics, written: Sequence[Path]) -> None:
    console = Console(soft_wrap=True)
    console.print(title, style="bold", highlight=False)
    for table in tables(metrics):
        console.print(table)
    if not metrics:
        console.print(
            "the true answers are not public; submit the submission file to the benchmark's server",
            markup=False,
        )
    for path in written:
        console.print(f"wrote {path}", markup=False, highlight=False)


def tables(metrics: Metrics) -> Iterator[Table]:
    """A table of the plain numbers, and one for each mapping: a row for each category."""
    plain = {name: {"value": value} for name, value in metrics.items() if not isinstance(value, dict)}
    if plain:
        yield _table("", "metric", plain)
    for name, by in metrics.items():
        if isinstance(by, dict):
            yield _table(
                name.replace("_", " "),
                "",
                {row: v if isinstance(v, dict) else {"value": v} for row, v in by.items()},
            )


def _table(title: str, head: str, rows: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(head, title=title or None, title_justify="left")
    for column in next(iter(rows.values())):
        table.add_column(column, justify="right")
    for name, values in rows.items():
        table.add_row(name, *(f"{value:.2f}" for value in values.values()))
    return table
