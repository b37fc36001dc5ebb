"""A small but real data set, and a way to run the command line in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def environment(**extra: str) -> dict[str, str]:
    """This process's environment with the checkout importable and one thread per process."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", **extra}


def run(
    *argv: str, processes: int = 0, expect: int | None = 0, **extra: str
) -> subprocess.CompletedProcess[str]:
    """``python -m megatron_evomoe ARGV``, under torchrun where `processes` is given; checks the exit
    status.
    """
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        if processes
        else []
    )
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "megatron_evomoe", *argv],
        capture_output=True,
        text=True,
        env=environment(**extra),
        cwd=ROOT,
        timeout=600,
    )
    if expect is not None:
        assert done.returncode == expect, (
            f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        )
    return done


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The run's metric lines."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """The quickstart's data at a small size, with its tokenizer."""
    sys.path.insert(0, str(ROOT / "examples" / "digits"))
    import build_data

    folder = tmp_path_factory.mktemp("digits")
    build_data.build(
        folder, 0, instruct_samples=200, caption_samples=40, heldout_samples=24, tower_pictures=16
    )
    return folder


@pytest.fixture(scope="session")
def tiny_yaml(digits):
    """A function that writes a four-stage configuration of a small model and returns its path."""

    def write(folder: Path, **changes: Any) -> Path:
        raw = {
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
        path = folder / "run.yaml"
        path.write_text(yaml.safe_dump(raw))
        return path

    return write
