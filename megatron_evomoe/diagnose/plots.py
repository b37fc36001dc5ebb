"""`python -m megatron_evomoe plot --run DIR`: figures from the JSONL files of a run alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_evomoe.diagnose import diagnostics_file
from megatron_evomoe.observe import jsonl

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class NothingToPlotError(Exception):
    """The run holds no data for this figure; the message says which is missing."""


def plot_all(run_dir: str | Path, out_dir: str | Path) -> list[Path]:
    """Write each figure for which the run has data as a PNG file, and print why others are left out.

    Raises:
        FileNotFoundError: `run_dir` is not a directory.
        RuntimeError: matplotlib is not installed.
    """
    run_dir, out_dir = Path(run_dir), Path(out_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"no run directory {run_dir}; give the directory that holds metrics.jsonl")
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise RuntimeError(f"figures need matplotlib ({error}); pip install matplotlib") from error
    out_dir.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in FIGURES.items():
        try:
            figure = draw(run_dir)
        except NothingToPlotError as reason:
            print(f"skipped {name}.png: {reason}")
            continue
        path = out_dir / f"{name}.png"
        figure.savefig(path)
        plt.close(figure)
        written.append(path)
    return written


def draw_loss(run_dir: Path) -> Figure:
    """The loss of all stages over the steps of the run, and held-out accuracy where events.jsonl has it."""
    from megatron_evomoe.diagnose import figures

    curves: dict[str, dict[int, float]] = {}
    last_step: dict[str, int] = {}
    for record in jsonl.read(run_dir / "metrics.jsonl"):
        if "lm loss" in record:
            curves.setdefault(record["stage"], {})[record["step"]] = float(record["lm loss"])
    if not curves:
        raise NothingToPlotError(f"no 'lm loss' in {run_dir / 'metrics.jsonl'}")
    stages, start, starts = [], 0, {}
    for name, points in curves.items():
        steps = sorted(points)
        stages.append({"name": name, "start": start, "steps": steps, "loss": [points[s] for s in steps]})
        starts[name], last_step[name] = start, steps[-1]
        start += steps[-1]
    evaluations: dict[tuple[str, int], dict[str, Any]] = {}
    for event in jsonl.read(run_dir / "events.jsonl"):
        if event["event"] == "eval" and event.get("stage") in starts and event.get("accuracy") is not None:
            step = event.get("step", last_step[event["stage"]])
            evaluations[event["stage"], step] = {  # a repeated evaluation replaces the earlier one
                "x": starts[event["stage"]] + step,
                "accuracy": _by_kind(event["accuracy"]),
                "blind": _by_kind(event.get("blind")),
            }
    return figures.loss_curves(stages, list(evaluations.values()))


def _by_kind(accuracy: Any) -> dict[str, Any]:
    if isinstance(accuracy, dict):
        return {kind: value for kind, value in accuracy.items() if value is not None}
    return {} if accuracy is None else {"accuracy": accuracy}


def draw_shares(run_dir: Path) -> Figure:
    """Draw the last `shares` record."""
    from megatron_evomoe.diagnose import figures

    record = _last(run_dir, "shares")
    counts = np.asarray(record["counts"], dtype=float)
    return figures.modality_shares(record["layers"], counts, record["divergence"], _where(record))


def draw_logits(run_dir: Path) -> Figure:
    """Draw the last `logits` record."""
    from megatron_evomoe.diagnose import figures

    record = _last(run_dir, "logits")
    if not any(cell for modality in ("text", "vision") for cell in record[modality]):
        raise NothingToPlotError("the last 'logits' record is empty")
    return figures.logit_densities(record["layers"], record, _where(record))


def draw_similarity(run_dir: Path) -> Figure:
    """Draw the last `similarity` record."""
    from megatron_evomoe.diagnose import figures

    record = _last(run_dir, "similarity")
    return figures.similarities(
        record["layers"], {k: np.asarray(v, dtype=float) for k, v in record["of"].items()}, _where(record)
    )


FIGURES: dict[str, Callable[[Path], Any]] = {
    "loss": draw_loss,
    "modality_share": draw_shares,
    "router_logits": draw_logits,
    "expert_similarity": draw_similarity,
}


def _last(run_dir: Path, kind: str) -> dict[str, Any]:
    records = [r for r in diagnostics_file.read(run_dir, kind) if r["layers"]]
    if not records:
        raise NothingToPlotError(f"no {kind!r} record with MoE layers in {run_dir / diagnostics_file.FILE}")
    return records[-1]


def _where(record: dict[str, Any]) -> str:
    return f"stage {record['stage']}, step {record['step']}"
