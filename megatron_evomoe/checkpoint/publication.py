"""Turns one save into a checkpoint: what rank 0 does alone, between agreements of all ranks.

No rank may wait for one that has failed. torch's writer tells every rank about the failure of any rank; what
rank 0 writes alone, it writes between two agreements; and other failures are told through the key-value store
of the job (train/alarm.py).
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.api import CheckpointException

from megatron_evomoe.checkpoint import files, integrity
from megatron_evomoe.checkpoint import record as records
from megatron_evomoe.checkpoint.find import candidates, latest
from megatron_evomoe.checkpoint.record import CheckpointError, Record, write_tracker
from megatron_evomoe.config import CheckpointConfig

_FREE_SPACE_MARGIN = 1.05


@dataclass
class Publication:
    """One save, from the directory `saving_…` to the checkpoint `iter_…`."""

    directory: Path
    record: Record
    config_yaml: str
    config: CheckpointConfig
    attempt: str = ""
    common: bytes = b""
    """The bytes of `common.pt`, on rank 0."""
    is_published: bool = False

    @property
    def final(self) -> Path:
        return self.directory / f"iter_{self.record.step:07d}"

    @property
    def pending(self) -> Path:
        return self.directory / f"saving_{self.record.step:07d}_{self.attempt}"

    def prepare(self, state: dict[str, Any], check_folder: Callable[[], None]) -> None:
        """Create the directory of the save, and check that the disk has room for it. Communicates.

        Args:
            check_folder: is called on rank 0 before anything is written; what it raises ends the save.

        Raises:
            CheckpointError: on every rank; the check failed, or there is not enough room.
        """
        # A background writer can outlive a killed job, and must not write into a new attempt to save this
        # step.
        attempt = [f"{os.getpid():x}{time.time_ns():x}"]
        dist.broadcast_object_list(attempt, src=0)
        self.attempt = attempt[0]
        error, free = None, 0
        if dist.get_rank() == 0:
            try:
                check_folder()
                for leftover in self.directory.glob("saving_*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                self.pending.mkdir(parents=True)
                free = shutil.disk_usage(self.directory).free
            except Exception as failure:
                error = failure
        self.agree(error)
        try:
            _require_free_space(self.directory, state, free)
        except CheckpointError:
            self._remove_pending()
            raise

    def agree(self, met: BaseException | None) -> None:
        """Raise on every rank what any rank has met. Communicates."""
        reports: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(reports, (socket.gethostname(), _failures(met), self.is_published))
        failures = {rank: text for _, told, _ in reports if told is not None for rank, text in told.items()}
        if any(told is not None for _, told, _ in reports):
            rank = min(failures, default=0)
            what = f"rank {rank} ({reports[rank][0]}): {failures.get(rank, 'a write failed')}"
            error = self._error(what, is_published=any(published for _, _, published in reports))
            error.is_shared = True
            raise error

    def failed(self, error: Exception) -> CheckpointError:
        """The error to raise for what only this rank has met; the alarm tells the other ranks."""
        what = f"rank {dist.get_rank()} ({socket.gethostname()}): {_in_a_line(error)}"
        return self._error(what, is_published=self.is_published)

    def _error(self, what: str, *, is_published: bool) -> CheckpointError:
        if is_published:
            return CheckpointError(
                f"{self.final} is published and whole, but what follows failed: {what}. "
                f"{records.TRACKER} may name an older checkpoint, and older ones may be left"
            )
        self._remove_pending()
        return CheckpointError(
            f"saving {self.final} failed: {what}. Nothing was published; {_last(self.directory)} stays "
            "the newest"
        )

    def conclude(self, error: BaseException | None, sums: dict[str, list[int]] | None = None) -> None:
        """Publish the save: checksums, record, the new name, the tracker. Communicates.

        In this order a kill at any point leaves the last good checkpoint.

        Args:
            error: what this rank met while it wrote tensors.
            sums: size and CRC-32 of the tensor files that this rank wrote; None reads the files back.

        Raises:
            CheckpointError: on every rank; a rank has failed.
        """
        if error is None and sums is None:
            try:
                sums = self._sum_own_files()
            except Exception as failure:
                error = failure
        self.agree(error)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, sums)
        error = None
        if dist.get_rank() == 0:
            try:
                self._publish({name: entry for part in everyone for name, entry in part.items()})
            except Exception as failure:
                error = failure
        self.agree(error)

    def _sum_own_files(self) -> dict[str, list[int]]:
        """Size and checksum of this rank's tensor files, read back while they are still cached."""
        return {p.name: _entry(p) for p in self.pending.glob(f"__{dist.get_rank()}_*.distcp")}

    def _publish(self, sums: dict[str, list[int]]) -> None:
        """Turn the directory into a checkpoint, on rank 0 alone; `conclude` tells the others of a failure."""
        files.write(self.pending / "common.pt", self.common)
        with files.naming(self.pending / "metadata.json"):
            save_config(CheckpointingConfig("torch_dist", 1), str(self.pending))
        files.write(self.pending / "run_config.yaml", self.config_yaml.encode())
        for name, (size, _) in sums.items():
            if (self.pending / name).stat().st_size != size:
                raise OSError(f"{name} has another size than was written")
        rest = {p.name: _entry(p) for p in self.pending.iterdir() if p.name not in sums}
        self.record.files = {**sums, **rest}
        with files.naming(self.pending / records.FILE_NAME):
            self.record.write(self.pending)
        for name in (*rest, records.FILE_NAME, ""):
            files.sync(self.pending / name)
        shutil.rmtree(self.final, ignore_errors=True)
        os.replace(self.pending, self.final)
        self.is_published = True
        with files.naming(self.directory / records.TRACKER):
            write_tracker(self.directory, self.record.step)
        _drop_old(self.directory, self.config)

    def _remove_pending(self) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(self.pending, ignore_errors=True)


