"""The lengths of all samples of some shards in tokens, counted once and kept beside the shards.

Packing and sorting need the lengths of samples that are not yet read. They depend on the contents of the
shards, on the tokenizer, on the template and on the positions of an image; the name of their file and its
header hold a fingerprint of all four, so lengths of other data or of another tokenizer are never used. The
numbers do not depend on seq_length: `Lengths.usable` says what a `seq_length` makes of them.

Parts of the work are files too. They are written by whichever process of whichever rank comes first, and an
interrupted run goes on with the parts that exist.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_evomoe.config import ConfigError, DataConfig
from megatron_evomoe.data.conversation import check_template, template_named
from megatron_evomoe.data.errors import DataError
from megatron_evomoe.data.lengths_file import (
    BLOCK,
    DamagedError,
    LengthsFile,
    Problem,
    problems_of,
    write_blocks,
)
from megatron_evomoe.data.sample_length import Column, measure
from megatron_evomoe.data.shards import ShardDataset
from megatron_evomoe.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_VERSION = 1  # changes when the same sample gets another length or another problem than before
_PARTS = 256  # parts of the work, at least one block and at most 16 blocks each
_MAX_PART = 16 * BLOCK
_SAY_EVERY = 10.0  # seconds


@dataclass(frozen=True)
class _Job:
    """What the lengths are of, and where they are kept."""

    dataset: ShardDataset
    tokenizer: Tokenizer
    template: str
    tokens_per_image: int
    fingerprint: str
    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / f".evomoe-lengths-{self.fingerprint[:16]}"

    @property
    def parts_folder(self) -> Path:
        return self.path.with_name(f"{self.path.name}.parts")

    @property
    def part_size(self) -> int:
        """Samples of a part, a multiple of BLOCK; depends on nothing but the number of samples."""
        return min(-(-len(self.dataset) // (_PARTS * BLOCK)) * BLOCK, _MAX_PART)

    def parts(self) -> list[range]:
        """The samples of each part."""
        total = len(self.dataset)
        return [range(first, min(first + self.part_size, total)) for first in range(0, total, self.part_size)]

    def part_path(self, part: range) -> Path:
        return self.parts_folder / f"{part.start:012d}"

    def open(self, path: Path, samples: range) -> LengthsFile:
        return LengthsFile(path, self.fingerprint, samples.start, len(samples))

    def open_all(self) -> LengthsFile:
        return self.open(self.path, range(len(self.dataset)))


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
) -> Lengths:
    """The lengths of the samples of a data set, from their file or computed now.

    Args:
        folder: where they are kept if nothing can be written beside the shards.
        workers: processes that compute; all cores if not given.
        say: is told of the progress and of unusable samples, a line each; nothing is said without it.

    Raises:
        ConfigError: the tokenizer cannot write the template, or no folder can be written.
        DataError: the disk is full, or a worker was killed; what was computed is kept.
    """
    template = data_config.conversation_template
    check_template(tokenizer, template)
    fingerprint = lengths_fingerprint(dataset, tokenizer, template, tokens_per_image)
    jobs = [
        _Job(dataset, tokenizer, template, tokens_per_image, fingerprint, place)
        for place in (dataset.paths[0].parent, folder)
        if place is not None
    ]
    for job in jobs:
        found = _existing(job)
        if found is not None:
            return Lengths(found, tokens_per_image)
    job = next((job for job in jobs if _can_write(job)), None)
    if job is None:
        raise ConfigError(
            f"the lengths of samples cannot be written to {' or '.join(str(job.folder) for job in jobs)}; "
            "make one of them writable"
        )
    say = say or (lambda _: None)
    found = _computed(job, workers or len(os.sched_getaffinity(0)), say)
    for line in report(found.problems, dataset):
        say(line)
    return Lengths(found, tokens_per_image)


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


def report(problems: dict[str, Problem], dataset: ShardDataset) -> Iterator[str]:
    """A line for each reason for which samples are unusable, with their number and examples."""
    for reason, problem in sorted(problems.items(), key=lambda item: -item[1].count):
        examples = "; ".join(
            f"{dataset.key(i)} of {dataset.shard(i)} ({message})" for i, message in problem.examples
        )
        yield f"unusable samples: {reason}: {problem.count} of {len(dataset)}, for example {examples}"


def _existing(job: _Job) -> LengthsFile | None:
    """The file of a job; none if it is missing or damaged, which is logged."""
    try:
        return job.open_all()
    except FileNotFoundError:
        return None
    except DamagedError as error:
        logger.warning("%s; the lengths are computed again", error)
        return None


def _can_write(job: _Job) -> bool:
    try:
        job.parts_folder.mkdir(parents=True, exist_ok=True)
        probe = job.parts_folder / f".probe.{os.uname().nodename}.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _cannot_write(job, error) from None
        return False
    return True


def _computed(job: _Job, workers: int, say: Callable[[str], None]) -> LengthsFile:
    """Compute the parts that are missing, join them, and open the result."""
    parts = job.parts()
    missing = [part for part in parts if not _is_done(job, part)]
    # ranks that begin at once begin at different parts
    turn = int(hashlib.sha256(f"{os.uname().nodename} {os.getpid()}".encode()).hexdigest(), 16)
    turn %= max(len(missing), 1)
    done, total = len(job.dataset) - sum(map(len, missing)), len(job.dataset)
    say(f"lengths of samples: computing {total - done} of {total} in {job.path}")
    began = said = time.monotonic()
    before = done
    try:
        for part in _in_processes(job, missing[turn:] + missing[:turn], workers):
            done += len(part)
            if time.monotonic() - said > _SAY_EVERY or done == total:
                said = time.monotonic()
                say(f"lengths of samples: {done} of {total}, {(done - before) / (said - began):.0f} a second")
        return _joined(job, parts)
    except OSError as error:
        raise _cannot_write(job, error) from None


def _cannot_write(job: _Job, error: OSError) -> DataError:
    kept = sum(len(part) for part in job.parts() if job.part_path(part).exists())
    return DataError(
        f"the lengths of samples cannot be written to {job.folder}: {error.strerror or error}; the lengths "
        f"of {kept} of {len(job.dataset)} samples are kept in {job.parts_folder}. Make room and start again"
    )


def _in_processes(job: _Job, parts: list[range], workers: int) -> Iterator[range]:
    """Compute parts; yields each when it is done."""
    if min(workers, len(parts)) <= 1:
        for part in parts:
            _compute(job, part)
            yield part
        return
    # forked, so that the index is shared; the processes use neither torch.distributed nor CUDA
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(workers, len(parts)), context, _start_worker, (job,)) as pool:
        futures = {pool.submit(_compute_in_worker, part): part for part in parts}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BrokenProcessPool:
            raise DataError(
                "a process that computed lengths of samples was killed (out of memory?); start again, and "
                f"what is in {job.parts_folder} is kept"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_job: _Job | None = None  # of a worker process


def _start_worker(job: _Job) -> None:
    global _job
    _job = job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)  # a killed parent cannot stop its workers

    threading.Thread(target=watch, daemon=True).start()


def _compute_in_worker(part: range) -> None:
    assert _job is not None
    _compute(_job, part)


def _compute(job: _Job, part: range) -> None:
    """Compute and write one part, unless another rank has done so."""
    if job.part_path(part).exists() or job.path.exists():
        return
    blocks, problems = [], {}
    for first in range(part.start, part.stop, BLOCK):
        samples = range(first, min(first + BLOCK, part.stop))
        found = measure(job.dataset, samples, job.tokenizer, job.template, job.tokens_per_image)
        blocks.append((found.rows, np.array(found.several, np.int32)))
        for reason, problem in problems_of(first, found).items():
            problems.setdefault(reason, Problem()).add(problem)
    job.parts_folder.mkdir(parents=True, exist_ok=True)
    write_blocks(job.part_path(part), job.fingerprint, part.start, blocks, problems)


def _is_done(job: _Job, part: range) -> bool:
    """Whether the file of a part exists and is sound; a damaged one is named and removed."""
    try:
        job.open(job.part_path(part), part)
        return True
    except FileNotFoundError:
        return False
    except DamagedError as error:
        logger.warning("%s; it is computed again", error)
        job.part_path(part).unlink(missing_ok=True)
        return False


def _joined(job: _Job, parts: list[range]) -> LengthsFile:
    """Join the parts into one file, unless another rank was faster."""
    try:
        files = [job.open(job.part_path(part), part) for part in parts]
    except FileNotFoundError:
        files = []
    if files:
        problems: dict[str, Problem] = {}
        for file in files:
            for reason, problem in file.problems.items():
                problems.setdefault(reason, Problem()).add(problem)
        blocks = [file.block(block) for file in files for block in range(file.num_blocks)]
        write_blocks(job.path, job.fingerprint, 0, blocks, problems)
    found = job.open_all()
    with contextlib.suppress(OSError):
        shutil.rmtree(job.parts_folder)
    return found
