"""`summary.json`: a row for each stage of a run that was measured, and the table printed from the rows."""

from __future__ import annotations

import json
import statistics
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_evomoe.observe import jsonl
from megatron_evomoe.train.held_out import Score
from megatron_evomoe.train.session import Session

if TYPE_CHECKING:
    from megatron_evomoe.train.stage_run import StageRun

SUMMARY = "summary.json"
_LAST = 50  # steps averaged for the table


def is_measured(session: Session, stage: str) -> bool:
    """Whether `summary.json` has a row of `stage`. Communicates: all ranks get rank 0's answer."""
    answer = [any(row["stage"] == stage for row in _rows(session)) if session.topology.rank == 0 else None]
    dist.broadcast_object_list(answer, src=0)
    return bool(answer[0])


def _rows(session: Session) -> list[dict[str, Any]]:
    path = session.run_dir / SUMMARY
    return json.loads(path.read_text()) if path.exists() else []


def write_row(run: StageRun, scores: dict[str, Score], figures: dict[str, float]) -> None:
    """Write the stage's row of `summary.json` and its `eval` event.

    The figures of its steps are read from metrics.jsonl, so a stage that was interrupted and resumed has the
    same row as one that was not.

    Args:
        figures: further cells of the row.
    """
    session, name = run.session, run.stage.name
    row: dict[str, Any] = {"stage": name, "kind": run.stage.kind, "steps": run.config.train.train_iters}
    for key, score in scores.items():
        row[key] = {"overall": score.accuracy(), **score.by_kind()}
    if session.topology.rank == 0:
        steps = [line for line in jsonl.read(session.run_dir / "metrics.jsonl") if line["stage"] == name]
        row |= {
            "first loss": steps[0]["lm loss"] if steps else None,
            "loss": statistics.fmean(line["lm loss"] for line in steps[-_LAST:]) if steps else None,
            "tokens/s": statistics.median(line["tokens/s"] for line in steps) if steps else None,
            "training seconds": sum(line["iteration-time"] for line in steps),
            **figures,
        }
        rows = [r for r in _rows(session) if r["stage"] != name]
        jsonl.replace(session.run_dir / SUMMARY, json.dumps([*rows, row], indent=1))
    if scores:
        session.logger.event(
            "eval", step=run.config.train.train_iters, accuracy=row["accuracy"], blind=row.get("blind")
        )


def print_table(session: Session) -> None:
    """Print the table of all stages measured so far."""
    rows = _rows(session) if session.topology.rank == 0 else []
    if not rows:
        return
    session.logger.table(
        "Stages",
        ["stage", "steps", "loss", "accuracy %", "blind %", "tokens/s", "trainable", "active", "seconds"],
        [
            [
                r["stage"],
                r["steps"],
                _round(r["loss"], 3),
                _percent(r, "accuracy"),
                _percent(r, "blind"),
                _round(r["tokens/s"], 0),
                r["trainable"],
                r["active"],
                _round(r["seconds"], 0),
            ]
            for r in rows
        ],
    )
    kinds = sorted({k for r in rows for k in r.get("accuracy", {}) if k != "overall"})
    if kinds:
        blind = rows[-1].get("blind", {})
        session.logger.table(
            "Held-out exact match by kind of question, %",
            ["question", *(r["stage"] for r in rows), f"{rows[-1]['stage']}, image blanked"],
            [[k, *(_of_kind(r.get("accuracy", {}), k) for r in rows), _of_kind(blind, k)] for k in kinds],
        )


def _percent(row: dict[str, Any], name: str) -> float | None:
    return _round(100 * row[name]["overall"], 1) if name in row else None


def _of_kind(accuracy: dict[str, float], kind: str) -> float | None:
    return _round(100 * accuracy[kind], 1) if kind in accuracy else None


def _round(value: float | None, digits: int) -> float | int | None:
    if value is None or value != value:
        return None
    return round(value, digits) if digits else round(value)
