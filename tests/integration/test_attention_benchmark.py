"""``benchmarks/attention.py`` runs and measures what it says, at a size that needs no time."""

from __future__ import annotations

from tests import programs


def test_every_form_keeps_less_than_megatron_core_s():
    done = programs.run("benchmarks/attention.py", "--positions", "256", "--rounds", "1", "--segment", "100")
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| 256")]
    kept = {row[1]: float(row[4]) for row in rows}
    assert list(kept) == ["megatron-core's", "ours", "ours, in segments"]
    assert max(kept["ours"], kept["ours, in segments"]) < kept["megatron-core's"] / 2
