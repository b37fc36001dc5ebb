"""The import rules between the package's parts (`[tool.importlinter]` in pyproject.toml)."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

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
        (
            "config/check.py",
            "import megatron_evomoe.config.run",
            "No circle of imports, not even inside a room",
        ),
        ("attic.py", "", "attic"),
    ],
    ids=["upwards", "lazy", "heavy", "circle", "no place"],
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


def rooms_picture() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rooms_picture", ROOT / "docs/rooms_picture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_shows_the_imports_of_the_code():
    picture = rooms_picture()
    drawn = picture.draw(picture.table(), picture.imports())
    assert picture.PICTURE.read_text(encoding="utf-8") == drawn, "run: python docs/rooms_picture.py"


def test_the_table_has_the_order_of_the_contract_and_names_files_that_exist():
    contract = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("layers = [")[1].split("]")[0]
    picture = rooms_picture()
    assert list(picture.table()) == re.findall(r'"(\w+)"', contract)
    for above, below in picture.imports():
        assert picture.PLACES[above][1] > picture.PLACES[below][1], f"{above} does not stand above {below}"
    page = (picture.DOCS / "architecture.md").read_text(encoding="utf-8")
    for room, where in re.findall(r"^\| `(\w+)/` \|[^|]+\| (.+) \|$", page, re.MULTILINE):
        for name in re.findall(r"`(\w+(?:\.py|/))`", where):
            assert (ROOT / "megatron_evomoe" / room / name).exists(), f"{room}/ has no {name}"


def test_only_parallel_asks_megatron_core_for_groups():
    package = ROOT / "megatron_evomoe"
    asking = {
        path.relative_to(package).parts[0]
        for path in package.rglob("*.py")
        if "parallel_state" in path.read_text(encoding="utf-8")
    }
    assert asking == {"parallel"}
