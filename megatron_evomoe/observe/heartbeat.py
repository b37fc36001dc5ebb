"""Who is alive and where: every rank says so every few seconds, so that a hang has a name.

A thread of each rank keeps its place (stage, step, phase) in the job's key-value store; rank 0's also writes
`heartbeat.json` for whoever watches from outside, with the ranks that lag behind. When a collective fails or
times out, the survivors read the same store and can say whom they waited for.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_evomoe.observe import jsonl

log = logging.getLogger(__name__)

PHASES = ("setup", "features", "data", "step", "save", "evaluate")
"""In the order a step meets them."""


class CollectiveError(RuntimeError):
    """A collective failed or timed out; the message names it, where it was called, and the ranks that did not
    come.
    """


class Heartbeat:
    """This rank's place, told every `interval` seconds until `close`.

    run_dir: where rank 0 writes `heartbeat.json`.
    """

    def __init__(self, run_dir: Path, *, interval: float = 2.0) -> None:
        self._path, self._interval = run_dir / "heartbeat.json", interval
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._store = dist.distributed_c10d._get_default_store().clone()
        self._place = {
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "stage": "",
            "step": 0,
            "phase": "setup",
            "since": time.time(),
        }
        self._unwritten = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def enter(self, phase: str, step: int | None = None, stage: str | None = None) -> None:
        """Say what begins now. Costs an assignment; the thread does the rest."""
        place = {**self._place, "phase": phase, "since": time.time()}
        if step is not None:
            place["step"] = step
        if stage is not None:
            place["stage"] = stage
        self._place = place

    def close(self) -> None:
        """Stop telling. Does not wait for a write that a lost file system holds."""
        self._stopped.set()
        self._thread.join(timeout=5 * self._interval)

    def explain(self, error: BaseException) -> str | None:
        """What went wrong, if `error` came out of a collective; else none."""
        called = failed_collective(error)
        if called is None:
            return None
        error = _root(error)
        lines = str(error).strip().splitlines()
        try:
            whom = describe(self._everyone(), time.time(), self._interval)
        except Exception:  # the store went with the process that kept it: torchrun, or rank 0
            whom = (
                "who is missing cannot be told: the job's key-value store is gone, and with it torchrun "
                "or rank 0"
            )
        return (
            f"{called} failed in stage {self._place['stage']!r} at step {self._place['step']}: "
            f"{lines[0] if lines else type(error).__name__}. {whom}"
        )

    def _run(self) -> None:
        while True:
            try:
                self._tell()
            except Exception:  # the store's host is gone, and with it the job; nobody is left to tell
                return
            if self._stopped.wait(self._interval):
                return

    def _tell(self) -> None:
        place = {**self._place, "beat": time.time()}
        self._store.set(f"heartbeat/{self._rank}", json.dumps(place))
        if self._rank == 0:
            self._write(
                json.dumps({**place, "ranks": describe(self._everyone(), place["beat"], self._interval)})
            )

    def _write(self, text: str) -> None:
        """A full disk or a lost folder costs the file its news, never the thread: said once, and again when
        it is over.
        """
        try:
            jsonl.replace(self._path, text)
        except OSError as error:
            self._unwritten += 1
            if self._unwritten == 1:
                log.warning("%s cannot be written (%s); training goes on without it", self._path, error)
            return
        if self._unwritten:
            log.warning("%s is written again; %d beats are missing", self._path, self._unwritten)
            self._unwritten = 0

    def _everyone(self) -> list[dict[str, Any]]:
        keys = [f"heartbeat/{rank}" for rank in range(self._world)]
        return [
            json.loads(self._store.get(key)) if self._store.check([key]) else {"rank": rank}
            for rank, key in enumerate(keys)
        ]


def describe(ranks: list[dict[str, Any]], now: float, interval: float) -> str:
    """Which ranks are silent or behind the others, in words.

    ranks: each rank's last record, with nothing but `rank` where it never spoke.
    """
    never = [r["rank"] for r in ranks if "beat" not in r]
    if never and len(never) < len(ranks):
        return f"ranks {', '.join(map(str, never))} have never spoken"
    silent = [r for r in ranks if now - r.get("beat", now) > 5 * interval]
    if silent:
        return "; ".join(
            f"rank {r['rank']} ({r['host']}, pid {r['pid']}) has been silent for {now - r['beat']:.0f} s, "
            "last in "
            f"{_place(r)}"
            for r in silent
        )
    spoken = [r for r in ranks if "beat" in r]
    furthest = max((_order(r) for r in spoken), default=None)
    behind = [r for r in spoken if _order(r) != furthest]
    if behind:
        return "; ".join(
            f"rank {r['rank']} ({r['host']}, pid {r['pid']}) is still in {_place(r)}, for "
            f"{now - r['since']:.0f} s"
            for r in behind
        )
    return f"all {len(spoken)} ranks are in {_place(spoken[0])}" if spoken else "no rank has spoken yet"


def _order(record: dict[str, Any]) -> tuple[int, int]:
    return record["step"], PHASES.index(record["phase"])


def _place(record: dict[str, Any]) -> str:
    return f"phase {record['phase']!r} of stage {record['stage']!r}, step {record['step']}"


def _root(error: BaseException) -> BaseException:
    """What `error` was raised from: a load or a save wraps what it meets."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def failed_collective(error: BaseException) -> str | None:
    """The function of torch.distributed that raised `error`, and the function of ours that called it; none
    for another error.
    """
    error = _root(error)
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if "distributed_c10d" in f.filename and f.name != "wrapper"]
    if not inside:
        return None
    ours = [f for f in frames if f"{os.sep}megatron_evomoe{os.sep}" in f.filename]
    where = (
        f", called from {ours[-1].name} ({Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
    )
    return f"{inside[-1].name}{where},"
