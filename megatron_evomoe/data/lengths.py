"""The lengths of all samples of some shards in tokens, counted once and kept beside the shards.

Packing and sorting need the lengths of samples that are not yet read. They depend on the contents of the
shards, on the tokenizer, on the template and on the positions of an image; the name of their file and its
header hold a fingerprint of all four, so lengths of other data or of another tokenizer are never used. The
numbers do not depend on seq_length: `Lengths.usable` says what a `seq_length` makes of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from megatron_evomoe.config import ConfigError, DataConfig
from megatron_evomoe.data.conversation import check_template, template_named
from megatron_evomoe.data.errors import DataError
from megatron_evomoe.data.lengths_file import DamagedError, LengthsFile
from megatron_evomoe.data.lengths_work import LengthsWork
from megatron_evomoe.data.sample_length import Column
from megatron_evomoe.data.shards import ShardDataset
from megatron_evomoe.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_VERSION = 1  # changes when the same sample gets another length or another problem than before


class Lengths:
    """The lengths of n samples.

    Attributes:
        path: their file.
        digest: identifies the file's contents; ranks with the same digest have the same lengths.
        problems: the unusable samples by reason, however long a row is.
    """

    def __init__(self, file: LengthsFile, tokens_per_image: int) -> None:
        self._file, self._tokens_per_image = file, tokens_per_image
        self.path, self.digest, self.problems = file.path, file.digest, file.problems

    def __len__(self) -> int:
        return len(self._file.samples)

    def __getitem__(self, samples: np.ndarray | list[int]) -> np.ndarray:
        """Tokens of some whole samples, int32 [k]; negative where a sample is unusable at any length.

        Raises:
            DataError: the file was damaged since it was opened.
        """
        return self._rows(samples)[:, Column.LENGTH]

    def usable(self, samples: np.ndarray | list[int], seq_length: int, long_samples: str) -> np.ndarray:
        """The tokens that training keeps of some samples, int32 [k]; 0 where a sample is left out.

        These are the lengths of the rows of `batch.Preparer` with the same `seq_length` and `long_samples`,
        unless a picture turns out to be bad.

        Raises:
            DataError: as for `__getitem__`.
        """
        samples = np.asarray(samples, np.int64)
        rows = self._rows(samples)
        kept = np.where(rows[:, Column.LEAST] <= seq_length, rows[:, Column.LENGTH].clip(min=0), 0)
        for at in np.flatnonzero(kept > seq_length).tolist():
            kept[at] = self._cut(int(samples[at]), rows[at], seq_length) if long_samples == "truncate" else 0
        return kept.astype(np.int32)

    def _cut(self, sample: int, row: np.ndarray, seq_length: int) -> int:
        """What `batch.truncate` leaves of a sample that is too long."""
        image = int(row[Column.IMAGE])
        begins = [image] if image >= -1 else self._file.images(sample, image)
        end = seq_length
        for begin in begins:
            if 0 <= begin < end < begin + self._tokens_per_image:
                end = int(begin)
                break
        return end if row[Column.SUPERVISED] < end else 0

    def _rows(self, samples: np.ndarray | list[int]) -> np.ndarray:
        samples = np.asarray(samples, np.int64)
        if len(samples) and not 0 <= samples.min() <= samples.max() < len(self):
            raise IndexError(f"samples {samples.min()} to {samples.max()} of {len(self)}")
        try:
            return self._file.rows(samples)
        except DamagedError as error:
            raise DataError(f"{error}; delete it, it is computed again when training starts") from None


def open_lengths(
    dataset: ShardDataset,
    tokenizer: Tokenizer,
    data_config: DataConfig,
    tokens_per_image: int,
    *,
    folder: Path | None = None,
    workers: int | None = None,
    say: Callable[[str], None] | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Lengths:
    """The lengths of the samples of a data set, from their file, or counted now.

    Ranks and jobs that call this at the same time share the work through files. No rank waits for another in
    a collective, and an interrupted call is continued by the next one.

    Args:
        folder: where they are kept if nothing can be written beside the shards.
        workers: processes that count; one for each core of this process if not given.
        say: is given lines about the progress and about unusable samples; on a terminal a bar shows the
            progress. Without it nothing is shown.
        meanwhile: called several times a second while samples are counted. What it raises ends the work.

    Raises:
        ConfigError: the tokenizer cannot write the template, or no folder can be written.
        DataError: the disk is full, or the processes were killed. What was counted is kept.
    """
    template = data_config.conversation_template
    check_template(tokenizer, template)
    fingerprint = lengths_fingerprint(dataset, tokenizer, template, tokens_per_image)
    places = [
        LengthsWork(dataset, tokenizer, template, tokens_per_image, fingerprint, _path(place, fingerprint))
        for place in (dataset.paths[0].parent, folder)
        if place is not None
    ]
    for place in places:
        if (existing := _existing(place)) is not None:
            return Lengths(existing, tokens_per_image)
    work = next((work for work in places if work.can_write()), None)
    if work is None:
        raise ConfigError(
            "the lengths of samples cannot be written to "
            f"{' or '.join(str(work.path.parent) for work in places)}; make one of them writable"
        )
    found = work.complete(workers or len(os.sched_getaffinity(0)), say, meanwhile)
    if say is not None:
        for line in report(found, dataset):
            say(line)
    return Lengths(found, tokens_per_image)


def _path(folder: Path, fingerprint: str) -> Path:
    return folder / f".evomoe-lengths-{fingerprint[:16]}"


def _existing(work: LengthsWork) -> LengthsFile | None:
    """The file of finished work; none if it is missing or damaged. A damaged one is named and removed."""
    try:
        return work.open()
    except FileNotFoundError:
        return None
    except DamagedError as error:
        logger.warning("%s; the lengths are counted again", error)
        with contextlib.suppress(OSError):
            work.path.unlink()
        return None


def lengths_fingerprint(
    dataset: ShardDataset, tokenizer: Tokenizer, template: str, tokens_per_image: int
) -> str:
    """64 hexadecimal digits that identify everything that lengths depend on."""
    what = {
        "version": _VERSION,
        "shards": [digest for _, _, digest in dataset.contents()],
        "tokenizer": tokenizer.fingerprint(),
        "template": [template, asdict(template_named(template))],
        "tokens_per_image": tokens_per_image,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def report(found: LengthsFile | Lengths, dataset: ShardDataset) -> Iterator[str]:
    """A line for each reason for which samples are unusable, with their number and examples."""
    for reason, problem in sorted(found.problems.items(), key=lambda item: -item[1].count):
        examples = "; ".join(
            f"{dataset.key(i)} of {dataset.shard(i)} ({message})" for i, message in problem.examples
        )
        line = f"unusable samples: {reason}: {problem.count} of {len(dataset)}, for example {examples}"
        if reason in ("read-error", "stale-index"):
            line += f". Once they can be read, delete {found.path}"
        yield line
