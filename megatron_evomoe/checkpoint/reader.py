"""Lets megatron-core and torch read a checkpoint without running anything, and several files at once.

By default they unpickle `.metadata` and the objects inside tensor files without restriction, read `common.pt`
by torch's default (which an environment variable changes), and read one file after the other on one core.
"""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import common as core_common
from megatron.core.dist_checkpointing.strategies import torch as core
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from megatron_evomoe.checkpoint import contents, metadata

_THREADS = 2  # each saving rank writes as many files


class SafeReader(FileSystemReader):
    """torch's reader with a thread for each of a few files; nothing in the checkpoint is run."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._folder = Path(path)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The content of `.metadata`, which is read once.

        Raises:
            CheckpointError: as for `metadata.read`.
        """
        if self._metadata is None:
            self._metadata = metadata.read(self._folder)
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors and objects that `plan` asks for.

        Raises:
            Exception: whatever a thread met.
        """
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, self._made_anew(item))
            else:
                by_file[self.storage_data[item.storage_index].relative_path].append(item)
        read = super().read_data
        with ThreadPoolExecutor(_THREADS) as threads:
            for done in [
                threads.submit(read, replace(plan, items=items), planner) for items in by_file.values()
            ]:
                done.result()
        finished: Future[None] = Future()
        finished.set_result(None)
        return finished

    def _made_anew(self, item: ReadItem) -> io.BytesIO:
        """The bytes of an object as we save it, because torch's planner opens them without restriction."""
        value = contents.read_object(
            self._folder, item.storage_index.fqn, self.storage_data[item.storage_index]
        )
        content = io.BytesIO()
        torch.save(value, content)
        content.seek(0)
        return content


@contextlib.contextmanager
def safe_reads() -> Iterator[None]:
    """Let megatron-core load through `SafeReader` and `contents.read_common` inside a `with` block.

    It has no arguments for that.
    """
    ours: list[tuple[Any, str, Any]] = [
        (core, "_get_filesystem_reader", lambda directory, *args, **kwargs: SafeReader(directory)),
        (
            serialization,
            "_get_filesystem_reader",
            lambda directory, *args, **kwargs: SafeReader(directory),
        ),  # 0.19
        (serialization, "load_common", lambda directory: contents.read_common(Path(directory))),  # 0.19
        (
            getattr(core_common, "TorchCommonLoadStrategy", None),
            "load_common",
            lambda strategy, directory: contents.read_common(Path(directory)),
        ),  # 0.16
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in ours if hasattr(owner, name)]
    try:
        for owner, name, function in ours:
            if hasattr(owner, name):
                setattr(owner, name, function)
        with contents.no_more_than_torchs():
            yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)
