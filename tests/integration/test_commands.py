"""The other commands of the command line, and their errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tests.programs import ROOT, environment
from tests.runs import metrics, run


def test_doctor():
    done = run("doctor")
    assert re.search(r"^torch +\d", done.stdout, re.M) and re.search(
        r"^megatron-core +0\.1", done.stdout, re.M
    )
    assert "backend" in done.stdout and done.stdout.rstrip().endswith("ready")


def test_unknown_flag_value_and_stage(tiny_yaml, tmp_path):
    path = str(tiny_yaml(tmp_path))
    assert "error: optimizer.lr = 'quick'" in run("train", "--config", path, "--lr", "quick", expect=2).stderr
    done = run("train", "--config", path, "--stage", "rout", expect=2)
    assert "no stage 'rout'; this run has align, warmup, evolve, route" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tensor-model-parallel-size", "2"], "does not divide the 1 ranks of this run"),
        (["--train-data", "[/nowhere]"], "/nowhere"),
        (["--tokenizer", "/nowhere.model"], "/nowhere.model"),
        (["--vocab-size", "100"], "vocab_size 100 is smaller than the tokenizer's"),
        (["--transformer-impl", "transformer_engine"], "transformer_engine"),
    ],
)
def test_bad_settings_end_in_one_line(tiny_yaml, tmp_path, flags, message):
    done = run("train", "--config", str(tiny_yaml(tmp_path)), *flags, expect=2)
    assert message in done.stderr and "Traceback" not in done.stderr


def test_another_tokenizer_than_the_checkpoint_s(digits, tiny_yaml, tmp_path):
    from megatron_evomoe.data.tokenizer import train_sentencepiece

    path = str(tiny_yaml(tmp_path))
    run("train", "--config", path, "--stage", "align")
    other = train_sentencepiece(
        [f"other words {i}" for i in range(50)], tmp_path / "other.model", vocab_size=300
    )
    done = run("train", "--config", path, "--stage", "warmup", "--tokenizer", str(other), expect=2)
    assert "trained with another tokenizer" in done.stderr and "Point --tokenizer at" in done.stderr


def test_too_many_bad_samples_stop_the_run(digits, tiny_yaml, tmp_path):
    """Hardly any sample fits the sequence length: samples are counted and the run stops with an error."""
    done = run(
        "train", "--config", str(tiny_yaml(tmp_path)), "--seq-length", "20", "--train-iters", "60", expect=2
    )
    assert "too-long" in done.stderr


def test_polyglot_recipe_both_ways(tiny_yaml, tmp_path):
    """The example script runs under bash and under torchrun.

    `bash examples/evomoe_llava.sh` starts torchrun itself; `torchrun --nnodes=2` runs the same file with
    Python.
    """
    script = str(ROOT / "examples" / "evomoe_llava.sh")
    one = tiny_yaml(tmp_path)
    env = environment(PYTHON=sys.executable, GPUS_PER_NODE="2")
    subprocess.run(
        ["bash", script, "--config", str(one), "--stage", "align"],
        check=True,
        env=env,
        timeout=300,
        cwd=tmp_path,
        capture_output=True,
    )
    (tmp_path / "nodes").mkdir()
    two = tiny_yaml(tmp_path / "nodes")
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:29711",
        "--rdzv-id=test",
        script,
        "--config",
        str(two),
        "--stage",
        "align",
    ]
    nodes = [
        subprocess.Popen(
            torchrun, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    for node in nodes:
        printed, _ = node.communicate(timeout=300)
        assert node.returncode == 0, printed[-3000:]
    # both layouts have two data-parallel replicas, so both must have trained alike
    losses = [[x["lm loss"] for x in metrics(folder / "run")] for folder in (tmp_path, tmp_path / "nodes")]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_recipe_file_resolves_to_the_paper_s_figures(monkeypatch, digits):
    from megatron_evomoe.config import load_config

    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("TOKENIZER", str(digits / "tokenizer.model"))
    config = load_config(ROOT / "examples" / "evomoe_llava.yaml")
    resolved = [config.for_stage(s.name) for s in config.stages]
    assert [s.name for s in config.stages] == ["align", "warmup", "evolve", "route"]
    assert [(c.train.train_iters, c.train.global_batch_size, c.optimizer.lr) for c in resolved] == [
        (2181, 256, 1e-3),
        (5200, 256, 2e-5),
        (10395, 64, 2e-5),
        (10395, 64, 2e-5),
    ]


def test_wandb_offline_and_tensorboard(tiny_yaml, tmp_path):
    path = str(tiny_yaml(tmp_path))
    run(
        "train",
        "--config",
        path,
        "--stage",
        "align",
        "--wandb-project",
        "p",
        "--tensorboard-dir",
        str(tmp_path / "tb"),
        WANDB_DIR=str(tmp_path),
    )
    record = json.loads((tmp_path / "run" / "align" / "iter_0000002" / "evomoe.json").read_text())
    assert record["wandb_run_id"]
    assert any("offline-run" in root for root, _, _ in os.walk(tmp_path))
    assert any(name.startswith("events.") for _, _, names in os.walk(tmp_path / "tb") for name in names)
