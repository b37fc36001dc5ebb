"""What one replica computes in a step: which samples each of its microbatches holds, before any is read.

The whole step is planned on each replica in the same way (`data.packing`), from the order of samples and, for
`sort` and `pack`, from their known lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from megatron_evomoe.config import DataConfig
from megatron_evomoe.data.lengths import Lengths
from megatron_evomoe.data.order import SampleOrder
from megatron_evomoe.data.packing import plan_step
from megatron_evomoe.data.sample_length import REASONS


@dataclass(frozen=True)
class Task:
    """One microbatch that is to be made."""

    samples: list[int]
    """The numbers of its samples."""
    lengths: list[int] | None
    """The known length of each sample after cutting; none where lengths are not known."""
    rows: int
    positions: int | None
    """Positions of each row; none: those of the longest sample."""
    packed: bool
    """Whether the samples stand one after the other in a single row, instead of each in a row of its own."""


class LeftOut(NamedTuple):
    """A sample that is not read, because its length is known to make it unusable."""

    sample: int
    reason: str
    message: str


@dataclass(frozen=True)
class StepPlan:
    """The share of one replica in a step."""

    tasks: list[Task]
    left_out: list[LeftOut] = field(default_factory=list)
    """The samples of the step that no replica reads, of which each replica counts a part."""


@dataclass(frozen=True, kw_only=True)
class StepPlanner:
    """Plans steps for one replica.

    Attributes:
        lengths: of all samples; needed for `sort` and `pack`.
        multiple: rows are padded to a multiple of this number of positions.
        rounds: with `pack`, the number of microbatches is a multiple of this number.
        attention_cost: see `packing.plan_step`.
    """

    data: DataConfig
    lengths: Lengths | None
    micro_batch_size: int
    global_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int
    multiple: int
    rounds: int
    attention_cost: float

    def plan(self, order: SampleOrder, position: int) -> StepPlan:
        """This replica's share of the step that begins at `position` of the order.

        Raises:
            DataError: the file of lengths was damaged.
        """
        samples = order.indices(np.arange(position, position + self.global_batch_size))
        if self.data.packing == "none":
            mine = self._mine(np.zeros(len(samples), np.int32))
            return StepPlan([self._padded(samples[held].tolist()) for held in mine])
        assert self.lengths is not None, "sort and pack need lengths"
        lengths = self.lengths.usable(samples, self.data.seq_length, self.data.long_samples)
        tasks = []
        for held in self._mine(lengths):
            known = [i for i in held if lengths[i] > 0]
            tasks.append(self._task(samples[known].tolist(), lengths[known].tolist()))
        left_out = samples[lengths <= 0][self.data_parallel_rank :: self.data_parallel_size]
        return StepPlan(tasks, list(self._reasons(left_out)))

    def row_length(self, longest: int) -> int:
        """The positions of a row whose longest sample has `longest` tokens, with `none` and `sort`."""
        return self.data.seq_length if self.data.pad_to_seq_length else self._rounded(longest)

    def _mine(self, lengths: np.ndarray) -> list[list[int]]:
        plan = plan_step(
            lengths,
            packing=self.data.packing,
            micro_batch_size=self.micro_batch_size,
            seq_length=self.data.seq_length,
            replicas=self.data_parallel_size,
            packing_replicas=self.data.packing_replicas,
            rounds=self.rounds,
            multiple=self.multiple,
            attention_cost=self.attention_cost,
        )
        return plan[self.data_parallel_rank :: self.data_parallel_size]

    def _padded(self, samples: list[int]) -> Task:
        positions = self.data.seq_length if self.data.pad_to_seq_length else None
        return Task(samples, None, self.micro_batch_size, positions, packed=False)

    def _task(self, samples: list[int], lengths: list[int]) -> Task:
        if self.data.packing == "sort":
            positions = self.row_length(max(lengths, default=0))
            return Task(samples, lengths, self.micro_batch_size, positions, packed=False)
        positions = self._rounded(sum(lengths))
        if self.data.pad_to_seq_length:
            positions = self.micro_batch_size * self.data.seq_length
        return Task(samples, lengths, 1, positions, packed=True)

    def _rounded(self, length: int) -> int:
        return -(-max(length, 1) // self.multiple) * self.multiple

    def _reasons(self, samples: np.ndarray) -> Iterator[LeftOut]:
        if not len(samples):
            return
        assert self.lengths is not None
        for sample, length in zip(samples.tolist(), self.lengths[samples].tolist(), strict=True):
            if length > 0:
                yield LeftOut(sample, "too-long", f"{length} tokens, seq_length is {self.data.seq_length}")
            else:
                yield LeftOut(sample, REASONS[-length - 1], f"as {self.lengths.path} says")
