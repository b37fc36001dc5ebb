"""Reading a checkpoint's files side by side: megatron-core reads one after the other, on one core."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import torch as core
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

_THREADS = 2  # a saving rank writes that many files


class ParallelReader(FileSystemReader):
    """Torch's reader with a thread for each of a few files; `.metadata` is read once."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What `.metadata` says."""
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors that `plan` asks for.

        Raises:
            Whatever a thread met.
        """
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self.storage_data[item.storage_index].relative_path].append(item)
        read = super().read_data
        with ThreadPoolExecutor(_THREADS) as threads:
            for done in [threads.submit(read, replace(plan, items=items), planner) for items in by_file.values()]:
                done.result()
        finished: Future[None] = Future()
        finished.set_result(None)
        return finished


@contextlib.contextmanager
def parallel_reads() -> Iterator[None]:
    """Inside, megatron-core loads through `ParallelReader`; it has no argument for that."""
    before = core._get_filesystem_reader
    core._get_filesystem_reader = lambda directory, *args, **kwargs: ParallelReader(directory)
    try:
        yield
    finally:
        core._get_filesystem_reader = before
