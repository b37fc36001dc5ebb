"""When ranks hang, the message names the silent ranks first, then those behind."""

from __future__ import annotations

import json
import time

import pytest
import torch
import torch.distributed as dist

from megatron_evomoe.observe import heartbeat
from megatron_evomoe.observe.heartbeat import Heartbeat, describe


def at(rank: int, step: int, phase: str, *, since: float, beat: float) -> dict:
    return {
        "rank": rank,
        "host": f"node{rank}",
        "pid": 100 + rank,
        "stage": "warmup",
        "step": step,
        "phase": phase,
        "since": since,
        "beat": beat,
    }


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        (
            [at(0, 7, "step", since=90, beat=99), at(1, 7, "data", since=40, beat=41)],
            "rank 1 (node1, pid 101) has been silent for 59 s, last in phase 'data' of stage 'warmup', step "
            "7",
        ),
        (
            [
                at(0, 7, "step", since=90, beat=99),
                at(1, 7, "data", since=40, beat=99),
                at(2, 7, "step", since=90, beat=99),
            ],
            "rank 1 (node1, pid 101) is still in phase 'data' of stage 'warmup', step 7, for 60 s",
        ),
        (
            [at(0, 7, "step", since=90, beat=99), at(1, 6, "save", since=40, beat=99)],
            "rank 1 (node1, pid 101) is still in phase 'save'",
        ),
        (
            [at(0, 7, "step", since=90, beat=99), at(1, 7, "step", since=91, beat=98)],
            "all 2 ranks are in phase 'step'",
        ),
        ([at(0, 7, "step", since=90, beat=99), {"rank": 1}], "ranks 1 have never reported"),
        ([{"rank": 0}], "no rank has reported yet"),
    ],
)
def test_describe(ranks, text):
    assert text in describe(ranks, now=100)


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_file_that_cannot_be_written_is_said_once_and_written_again_later(
    tmp_path, one_rank, caplog, monkeypatch
):
    """The folder is missing at first, so the write fails, as on a full disk."""
    monkeypatch.setattr(heartbeat, "_INTERVAL", 0.02)
    folder = tmp_path / "run"
    heart = Heartbeat(folder)
    try:
        wait_until(lambda: heart._unwritten > 3)
        folder.mkdir()
        wait_until(lambda: (folder / "heartbeat.json").exists() and heart._unwritten == 0)
    finally:
        heart.close()
    first, second = (record.getMessage() for record in caplog.records)
    assert "heartbeat.json cannot be written (" in first and "training goes on" in first
    assert "is written again" in second and "beats are missing" in second


def test_heartbeat_file_follows_the_run_and_a_failed_collective_is_named(tmp_path, one_rank, monkeypatch):
    monkeypatch.setattr(heartbeat, "_INTERVAL", 0.05)
    heart = Heartbeat(tmp_path)
    try:
        heart.enter("data", 3, "warmup")
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            found = (
                json.loads((tmp_path / "heartbeat.json").read_text())
                if (tmp_path / "heartbeat.json").exists()
                else {}
            )
            if (found.get("step"), found.get("phase")) == (3, "data"):
                break
            time.sleep(0.02)
        assert found["stage"] == "warmup" and found["beat"] >= found["since"]
        assert "all 1 ranks are in phase 'data'" in found["ranks"]
        with pytest.raises((RuntimeError, ValueError)) as caught:
            dist.all_gather([], torch.zeros(2))
        assert heart.explain(caught.value).startswith("all_gather, failed in stage 'warmup' at step 3: ")
        with pytest.raises(KeyError) as wrapped:
            raise KeyError("a load wraps what it meets") from caught.value
        assert heart.explain(wrapped.value) == heart.explain(caught.value)
        assert heart.explain(ValueError("of our own")) is None
    finally:
        heart.close()
