"""How long each rank takes for its own part of a step, to find the rank that all others wait for."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from megatron_evomoe.parallel import backend


class StepClock:
    """Times a rank from the start of a step to the end of its backward, before gradients are reduced.

    Ranks that communicate earlier in the step (tensor, pipeline or expert parallelism) wait for each other
    within that time, so the report can tell replicas apart, but not the ranks of one replica. On a GPU, CUDA
    events measure the device's time.
    """

    def __init__(self) -> None:
        self._total, self._steps = 0.0, 0
        self._started: Any = None
        self._ended: Any = None

    def start(self) -> None:
        """The step begins (reading its samples included)."""
        self._started, self._ended = _now(), None

    def backward_done(self) -> None:
        """Called where gradient reduction begins."""
        self._ended = _now()

    def stop(self) -> None:
        """The step is over; on CUDA, after the loss was read."""
        if self._ended is not None:
            self._total += _between(self._started, self._ended)
            self._steps += 1

    def report(self) -> dict[str, float]:
        """The slowest rank since the last report, its mean seconds per step, and the median rank's.

        Communicates.
        """
        mean = torch.tensor([self._total / max(1, self._steps)], dtype=torch.float64, device=backend.device())
        everyone = [torch.zeros_like(mean) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mean)
        self._total, self._steps = 0.0, 0
        seconds = [float(t) for t in everyone]
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        return {
            "straggler/rank": slowest,
            "straggler/seconds": seconds[slowest],
            "straggler/median-seconds": statistics.median(seconds),
        }


def _now() -> Any:
    if not backend.on_gpu():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    if not backend.on_gpu():
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000
