"""Writing files so that readers, also on other hosts, see the old file or the new one and nothing between."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Replace the file `path` atomically; with `sync`, the replacement also survives a power failure."""
    temporary = temporary_beside(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_beside(path: Path) -> Path:
    """A hidden name beside `path` for this process alone; it holds the host, because hosts share folders."""
    return path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
