"""An output directory that appears complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_evomoe.checkpoint.record import CheckpointError


@contextmanager
def output_directory(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to, and rename it to `path` when the block ends without an error.

    The block makes the directory. After an error it is removed.

    Raises:
        CheckpointError: something is at `path` already, other than an empty directory.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists and is not empty; choose another --output, or remove it")
    pending = path.with_name(f".{path.name}.unfinished-{os.getpid()}")
    try:
        yield pending
        if path.is_dir():
            path.rmdir()
        os.replace(pending, path)
    finally:
        shutil.rmtree(pending, ignore_errors=True)


def require_room(path: Path, needed: int) -> None:
    """Check that `needed` bytes fit on the disk of `path`, which need not exist yet.

    Raises:
        CheckpointError: they do not fit.
    """
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise CheckpointError(
            f"{path} needs up to {needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free; nothing "
            "was written. Free some space, or choose another --output"
        )
