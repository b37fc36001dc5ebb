"""The training data of one data-parallel replica, resumable with any number of ranks and workers.

The order of all samples is a function of (seed, stage, epoch, position) alone (`data.order`), and a global
batch is a slice of that order. This process plans which samples share a microbatch (`data.step_plan`). Worker
processes make the microbatches (`data.assemble`), which arrive in the order in which they were requested.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from megatron_evomoe.config import ConfigError, DataConfig
from megatron_evomoe.data.ahead import one_ahead
from megatron_evomoe.data.assemble import Assembled, Assembler, Skipped, fill_with_padding
from megatron_evomoe.data.batch import EvalSample, MicroBatch, Preparer, prepare_eval
from megatron_evomoe.data.conversation import check_template
from megatron_evomoe.data.errors import DataError
from megatron_evomoe.data.feature_cache import FeatureCache
from megatron_evomoe.data.image import ImageProcessor
from megatron_evomoe.data.lengths import Lengths
from megatron_evomoe.data.order import SampleOrder
from megatron_evomoe.data.shards import ShardDataset
from megatron_evomoe.data.slots import Form, Slots
from megatron_evomoe.data.step_plan import StepPlan, StepPlanner, Task
from megatron_evomoe.data.tokenizer import Tokenizer

__all__ = ["EvalSample", "MicroBatch", "SampleOrder", "StepBatch", "TrainLoader", "prepare_eval"]

logger = logging.getLogger(__name__)

_MIN_READ_TO_JUDGE = 100
_EXAMPLES = 5
_LONG = "too-long"
_MAX_KEPT = 256  # microbatches of a step that lie in reused memory
_SPARE = 4096  # bytes, for alignment
_POWERS_OF_TEN = frozenset(10**n for n in range(12))


@dataclass
class StepBatch:
    """What one replica computes in one optimizer step."""

    microbatches: list[MicroBatch]
    position: int
    """Samples that all replicas have consumed after this step; a resume continues at this position."""
    epoch: int
    """The pass over the data in which this step begins."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Unusable samples of this step on this replica, by reason."""


def _as_is(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    # the processes work in parallel already, and the thread pool of a forked process would not work
    torch.set_num_threads(1)


def fetching(dataset: Dataset, batches: Iterable[Any], data: DataConfig) -> DataLoader:
    """Iterates over `dataset.__getitems__(batch)` for each of `batches`, in order.

    The data section's `num_workers` processes compute the results.
    """
    workers = data.num_workers
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        prefetch_factor=data.prefetch_factor if workers else None,
        collate_fn=_as_is,
        worker_init_fn=_start_worker,
        # a forked worker starts in milliseconds and shares the index; it uses neither torch.distributed nor
        # CUDA
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # the seed that DataLoader draws must not be the model's
    )


