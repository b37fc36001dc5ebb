"""``benchmarks/tower.py`` runs and prints a row for each kind of tower."""

from __future__ import annotations

from tests import programs


def test_rows():
    done = programs.run("benchmarks/tower.py", "--tiny")
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[1].strip() for row in rows] == ["frozen", "trained"]
    assert all(float(row[5]) > 0 for row in rows)
