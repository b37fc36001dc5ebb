"""Writes the tensors of a checkpoint, with checksums taken on the way to the disk.

megatron-core's writer forks a process for each file, starts an interpreter for their results, and keeps a
copy of every tensor that is a view into a larger buffer until everything is written. A save that training
waits for needs none of that: here the threads of torch's own writer write each tensor from where it is in
memory. The files have the same `torch_dist` format (docs/checkpoints.md has measurements). A background save
uses megatron-core's writer.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.futures import Future

from megatron_evomoe.checkpoint import integrity
from megatron_evomoe.checkpoint.files import naming
from megatron_evomoe.checkpoint.mapped import alone
from megatron_evomoe.parallel import backend


def split(state: dict[str, Any], content: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """What all ranks write of `state`, and the bytes of `common.pt`, which rank 0 writes alone. Communicates.

    megatron-core's own `save` writes that file in between, on rank 0; if that fails, the other ranks already
    wait in a collective. From 0.19 on, megatron-core makes it an object among the tensors, and reads both
    forms.

    Args:
        content: how the checkpoint is sharded (`store.metadata`).

    Returns:
        The sharded state dict, and the bytes, which are empty on other ranks.
    """
    sharded, common = save_preprocess({**state, "content_metadata": content})
    buffer = io.BytesIO()
    if dist.get_rank() == 0:
        torch.save(common, buffer)
    return sharded, buffer.getvalue()


class _SummingFileSystem(FileSystem):
    """torch's file system, which also keeps size and checksum of each file that it writes."""

    def __init__(self) -> None:
        self.sums: dict[str, list[int]] = {}
        self.failures: list[Exception] = []

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        path = Path(path)
        try:
            with naming(path), integrity.SummedFile(path) as stream:
                yield stream
        except Exception as error:
            self.failures.append(error)
            raise
        self.sums[path.name] = [path.stat().st_size, stream.crc]


class _Writer(FileSystemWriter):
    """torch's writer on a `_SummingFileSystem`."""

    def __init__(self, path: Path) -> None:
        # one thread on CUDA, because torch copies from the device ahead of writing only then
        super().__init__(path, thread_count=1 if backend.on_gpu() else 2)
        self.fs: _SummingFileSystem = _SummingFileSystem()

    def storage_meta(self) -> None:
        """Nothing; torch would note the path of the directory, which is going to change."""

    def write_data(self, plan: Any, planner: Any) -> Future[list[Any]]:
        written = super().write_data(plan, planner)
        if (done := len(written.value())) != len(plan.items):  # torch drops an error of its second thread
            lost = OSError(f"only {done} of {len(plan.items)} tensors could be written")
            raise next(iter(self.fs.failures), lost)
        return written


class _Planner(MCoreSavePlanner):
    """megatron-core's planner, which passes shards in a form that torch's writer does not copy."""

    def __init__(self) -> None:
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)

    def resolve_data(self, write_item: Any) -> Any:
        data = super().resolve_data(write_item)
        if not torch.is_tensor(data) or not data.is_cpu or not data.is_contiguous():
            return data
        return alone(data)


class SummingStrategy(TorchDistSaveShardedStrategy):
    """megatron-core's `torch_dist` for saves that training waits for, written as the module's docstring says.

    Attributes:
        sums: after `save`, file name to [bytes, CRC-32] of the files that this rank wrote.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)
        self.sums: dict[str, list[int]] = {}

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        """Write the tensors of all ranks and `.metadata`. Communicates.

        Raises:
            CheckpointException, OSError: some rank could not write.
        """
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        writer = _Writer(checkpoint_dir)
        with integrity.no_checksums_of_torch():
            dcp.save(mcore_to_pyt_state_dict(state, False), storage_writer=writer, planner=_Planner())
        self.sums = {name: entry for name, entry in writer.fs.sums.items() if name.endswith(".distcp")}


class BackgroundStrategy(TorchDistSaveShardedStrategy):
    """megatron-core's own writer, which forks.

    An error of rank 0 in writing `.metadata` is kept, because raising it there would leave the other ranks in
    a collective.

    Attributes:
        failure: that error.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)
        self.failure: Exception | None = None

    def begin(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> Any:
        """A request for an `AsyncCallsQueue`. Communicates."""
        # newer versions use nvidia-resiliency-ext for background saves unless they are told to use their own
        # writer
        own = ["mcore"] if "async_strategy" in inspect.signature(super().async_save).parameters else []
        return self.async_save(sharded_state_dict, checkpoint_dir, *own)

    def _get_save_and_finalize_callbacks(self, writer: Any, *args: Any) -> Any:
        finish = writer.finish

        def finish_and_keep_the_failure(*results: Any) -> None:
            try:
                with naming(Path(writer.path) / ".metadata"):
                    finish(*results)
            except Exception as error:
                self.failure = error

        writer.finish = finish_and_keep_the_failure
        return super()._get_save_and_finalize_callbacks(writer, *args)
