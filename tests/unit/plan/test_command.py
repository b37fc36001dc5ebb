"""The `plan` command: what it prints and writes, and how it ends."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_evomoe.cli import main
from megatron_evomoe.data.lengths_file import file_content
from megatron_evomoe.data.sample_length import Column

ROOT = Path(__file__).parents[3]


@pytest.fixture
def run_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "preset": "qwen-1.8b",
                "train": {"bf16": True, "micro_batch_size": 4, "global_batch_size": 256},
                "stages": [{"name": "warmup"}, {"name": "route", "global_batch_size": 64}],
            }
        )
    )
    return str(path)


def test_everything_is_written(run_yaml, tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert (
        main(
            [
                "plan",
                "--config",
                run_yaml,
                "--nnodes",
                "2",
                "--json",
                str(out),
                "--tensor-model-parallel-size",
                "2",
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "stage warmup (warmup): " in text and "stage route (route): " in text and "whole run " in text
    assert "global_batch_size 64" in text
    data = json.loads(out.read_text())
    warmup, route = data["stages"]
    assert {e["layout"]["tp"] for e in route["fits"]} == {2}, "a degree given as a flag is held"
    best = warmup["fits"][0]
    assert best["total_bytes"] == best["activation_bytes"] + best["fp8_bytes"] + sum(
        best["states"][k] for k in ("parameter_bytes", "gradient_bytes", "optimizer_bytes", "evolution_bytes")
    )
    assert best["communication_bytes"].keys() == {"tp", "pp", "ep", "gradients", "parameters"}
    assert data["machine"]["nnodes"] == 2 and data["whole_run"][0]["seconds"] > 0


def test_one_stage_another_preset(run_yaml, capsys):
    assert (
        main(
            [
                "plan",
                "--config",
                run_yaml,
                "--nnodes",
                "1",
                "--stage",
                "route",
                "--preset",
                "phi-2",
                "--top",
                "1",
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "stage route" in text and "stage warmup" not in text and "whole run" not in text
    assert "  1. " in text and "  2. " not in text
    assert "Bias in Moe is only supported when ETP==1" in text


def test_nothing_fits(run_yaml, capsys):
    assert (
        main(["plan", "--config", run_yaml, "--nnodes", "1", "--gpu-memory", "1", "--stage", "warmup"]) == 1
    )
    assert "stage warmup (warmup): 0 layouts fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stage", "rout"], "no stage 'rout'; this run has warmup, route"),
        (["--preset", "tiny"], "language.vocab_size is not set"),
        (["--hidden-size", "wide"], "language.hidden_size = 'wide'"),
    ],
)
def test_errors_are_one_line(run_yaml, capsys, flags, message):
    assert main(["plan", "--config", run_yaml, "--nnodes", "1", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu-memory", "0"], "argument --gpu-memory: must be more than 0, got 0"),
        (["--nnodes", "-1"], "argument --nnodes: must be at least 1, got -1"),
        (["--tflops", "nan"], "argument --tflops: 'nan' is not a finite number"),
        (["--top", "1.5"], "argument --top: '1.5' is not a whole number"),
        (["--train-iters"], "argument --train-iters: expected one argument"),
        (["--train-iter", "5"], "unrecognized arguments: --train-iter 5 (did you mean --train-iters?)"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(run_yaml, capsys, flags, message):
    assert main(["plan", "--config", run_yaml, "--nnodes", "1", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_recompute_and_mean_length(run_yaml, tmp_path, capsys):
    """A shorter mean sample makes steps shorter and does not change the memory."""
    found = []
    for i, extra in enumerate(([], ["--mean-tokens", "1024"])):
        out = tmp_path / f"{i}.json"
        main(
            [
                "plan",
                "--config",
                run_yaml,
                "--nnodes",
                "1",
                "--stage",
                "warmup",
                "--recompute-granularity",
                "full",
                "--json",
                str(out),
                *extra,
            ]
        )
        fits = json.loads(out.read_text())["stages"][0]["fits"]
        assert {e["layout"]["recompute"] for e in fits} == {"full"}
        found.append({json.dumps(e["layout"]): (e["total_bytes"], e["seconds"]["total"]) for e in fits})
    longest, mean = found
    assert longest.keys() == mean.keys()
    assert all(mean[k][0] == longest[k][0] and mean[k][1] < longest[k][1] for k in longest)


def test_lengths_of_samples(run_yaml, tmp_path, capsys):
    """Samples of two lengths: packed steps take less time than padded ones, in fewer microbatches."""
    path = tmp_path / ".evomoe-lengths-0123"
    rows = np.zeros((4096, len(Column)), np.int32)
    rows[:, Column.LENGTH] = np.tile([500, 1500, 5000, -1], 1024)  # the last two are left out
    empty = np.zeros(0, np.int32)
    path.write_bytes(b"".join(file_content("of these shards", 0, [(rows, empty)], {})))
    found = {}
    for packing in ("none", "sort", "pack"):
        out = tmp_path / f"{packing}.json"
        flags = ["--packing", packing, "--lengths", str(path), "--json", str(out), "--stage", "warmup"]
        degrees = ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"]
        assert main(["plan", "--config", run_yaml, "--nnodes", "1", *flags, *degrees]) == 0
        found[packing] = json.loads(out.read_text())["stages"][0]["fits"][0]
        assert ("packing" in capsys.readouterr().out) == (packing != "none")
    seconds = {packing: fit["seconds"]["compute"] for packing, fit in found.items()}
    assert seconds["pack"] < seconds["sort"] < seconds["none"]
    # 256 samples in rows of 4, on 8 replicas; those that are used take a third of the rows
    assert found["none"]["microbatches"] == found["sort"]["microbatches"] == 8
    assert 2 <= found["pack"]["microbatches"] <= 3
    capsys.readouterr()
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["plan", "--config", run_yaml, "--nnodes", "1", "--lengths", str(path)]) == 2
    assert "is not a whole file of lengths" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("block", "flags"),
    [
        (0, ["--stage", "warmup", "--stage", "route", "--top", "2"]),
        (1, ["--stage", "warmup", "--gpu-memory", "24"]),
    ],
)
def test_the_documented_output_is_what_is_printed(block, flags, capsys, monkeypatch):
    for name in ("DATA", "TOKENIZER"):
        monkeypatch.setenv(name, "unused")
    documented = re.findall(r"^```\n(.*?)^```", (ROOT / "docs" / "plan.md").read_text(), re.M | re.S)[block]
    assert (
        main(["plan", "--config", str(ROOT / "examples" / "evomoe_llava.yaml"), "--nnodes", "2", *flags]) == 0
    )
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in documented.splitlines() if line not in printed] == []
