"""Training in FP8 learns as in bf16: 200 steps of the quickstart's `warmup`, on its data."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.gpu import needs

pytestmark = [needs.cuda, needs.transformer_engine, needs.fp8]
ROOT = Path(__file__).resolve().parents[2]
STEPS, WINDOW, TOLERANCE = 200, 20, 0.01


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    pytest.importorskip(
        "sklearn", reason="scikit-learn, whose digits the quickstart learns, is not installed"
    )
    folder = tmp_path_factory.mktemp("digits")
    run(
        "examples/digits/build_data.py",
        "--output",
        folder,
        "--instruct-samples",
        STEPS * 32,
        "--caption-samples",
        32,
        "--heldout-samples",
        16,
        "--tower-pictures",
        64,
    )
    return folder


def run(*argv: object) -> None:
    done = subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def losses(data: Path, folder: Path, steps: int = STEPS, **gpu: str) -> list[float]:
    """The loss of each step of one bf16 process, from fresh weights; `gpu` is the configuration's section."""
    config = yaml.safe_load((ROOT / "examples/digits/quickstart.yaml").read_text())
    config["data"] |= {
        "tokenizer": str(data / "tokenizer.model"),
        "train_data": [str(data / "instruct")],
        "eval_data": [],
    }
    config["train"] |= {"bf16": True, "train_iters": steps}
    config |= {
        "parallel": {},
        "gpu": gpu,
        "checkpoint": {"save": str(folder)},
        "log": {"log_interval": 1},
        "stages": [{"name": "warmup"}],
    }
    folder.mkdir()
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    run("-m", "megatron_evomoe", "train", "--config", folder / "run.yaml")
    return [json.loads(line)["lm loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(digits, tmp_path_factory) -> list[float]:
    return losses(digits, tmp_path_factory.mktemp("plain") / "bf16")


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_losses_stay_within_one_percent_of_bf16(digits, plain, tmp_path, recipe):
    coarse = losses(digits, tmp_path / "fp8", fp8_format="hybrid", fp8_recipe=recipe)
    assert len(plain) == len(coarse) == STEPS
    for first in range(0, STEPS, WINDOW):
        wanted, got = (statistics.fmean(curve[first : first + WINDOW]) for curve in (plain, coarse))
        assert got == pytest.approx(wanted, rel=TOLERANCE), f"steps {first + 1} to {first + WINDOW}"
