"""Collect the results of `gpu.sh` in one JSON file and one Markdown file.

    python benchmarks/summary.py FOLDER [--tiny]

The Markdown is made from the JSON. The exit status says whether all steps succeeded.
"""

from __future__ import annotations

import csv
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import checkpoint
import layer
import measure
import peer
import router
import step

TABLES = {
    "router": router.markdown,
    "router-long": router.markdown,
    "layer": layer.markdown,
    "step": step.markdown,
    "peer": peer.markdown,
    "checkpoint": checkpoint.markdown,
}


def collect(folder: Path) -> dict[str, Any]:
    """Results of all steps in `folder`."""
    with (folder / "steps.tsv").open() as file:
        rows = list(csv.reader(file, delimiter="\t"))
    steps = [
        {
            "name": name,
            "status": int(status),
            "seconds": int(seconds),
            "command": command,
            "last_line": _last_line(folder, name),
        }
        for name, status, seconds, command in rows
    ]
    reports = {
        name: json.loads((folder / f"{name}.json").read_text())
        for name in TABLES
        if (folder / f"{name}.json").exists()
    }
    command = " ".join(["bash benchmarks/gpu.sh", *sys.argv[2:]])
    report = {
        "circumstances": {**measure.circumstances(), "command": command},
        "steps": steps,
        "tests": _tests(folder / "tests.xml"),
        **reports,
    }
    # Replace this machine's paths, which mean nothing to a reader elsewhere.
    return json.loads(json.dumps(report).replace(str(folder), "$OUT").replace(sys.executable, "python"))


def _last_line(folder: Path, name: str) -> str:
    lines = (folder / f"{name}.log").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def _tests(path: Path) -> dict[str, Any] | None:
    """Counts of the tests by result, and the reasons why tests were skipped."""
    if not path.exists():
        return None
    suite = ET.parse(path).getroot().find("testsuite")
    reasons = {element.get("message", "") for element in suite.iter("skipped")}
    return {
        **{key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")},
        "skip_reasons": sorted(reasons),
    }


def markdown(report: dict[str, Any]) -> str:
    """Markdown with all tables of a report."""
    c = report["circumstances"]
    versions = ", ".join(f"{name} {version}" for name, version in c["versions"].items() if version)
    steps = [
        [
            s["name"],
            "ok" if s["status"] == 0 else f"**failed ({s['status']})**: {s['last_line']}",
            str(s["seconds"]),
        ]
        for s in report["steps"]
    ]
    parts = [
        f"# {c['device']}",
        f"Commit {c['commit']}, Python {c['python']}, {versions}. Made by `{c['command']}`.",
        measure.table(["step", "", "s"], steps),
    ]
    if tests := report["tests"]:
        parts.append(
            f"Tests: {tests['tests']}, of which {tests['failures'] + tests['errors']} failed and "
            f"{tests['skipped']} were "
            f"skipped. {' '.join(tests['skip_reasons'])}"
        )
    for name, table in TABLES.items():
        if name in report:
            parts += [
                f"## {name}",
                f"`{report[name]['circumstances']['command']}`",
                table(report[name]).strip(),
            ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    folder = Path(sys.argv[1])
    report = collect(folder)
    (folder / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "results.md").write_text(markdown(report))
    print(f"results: {folder / 'results.md'}, {folder / 'results.json'}")
    sys.exit(1 if any(s["status"] for s in report["steps"]) else 0)


if __name__ == "__main__":
    main()