class TrainLoader:
    """Iterates endlessly over `StepBatch`, from `start_position` on.

    Each call of `iter()` begins where the last step that was handed out ended.

    Attributes:
        position: samples that all replicas have consumed.
        read: samples that this replica has consumed since it was constructed. Samples that were left out by
            their known length, and not read, are shared among the replicas and counted here too.
        skipped: those of them that were unusable, by reason.
        order: the order of the samples.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        tokenizer: Tokenizer,
        image_processor: ImageProcessor,
        data_config: DataConfig,
        tokens_per_image: int,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        order: SampleOrder,
        start_position: int = 0,
        pad_to_multiple_of: int = 1,
        features: FeatureCache | None = None,
        lengths: Lengths | None = None,
        rounds: int = 1,
        attention_cost: float = 0.0,
    ) -> None:
        """See the class.

        Args:
            order: the order of the samples.
            pad_to_multiple_of: sequences are padded to a multiple of this number of positions.
            features: gives features in place of the images of the shards.
            lengths: the lengths of all samples, which `packing` sort and pack need.
            rounds: with `packing` pack, microbatches of a step are a multiple of this number.
            attention_cost: how work is balanced with `packing` sort and pack (`packing.plan_step`).

        Raises:
            ConfigError: the batch sizes do not divide, seq_length is not a multiple of `pad_to_multiple_of`,
                or the tokenizer cannot write the template.
        """
        packed = data_config.packing == "pack"
        if (
            micro_batch_size < 1
            or global_batch_size < 1
            or (global_batch_size % (micro_batch_size * data_parallel_size) and not packed)
        ):
            raise ConfigError(
                f"global_batch_size {global_batch_size} must be a multiple of micro_batch_size "
                f"{micro_batch_size} x data-parallel size {data_parallel_size}; change one of them"
            )
        seq_length, multiple = data_config.seq_length, pad_to_multiple_of
        if seq_length % multiple:
            raise ConfigError(
                f"seq_length {seq_length} must be a multiple of {multiple}, to which sequences are padded; "
                f"use {-(-seq_length // multiple) * multiple}"
            )
        if not 0 <= data_parallel_rank < data_parallel_size or start_position < 0:
            raise ConfigError(
                f"data-parallel rank {data_parallel_rank} of {data_parallel_size} at position "
                f"{start_position}: out of range"
            )
        check_template(tokenizer, data_config.conversation_template)
        self.position = start_position
        self.read = 0
        self.skipped: Counter[str] = Counter()
        self.order = order
        self._config, self._dataset, self._pad_id = data_config, dataset, tokenizer.pad_id
        self._planner = StepPlanner(
            data=data_config,
            lengths=lengths,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
            multiple=pad_to_multiple_of,
            rounds=rounds,
            attention_cost=attention_cost,
        )
        self._preparer = Preparer.from_config(
            dataset,
            tokenizer,
            image_processor,
            data_config,
            template=data_config.conversation_template,
            tokens_per_image=tokens_per_image,
            features=features,
        )
        self._lengths_file = str(lengths.path) if lengths is not None else ""
        self._examples: dict[str, list[str]] = {}

    def __iter__(self) -> Iterator[StepBatch]:
        """Iterate over the steps; closing or dropping the generator stops the workers.

        Raises:
            DataError: of at least 100 samples read, a larger share than max_bad_sample_rate was unusable, or
                a larger one than max_long_sample_rate was too long; or the file of lengths was damaged.
        """
        planned: collections.deque[StepPlan] = collections.deque()
        slots = self._slots()
        assembler = Assembler(self._preparer, slots, self._lengths_file)
        # workers are forked here, and not in the thread
        made = iter(fetching(assembler, self._requests(self.position, planned, slots), self._config))
        steps = self._prepared(made, planned, slots)
        with contextlib.closing(one_ahead(steps) if self._config.num_workers else steps) as prepared:
            del made, steps
            for plan, parts in prepared:
                skipped = self._count(plan, parts)
                epoch = self.order.epoch(self.position)
                self.position += self._planner.global_batch_size
                microbatches = [part.micro_batch() for part in parts]
                del parts  # or their memory would not be free for the next steps
                yield StepBatch(microbatches, self.position, epoch, skipped)
                del microbatches

    def _prepared(
        self, made: Iterator[Assembled], planned: collections.deque[StepPlan], slots: Slots
    ) -> Generator[tuple[StepPlan, list[Assembled]], None, None]:
        """The plan and the microbatches of each step."""
        while True:
            first = next(made)  # this step is planned when its first microbatch is there
            plan = planned.popleft()
            parts = [first, *itertools.islice(made, len(plan.tasks) - 1)]
            yield plan, self._of_one_length([part.received(slots) for part in parts])

    def _slots(self) -> Slots:
        """Memory for what workers prepare and for two steps; microbatches beyond go other ways."""
        workers = self._config.num_workers
        if not workers:
            return Slots(0, 0)
        planner, (shape, dtype) = self._planner, self._preparer.image_form
        positions = planner.micro_batch_size * self._config.seq_length
        images = -(-positions // self._preparer.tokens_per_image)
        count = -(-planner.global_batch_size // (planner.micro_batch_size * planner.data_parallel_size))
        return Slots(
            workers * self._config.prefetch_factor + 2 * min(count, _MAX_KEPT),
            Form((3, positions), torch.int32).size + Form((images, *shape), dtype).size + _SPARE,
        )

    def _requests(
        self, position: int, planned: collections.deque[StepPlan], slots: Slots
    ) -> Iterator[tuple[Task, int | None]]:
        """The tasks of all steps from `position` on; each step's plan is added to `planned`."""
        while True:
            planned.append(self._planner.plan(self.order, position))
            for task in planned[-1].tasks:
                yield task, slots.take()
            position += self._planner.global_batch_size

    def _of_one_length(self, parts: list[Assembled]) -> list[Assembled]:
        """The microbatches, all padded to the longest of the step with `packing` none."""
        if self._config.packing != "none":
            return parts
        longest = max(part.text.shape[-1] for part in parts)
        return [self._widened(part, self._planner.row_length(longest)) for part in parts]

    def _widened(self, part: Assembled, positions: int) -> Assembled:
        assert isinstance(part.text, torch.Tensor)
        _, rows, own = part.text.shape
        if own == positions:
            return part
        text = torch.empty(3, rows, positions, dtype=torch.int32)
        fill_with_padding(text, self._pad_id)
        text[..., :own] = part.text
        return replace(part, text=text)

    def _count(self, plan: StepPlan, parts: list[Assembled]) -> dict[str, int]:
        """Count and log the samples that were left out. Raises `DataError` where they are too many."""
        counts: Counter[str] = Counter()
        found = [skipped for part in parts for skipped in part.skipped]
        found += [
            Skipped(self._dataset.key(i), str(self._dataset.shard(i)), reason, message)
            for i, reason, message in plan.left_out
        ]
        read = sum(len(part.keys) for part in parts) + len(plan.left_out)
        for skipped in found:
            counts[skipped.reason] += 1
            self._log(skipped, self.skipped[_LONG] + counts[_LONG], self.read + read)
            examples = self._examples.setdefault(skipped.reason, [])
            if len(examples) < _EXAMPLES:
                examples.append(f"{skipped.key} of {skipped.shard} ({skipped.message})")
        self.read += read
        self.skipped += counts
        if self.read >= _MIN_READ_TO_JUDGE:
            self._judge()
        return dict(counts)

    @staticmethod
    def _log(skipped: Skipped, long: int, read: int) -> None:
        line = f"skipped sample {skipped.key} of {skipped.shard}: {skipped.reason}: {skipped.message}"
        if skipped.reason != _LONG:
            logger.warning("%s", line)
        # long samples are ordinary and can be many: all are counted, only some are logged
        elif long in _POWERS_OF_TEN:
            logger.warning("%s (long samples so far: %d of about %d)", line, long, read)

    def _judge(self) -> None:
        config, long = self._config, self.skipped[_LONG]
        bad = self.skipped.total() - long
        if bad > config.max_bad_sample_rate * self.read:
            what, remedy = (
                "unusable",
                f"max_bad_sample_rate {config.max_bad_sample_rate}; repair or remove them, or raise the rate",
            )
        elif long > config.max_long_sample_rate * self.read:
            bad, what = long, f"longer than seq_length {config.seq_length}"
            remedy = (
                f"max_long_sample_rate {config.max_long_sample_rate}; raise seq_length, cut them "
                "(long_samples: truncate), or raise the rate"
            )
        else:
            return
        counts = ", ".join(f"{reason}: {count}" for reason, count in self.skipped.most_common())
        examples = "\n".join(f"  {reason}: {'; '.join(names)}" for reason, names in self._examples.items())
        raise DataError(
            f"{bad} of {self.read} samples read were {what} ({counts}), more than {remedy}. "
            f"Examples:\n{examples}"
        )
