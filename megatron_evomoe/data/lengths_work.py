"""Counts the lengths of all samples of a data set, in several processes of several ranks."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_evomoe.data.errors import DataError
from megatron_evomoe.data.lengths_file import (
    BLOCK,
    DamagedError,
    LengthsFile,
    Problem,
    file_content,
    problems_of,
)
from megatron_evomoe.data.progress import Progress
from megatron_evomoe.data.sample_length import measure
from megatron_evomoe.data.shards import ShardDataset
from megatron_evomoe.data.shared_work import build_together, parts_folder
from megatron_evomoe.data.tokenizer import Tokenizer
from megatron_evomoe.data.workers import WorkerKilledError, run_in_processes

logger = logging.getLogger(__name__)

_PIECES = 256  # at least; fewer where a piece would be less than a block
_MAX_BLOCKS = 16  # of a piece, whose numbers a process holds in memory
_ATTEMPTS = 3


@dataclass(frozen=True)
class LengthsWork:
    """The lengths of the samples of a data set, which are to be written to `path`."""

    dataset: ShardDataset
    tokenizer: Tokenizer
    template: str
    tokens_per_image: int
    fingerprint: str
    path: Path

    def open(self) -> LengthsFile:
        """The finished file. Raises `FileNotFoundError` and `DamagedError`."""
        return LengthsFile(self.path, self.fingerprint, range(len(self.dataset)))

    def can_write(self) -> bool:
        """Whether files can be created beside `path`."""
        probe = self.path.with_name(f"{self.path.name}.{os.uname().nodename}.{os.getpid()}.probe")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._cannot_write(error) from None
            return False
        return True

    def complete(
        self, workers: int, say: Callable[[str], None] | None, meanwhile: Callable[[], None]
    ) -> LengthsFile:
        """Count what is missing in `workers` processes, and open the result.

        Raises:
            DataError: the disk is full, or the processes were killed.
        """
        total = len(self.dataset)
        with Progress(f"lengths of samples in {self.path}", "samples", total, say) as progress:

            def look() -> None:
                progress.at(min(self._counted() * self._piece_size, total))
                meanwhile()

            look()
            try:
                run_in_processes(min(workers, self.pieces), self._take_part, look)
            except OSError as error:
                raise self._cannot_write(error) from None
            except WorkerKilledError as error:
                raise DataError(
                    f"the processes that counted lengths of samples were killed ({error}; out of memory?). "
                    f"{self._kept()}; start again, with fewer processes"
                ) from None
            progress.at(total)
        return self.open()

    @property
    def _piece_size(self) -> int:
        """Samples of a piece, a multiple of BLOCK; it depends on nothing but the number of samples."""
        return min(-(-len(self.dataset) // (_PIECES * BLOCK)), _MAX_BLOCKS) * BLOCK

    @property
    def pieces(self) -> int:
        """The number of pieces that the work is divided into."""
        return -(-len(self.dataset) // self._piece_size)

    def _samples(self, piece: int) -> range:
        first = piece * self._piece_size
        return range(first, min(first + self._piece_size, len(self.dataset)))

    def _counted(self) -> int:
        """The number of pieces whose results are on disk."""
        try:
            names = os.listdir(parts_folder(self.path, self.pieces))
        except FileNotFoundError:
            return 0
        return sum(name.endswith(".part") for name in names)

    def _kept(self) -> str:
        kept = min(self._counted() * self._piece_size, len(self.dataset))
        return (
            f"The lengths of {kept} of {len(self.dataset)} samples are kept in "
            f"{parts_folder(self.path, self.pieces)}"
        )

    def _cannot_write(self, error: OSError) -> DataError:
        return DataError(
            f"the lengths of samples cannot be written to {self.path.parent}: {error.strerror or error}. "
            f"{self._kept()}; make room for {-(-len(self.dataset) // 50_000)} MB and start again"
        )

    def _take_part(self) -> None:
        """The share of one process."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
        for attempt in range(_ATTEMPTS):
            try:
                return build_together(self.path, self.pieces, self._count, self._join)
            except DamagedError as error:  # the piece is removed
                logger.warning("%s; it is counted again", error)
                if attempt == _ATTEMPTS - 1:
                    raise

    def _count(self, piece: int) -> bytes:
        """The file of the lengths of a piece."""
        blocks: list[tuple[np.ndarray, np.ndarray]] = []
        problems: dict[str, Problem] = {}
        samples = self._samples(piece)
        for first in range(samples.start, samples.stop, BLOCK):
            some = range(first, min(first + BLOCK, samples.stop))
            found = measure(self.dataset, some, self.tokenizer, self.template, self.tokens_per_image)
            blocks.append((found.rows, np.array(found.several, np.int32)))
            for reason, problem in problems_of(first, found).items():
                problems.setdefault(reason, Problem()).add(problem)
        return b"".join(file_content(self.fingerprint, samples.start, blocks, problems))

    def _join(self, parts: Sequence[Path], path: Path) -> None:
        """Write the whole file of the files of all pieces. Raises `DamagedError`."""
        files: list[LengthsFile] = []
        for piece, part in enumerate(parts):
            try:
                files.append(LengthsFile(part, self.fingerprint, self._samples(piece)))
            except DamagedError:
                part.unlink(missing_ok=True)
                raise
        problems: dict[str, Problem] = {}
        for file in files:
            for reason, problem in file.problems.items():
                problems.setdefault(reason, Problem()).add(problem)
        blocks = [file.block(block) for file in files for block in range(file.num_blocks)]
        with open(path, "wb") as whole:
            for some in file_content(self.fingerprint, 0, blocks, problems):
                whole.write(some)
