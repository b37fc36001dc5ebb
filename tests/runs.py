"""Starts training runs through the command line and reads the files that they write."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from tests import programs

VOLATILE = {
    "time",
    "iteration-time",
    "tokens/s",
    "throughput",
    "samples",
    "straggler/rank",
    "straggler/seconds",
    "straggler/median-seconds",
}
"""The fields of a metric line that differ between two runs of the same configuration."""


def run(
    *argv: str, processes: int = 0, expect: int | None = 0, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m megatron_evomoe ARGV``, as several ranks if `processes` is given.

    Checks the exit status, which is 1 if any rank fails.
    """
    env = programs.environment(**extra)
    return programs.run("-m", "megatron_evomoe", *argv, ranks=processes, expect=expect, env=env)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The metric lines of a run."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def steady(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metric lines without the fields that differ between two runs of the same configuration."""
    return [{k: v for k, v in line.items() if k not in VOLATILE} for line in lines]


def four_stages(digits: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """The configuration of a small model's four stages on the data of `digits`.

    The run is saved in `folder`, and `changes` are merged into the configuration's sections.
    """
    raw: dict[str, Any] = {
        "language": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 2},
        "vision": {"hidden_size": 16, "num_layers": 2, "num_attention_heads": 2, "ffn_hidden_size": 32},
        "moe": {"dtr_hidden_size": 4, "dtr_rank": 4},
        "data": {
            "tokenizer": str(digits / "tokenizer.model"),
            "train_data": [str(digits / "instruct")],
            "eval_data": [str(digits / "heldout")],
            "seq_length": 128,
            "num_workers": 0,
        },
        "train": {"micro_batch_size": 2, "global_batch_size": 8, "seed": 1, "train_iters": 6},
        "optimizer": {"lr": 1e-3},
        "parallel": {},
        "checkpoint": {"save": str(folder / "run"), "save_interval": 2},
        "log": {"log_interval": 2, "moe_metrics_interval": 2},
        "stages": [
            {
                "name": "align",
                "train_iters": 2,
                "train_data": [str(digits / "captions")],
                "conversation_template": "plain",
            },
            {"name": "warmup"},
            {"name": "evolve"},
            {"name": "route"},
        ],
    }
    for section, values in changes.items():
        raw[section] = {**raw[section], **values} if isinstance(values, dict) else values
    return raw