def _failures(error: BaseException | None) -> dict[int, str] | None:
    """What each rank met; empty if another rank knows it, and None if there is no error.

    Only rank 0 has the details of torch's CheckpointException.
    """
    if error is None:
        return None
    if isinstance(error, CheckpointException):
        return {rank: _in_a_line(wrapped[0]) for rank, wrapped in error.failures.items()}
    return {dist.get_rank(): _in_a_line(error)}


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _entry(path: Path) -> list[int]:
    return [path.stat().st_size, integrity.checksum(path)]


def _require_free_space(directory: Path, state: dict[str, Any], free_here: int) -> None:
    """Refuse a save that does not fit into the free space that rank 0 sees. Communicates."""
    sizes: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(sizes, sum(t.numel() * t.element_size() for t in _main_replicas(state)))
    free = [free_here]
    dist.broadcast_object_list(free, src=0)
    needed = int(sum(sizes) * _FREE_SPACE_MARGIN)
    if needed > free[0]:
        raise CheckpointError(
            f"saving to {directory} needs about {needed / 2**20:.1f} MiB and {free[0] / 2**20:.1f} MiB are "
            f"free. Nothing was written; {_last(directory)} stays the newest. Free some space and resume"
        )


def _main_replicas(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, dict):
        return [t for v in tree.values() for t in _main_replicas(v)]
    if isinstance(tree, (list, tuple)):
        return [t for v in tree for t in _main_replicas(v)]
    replica, data = getattr(tree, "replica_id", None), getattr(tree, "data", None)
    is_main = replica is not None and (replica == 0 or (isinstance(replica, tuple) and not any(replica)))
    return [data] if is_main and torch.is_tensor(data) else []


def _last(directory: Path) -> str:
    try:
        found = latest(directory)
    except OSError:
        return "what was saved before"
    return str(found) if found else "no checkpoint"


def _drop_old(directory: Path, config: CheckpointConfig) -> None:
    if config.keep > 0:
        for path in candidates(directory)[config.keep :]:
            if not config.keep_every or int(path.name[5:]) % config.keep_every:
                shutil.rmtree(path, ignore_errors=True)
