"""The training data of one data-parallel replica, resumable with any number of ranks and workers.

The order of all samples is a function of (seed, stage, epoch, position) alone (`data.order`). A global batch
is a slice of that order, and the microbatches of a replica are a slice of the batch. Worker processes only
fetch samples; the batches arrive in the order in which they were requested.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from megatron_evomoe.config import ConfigError, DataConfig
from megatron_evomoe.data.batch import EvalSample, MicroBatch, Preparer, Row, collate, prepare_eval
from megatron_evomoe.data.conversation import check_template
from megatron_evomoe.data.errors import DataError
from megatron_evomoe.data.feature_cache import FeatureCache
from megatron_evomoe.data.image import ImageProcessor
from megatron_evomoe.data.order import SampleOrder, replica_positions
from megatron_evomoe.data.shards import ShardDataset
from megatron_evomoe.data.tokenizer import Tokenizer

__all__ = ["EvalSample", "MicroBatch", "SampleOrder", "StepBatch", "TrainLoader", "prepare_eval"]

logger = logging.getLogger(__name__)

_MIN_READ_TO_JUDGE = 100
_EXAMPLES = 5
_LONG = "too-long"
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


class _Rows(Dataset):
    """Sample numbers to (rows, images).

    One tensor holds the images of a batch, so that they cross processes in shared memory.
    """

    def __init__(self, preparer: Preparer) -> None:
        self.preparer = preparer

    def __getitems__(self, indices: list[int]) -> tuple[list[Row], torch.Tensor]:
        rows = [self.preparer.row(i) for i in indices]
        images = self.preparer.stack([image for row in rows for image in row.images])
        for row in rows:
            row.images = []
        return rows, images


def _as_is(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    # the processes work in parallel already, and the thread pool of a forked process would not work
    torch.set_num_threads(1)


def fetching(dataset: Dataset, batches: Iterable[list[Any]], data: DataConfig) -> DataLoader:
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
        read: samples that this replica has read since it was constructed.
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
    ) -> None:
        """See the class.

        Args:
            order: the order of the samples.
            pad_to_multiple_of: sequences are padded to a multiple of this number of positions.
            features: gives features in place of the images of the shards.

        Raises:
            ConfigError: the batch sizes do not divide, seq_length is not a multiple of `pad_to_multiple_of`,
                or the tokenizer cannot write the template.
        """
        if (
            micro_batch_size < 1
            or global_batch_size < 1
            or global_batch_size % (micro_batch_size * data_parallel_size)
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
        self._config, self._pad_id, self._multiple = data_config, tokenizer.pad_id, pad_to_multiple_of
        self._slice = dict(
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
        )
        self._rows = _Rows(
            Preparer.from_config(
                dataset,
                tokenizer,
                image_processor,
                data_config,
                template=data_config.conversation_template,
                tokens_per_image=tokens_per_image,
                features=features,
            )
        )
        self._examples: dict[str, list[str]] = {}

    def __iter__(self) -> Iterator[StepBatch]:
        """Iterate over the steps; closing or dropping the generator stops the workers.

        Raises:
            DataError: of at least 100 samples read, a larger share than max_bad_sample_rate was unusable, or
                a larger one than max_long_sample_rate was too long.
        """
        batches = iter(fetching(self._rows, self._indices(self.position), self._config))
        step = self._slice["global_batch_size"]
        per_step = len(replica_positions(0, **self._slice))
        while True:
            # copied out of shared memory, where each tensor keeps a file descriptor open; a step can have
            # hundreds
            fetched = [
                (rows, images.clone() if images.is_shared() else images)
                for rows, images in itertools.islice(batches, per_step)
            ]
            skipped = self._count([row for rows, _ in fetched for row in rows])
            length = self._length([row for rows, _ in fetched for row in rows])
            microbatches = [collate(rows, images, length, self._pad_id) for rows, images in fetched]
            epoch = self.order.epoch(self.position)
            self.position += step
            yield StepBatch(microbatches, self.position, epoch, skipped)

    def _indices(self, position: int) -> Iterator[list[int]]:
        while True:
            for positions in replica_positions(position, **self._slice):
                yield self.order.indices(positions).tolist()
            position += self._slice["global_batch_size"]

    def _length(self, rows: list[Row]) -> int:
        """The number of positions to which all microbatches of the step are padded."""
        if self._config.pad_to_seq_length:
            return self._config.seq_length
        longest = max((len(row.sample.tokens) for row in rows if row.sample is not None), default=0)
        return -(-max(longest, 1) // self._multiple) * self._multiple

    def _count(self, rows: list[Row]) -> dict[str, int]:
        """Count and log the samples that were left out. Raises `DataError` where they are too many."""
        skipped: Counter[str] = Counter()
        for row in rows:
            if row.problem is not None:
                reason, message = row.problem
                skipped[reason] += 1
                long = self.skipped[_LONG] + skipped[_LONG]
                if reason != _LONG:
                    logger.warning("skipped sample %s of %s: %s: %s", row.key, row.shard, reason, message)
                # long samples are ordinary and can be many: all are counted, only some are logged
                elif long in _POWERS_OF_TEN:
                    logger.warning(
                        "skipped sample %s of %s: %s: %s (long samples so far: %d of about %d)",
                        row.key,
                        row.shard,
                        reason,
                        message,
                        long,
                        self.read + len(rows),
                    )
                examples = self._examples.setdefault(reason, [])
                if len(examples) < _EXAMPLES:
                    examples.append(f"{row.key} of {row.shard} ({message})")
        self.read += len(rows)
        self.skipped += skipped
        if self.read >= _MIN_READ_TO_JUDGE:
            self._judge()
        return dict(skipped)

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
