"""The worked examples of CONTRIBUTING.md are applied to a copy of the repository and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import programs

ROOT = Path(__file__).parents[3]
EXAMPLES = ("A router", "An evolution rule", "A stage kind", "A benchmark", "A model family")
COPIED = ("megatron_evomoe", "tests", "benchmarks", "examples", "tools", "docs", "pyproject.toml")


def section(title: str) -> str:
    """The text of the example with this title."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = re.search(rf"^### {re.escape(title)}\n(.*?)(?=^##|\Z)", text, re.M | re.S)
    assert found, f"CONTRIBUTING.md has no section {title!r}"
    return found[1]


def new_files(text: str) -> dict[str, str]:
    """Path and content of each file that an example adds."""
    return dict(re.findall(r"^```python\n# new: (\S+)\n(.*?)^```", text, re.M | re.S))


def changes(text: str) -> list[tuple[str, list[str]]]:
    """(path, hunks) of the files that an example changes; a hunk is lines of a diff."""
    found = re.findall(r"^```diff\n# change: (\S+)\n(.*?)^```", text, re.M | re.S)
    return [(path, re.split(r"^@@\n", diff, flags=re.M)) for path, diff in found]


def applied(source: str, hunk: str, path: str) -> str:
    """`source` with one hunk applied where its old lines occur; they must occur exactly once."""
    lines = hunk.splitlines(keepends=True)
    assert all(line[0] in " +-" for line in lines), f"{path}: not a diff: {hunk}"
    old = "".join(line[1:] for line in lines if line[0] != "+")
    new = "".join(line[1:] for line in lines if line[0] != "-")
    assert source.count(old) == 1, f"{path} has these lines {source.count(old)} times, not once:\n{old}"
    return source.replace(old, new)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with all examples applied."""
    folder = tmp_path_factory.mktemp("contributed")
    for name in COPIED:
        whole = ROOT / name
        if whole.is_dir():
            shutil.copytree(whole, folder / name, ignore=shutil.ignore_patterns("__pycache__", "figures"))
        else:
            shutil.copy(whole, folder / name)
    for title in EXAMPLES:
        text = section(title)
        for path, content in new_files(text).items():
            assert not (folder / path).exists(), f"{path} exists already"
            (folder / path).write_text(content, encoding="utf-8")
        for path, hunks in changes(text):
            source = (folder / path).read_text(encoding="utf-8")
            for hunk in hunks:
                source = applied(source, hunk, path)
            (folder / path).write_text(source, encoding="utf-8")
    return folder


@pytest.mark.parametrize("title", EXAMPLES)
def test_example_adds_a_test_and_applies_alone(title):
    text = section(title)
    assert any("/test_" in path for path in new_files(text))
    assert changes(text)
    for path, hunks in changes(text):
        source = (ROOT / path).read_text(encoding="utf-8")
        for hunk in hunks:
            source = applied(source, hunk, path)


def test_examples_are_clean(copy):
    """The style check of the suite accepts the changed files."""
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "megatron_evomoe", "tests"],
            cwd=copy,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_examples_do_what_they_say(copy):
    """The tests that the examples add pass; one pytest process runs them all."""
    added = [path for title in EXAMPLES for path in new_files(section(title)) if "/test_" in path]
    path = os.pathsep.join(filter(None, [str(copy), os.environ.get("PYTHONPATH")]))
    environment = programs.environment() | {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-vv", *added],
        cwd=copy,
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert all(re.search(rf"{re.escape(path)}::\w+ PASSED", done.stdout) for path in added), done.stdout
