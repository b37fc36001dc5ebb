"""The rooms of the package: who may import whom (`[tool.importlinter]` in pyproject.toml)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(*arguments: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "COLUMNS": "200"},
        text=True,
        capture_output=True,
    )


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return python("-c", command, "--no-cache", "--no-logo", root=root)


def test_every_import_keeps_the_contracts():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        (
            "plan/flops.py",
            "import megatron_evomoe.train.step",
            "A room imports only rooms that stand below it",
        ),
        ("config/text.py", "def lazy():\n    import torch", "Configurations are read without torch"),
        ("data/image.py", "import megatron.core", "work without megatron-core"),
        ("attic.py", "", "attic"),
    ],
    ids=["upwards", "lazy", "heavy", "no place"],
)
def test_a_breach_is_found(tmp_path, file, line, broken):
    shutil.copytree(ROOT / "megatron_evomoe", tmp_path / "megatron_evomoe")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "megatron_evomoe" / file).open("a") as source:
        source.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1
    assert any(broken in line and "KEPT" not in line for line in done.stdout.splitlines()), done.stdout


def test_a_command_reads_its_arguments_before_anything_heavy_is_loaded():
    code = """
import contextlib, io, sys
from megatron_evomoe import cli
for name in [command.name for command in cli.COMMANDS]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        cli.main([name, "--help"])
    for module in ("megatron.core", "transformer_engine", "transformers", "matplotlib"):
        assert module not in sys.modules, f"{name} --help loads {module}"
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
