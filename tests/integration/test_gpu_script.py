"""``benchmarks/gpu.sh`` on tiny models: its steps, its report of them, and its installation.

Nothing here is a measurement.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_evomoe.parallel import backend

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def run(out: Path, *arguments: str | Path, **env: str) -> subprocess.CompletedProcess:
    given = {**os.environ, "PYTHON": sys.executable, "OUT": str(out), "VENV": str(out / "venv"), **env}
    return subprocess.run(["bash", SCRIPT, *arguments], env=given, capture_output=True, text=True)


def results(out: Path) -> tuple[dict, str]:
    return json.loads((out / "results.json").read_text()), (out / "results.md").read_text()


def wheel(folder: Path, name: str) -> Path:
    """A wheel of a package with one empty module."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"]))
    return folder


@pytest.mark.skipif(backend.on_gpu(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_ends_well(tmp_path):
    done = run(tmp_path / "out")
    assert done.returncode == 0 and "no GPU" in done.stdout
    assert not (tmp_path / "out").exists()


def test_all_steps_fit_the_limit_of_the_whole():
    """All steps' time limits fit the script's overall limit, so that no step is cut short by earlier ones."""
    script = SCRIPT.read_text()
    full = (
        script[: script.index('if [ -n "$TINY" ]; then\n    ROUTER')]
        + script[script.index("ROUTER=(--dtype bf16") :]
    )
    seconds = [int(found) for found in re.findall(r"^ +step [\w-]+ (\d+) ", full, re.MULTILINE)]
    assert len(seconds) == 8 and sum(seconds) <= int(re.search(r"LIMIT=(\d+)", script)[1])


def test_steps_are_run_and_reported(tmp_path):
    done = run(tmp_path, "--tiny", ONLY="tests step")
    assert done.returncode == 0, done.stdout + done.stderr
    report, text = results(tmp_path)
    assert [(s["name"], s["status"]) for s in report["steps"]] == [("tests", 0), ("step", 0)]
    assert report["tests"]["failures"] == report["tests"]["errors"] == 0 < report["tests"]["tests"]
    assert {"device", "versions", "commit", "command"} <= report["circumstances"].keys()
    assert [(r["stage"], r["precision"]) for r in report["step"]["rows"][:2]] == [
        ("warmup", "bf16"),
        ("route", "bf16"),
    ]
    ceiling = report["step"]["ceilings"]["bf16"]["gemm_tflops"]
    for row in report["step"]["rows"]:
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"])
        assert row["mfu_gemm"] == pytest.approx(row["flop"] / row["seconds"] / 1e12 / ceiling)
        assert row["losses"][1] < row["losses"][0] or row["stage"] == "route"
        assert f"{row['tokens_per_s']:.0f}" in text
    assert str(tmp_path) not in json.dumps(report) + text


def test_the_routers_figures_follow_from_time_and_work(tmp_path):
    done = run(tmp_path, "--tiny", ONLY="router layer")
    assert done.returncode == 0, done.stdout + done.stderr
    report, text = results(tmp_path)
    ceilings, layers = report["router"]["ceilings"], report["layer"]["rows"]
    for row in report["router"]["rows"]:
        product = ceilings["products"][row["precision"]]["gemm_tflops"]
        assert row["flop_share"] == pytest.approx(row["flop"] / row["seconds"] / 1e12 / product)
        assert row["bytes_share"] == pytest.approx(
            row["bytes"] / row["seconds"] / 1e9 / ceilings["copy_gbytes"]
        )
        assert (row["bound"] == "copy") == (row["bytes_share"] >= row["flop_share"])
    linear, dtr = layers[0], layers[1]
    assert (linear["router"], dtr["router"], linear["train"]) == ("linear", "dtr torch", "router")
    assert dtr["added_seconds"] == pytest.approx(dtr["seconds"] / linear["seconds"] - 1)
    assert dtr["added_peak_bytes"] == pytest.approx(dtr["peak_bytes"] / linear["peak_bytes"] - 1)
    assert all(f"## {name}" in text for name in ("router", "layer"))


@pytest.mark.slow
def test_wheels_are_installed_and_every_step_runs(tmp_path):
    done = run(tmp_path / "out", "--tiny", wheel(tmp_path / "wheels", "probe_wheel"))
    assert done.returncode == 0, done.stdout + done.stderr
    report, text = results(tmp_path / "out")
    names = ["install", "tests", "router", "layer", "step", "peer", "checkpoint"]
    assert [s["name"] for s in report["steps"]] == names
    assert all(f"## {name}" in text for name in names[2:]) and report["peer"]["equal_loss"]
    subprocess.run([tmp_path / "out/venv/bin/python", "-c", "import probe_wheel, torch"], check=True)


@pytest.mark.slow
def test_a_step_that_fails_does_not_stop_the_others(tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "broken-1.0-py3-none-any.whl").write_text("no archive")
    done = run(tmp_path / "out", "--tiny", tmp_path / "wheels", ONLY="tests")
    report, text = results(tmp_path / "out")
    assert done.returncode == 1 and "**failed" in text
    assert [s["status"] != 0 for s in report["steps"]] == [True, False]
