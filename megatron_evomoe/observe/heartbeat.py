"""Reports where every rank is, so that the rank that a hanging job waits for is known.

Every few seconds a thread of each rank writes its place (stage, step, phase) to the job's key-value store.
The thread of rank 0 also writes `heartbeat.json`, which names the ranks that lag behind, for monitoring. When
a collective fails or times out, the remaining ranks read the store and name the rank that they waited for.
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

PHASES = ("setup", "lengths", "features", "data", "step", "save", "evaluate")
"""The phases in the order of a step."""
_INTERVAL = 2.0
"""Seconds between two reports of a rank. A rank counts as silent after five intervals."""


class CollectiveError(RuntimeError):
    """A collective failed or timed out. The message names it, its caller, and the ranks that are missing."""


class Heartbeat:
    """Reports this rank's place every few seconds until `close`.

    Args:
        run_dir: where rank 0 writes `heartbeat.json`.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "heartbeat.json"
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = store.clone()
        self._place: dict[str, Any] = {
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
        """Record what begins now. It only assigns a value; the thread reports it."""
        place = {**self._place, "phase": phase, "since": time.time()}
        if step is not None:
            place["step"] = step
        if stage is not None:
            place["stage"] = stage
        self._place = place

    def close(self) -> None:
        """Stop reporting. A write that hangs in a lost file system is not waited for."""
        self._stopped.set()
        self._thread.join(timeout=5 * _INTERVAL)

    def explain(self, error: BaseException) -> str | None:
        """A message that names the missing ranks, if a collective raised `error`; else none."""
        called = failed_collective(error)
        if called is None:
            return None
        error = _root(error)
        lines = str(error).strip().splitlines()
        try:
            whom = describe(self._everyone(), time.time())
        except Exception:  # the process that hosts the store has ended
            whom = (
                "the missing ranks are unknown, because the job's key-value store is gone: torchrun or "
                "rank 0, which hosts it, has ended"
            )
        return (
            f"{called} failed in stage {self._place['stage']!r} at step {self._place['step']}: "
            f"{lines[0] if lines else type(error).__name__}. {whom}"
        )

    def _run(self) -> None:
        while True:
            try:
                self._tell()
            except Exception:  # the process that hosts the store has ended, and with it the job
                return
            if self._stopped.wait(_INTERVAL):
                return

    def _tell(self) -> None:
        place = {**self._place, "beat": time.time()}
        self._store.set(f"heartbeat/{self._rank}", json.dumps(place))
        if self._rank == 0:
            self._write(json.dumps({**place, "ranks": describe(self._everyone(), place["beat"])}))

    def _write(self, text: str) -> None:
        """Replace the file.

        A full disk or a lost folder does not end the thread. The failure is logged once, and so is the first
        write that succeeds again.
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


def describe(ranks: list[dict[str, Any]], now: float) -> str:
    """Which ranks are silent or behind the others.

    Args:
        ranks: each rank's last report, or only its `rank` if it never reported.
        now: seconds since the epoch, as the reports' `beat` and `since`.
    """
    never = [r["rank"] for r in ranks if "beat" not in r]
    if never and len(never) < len(ranks):
        return f"ranks {', '.join(map(str, never))} have never reported"
    silent = [r for r in ranks if now - r.get("beat", now) > 5 * _INTERVAL]
    if silent:
        return "; ".join(
            f"rank {r['rank']} ({r['host']}, pid {r['pid']}) has been silent for {now - r['beat']:.0f} s, "
            f"last in {_place(r)}"
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
    return f"all {len(spoken)} ranks are in {_place(spoken[0])}" if spoken else "no rank has reported yet"


def _order(record: dict[str, Any]) -> tuple[int, int]:
    return record["step"], PHASES.index(record["phase"])


def _place(record: dict[str, Any]) -> str:
    return f"phase {record['phase']!r} of stage {record['stage']!r}, step {record['step']}"


def _root(error: BaseException) -> BaseException:
    """The error that `error` was raised from: a load or a save wraps the errors of collectives."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def failed_collective(error: BaseException) -> str | None:
    """Part of a message that names the functions in which a collective failed; None for another error.

    They are the function of torch.distributed that raised `error` and the function of this package that
    called it.
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
