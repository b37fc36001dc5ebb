"""Opens a stage's shards on all ranks: one of each node looks at the files, and all make what is missing.

Ranks tell each other through the job's key-value store and look at it several times a second, so that no
collective waits while indexes are made, however long that takes.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_evomoe.config import ConfigError
from megatron_evomoe.data.errors import DataError
from megatron_evomoe.data.shard_set import ShardSet, complete, draft_of
from megatron_evomoe.data.shards import ShardDataset, expand_paths

_POLL = 0.05
_opened = 0


class _FailedElsewhereError(Exception):
    """Another rank has a problem, which it reports in the collective that follows."""


def open_shards(
    paths: list[str], cache: Path, *, reads: bool, readers: int, say: Callable[[str], None]
) -> ShardDataset | None:
    """The samples of the shards on the ranks that read them; none elsewhere. Communicates through the store.

    It returns once all readers have opened the shards, or one of them has failed.

    Args:
        paths: as in `train_data`.
        cache: the directory for what cannot be written beside the shards; all nodes share it.
        reads: whether this rank reads samples.
        readers: the number of ranks that do.
        say: is given lines on the progress.

    Raises:
        ConfigError: this rank found no shard, or one that it cannot read.
        OSError: files cannot be read.
    """
    global _opened
    _opened += 1
    store: Any = dist.distributed_c10d._get_default_store()
    prefix = f"shards/{_opened}"
    said = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said
        if store.check([f"{prefix}/failed"]):
            raise _FailedElsewhereError
        if total and time.monotonic() - said > 30:
            said = time.monotonic()
            say(f"index of the shards: {done} of {total} shards")

    dataset = None
    try:
        if reads:
            found = _from_node(store, f"{prefix}/{socket.gethostname()}", paths, cache, progress)
            dataset = ShardDataset(paths, cache=cache, progress=progress) if found is None else found
            store.add(f"{prefix}/done", 1)
        while store.add(f"{prefix}/done", 0) < readers:
            progress(0, 0)
            time.sleep(_POLL)
    except _FailedElsewhereError:
        return None
    except (ConfigError, DataError, OSError):
        store.set(f"{prefix}/failed", "")
        raise
    return dataset


def _from_node(
    store: Any, key: str, paths: list[str], cache: Path, progress: Callable[[int, int], None]
) -> ShardDataset | None:
    """The samples as the first rank of this host found them; none if each rank must look for itself."""
    if store.add(f"{key}/first", 1) == 1:
        shards = expand_paths(paths)
        draft, places = draft_of(shards, cache)
        place, plan = (draft.path, None) if draft.path is not None else _written(draft, places)
        told: dict[str, Any] = {"folder": str(shards[0].parent)}
        told |= {"place": place and str(place), "plan": plan and str(plan)}
        store.set(f"{key}/found", json.dumps(told))
        draft.log_problems()
    else:
        while not store.check([f"{key}/found"]):
            progress(0, 0)
            time.sleep(_POLL)
        told = json.loads(store.get(f"{key}/found"))
    if told["place"] is None:
        return None
    table: ShardSet | None
    target, folder = Path(told["place"]), Path(told["folder"])
    table = ShardSet.open(target, folder)
    if table is None and told["plan"] is not None:
        plan_read = ShardSet.open(Path(told["plan"]), folder, is_plan=True)
        try:
            table = complete(plan_read, target, cache, progress) if plan_read is not None else None
        except OSError:  # a full disk
            return None
    return ShardDataset.of(table, cache) if table is not None else None


def _written(draft: ShardSet, places: list[Path]) -> tuple[Path | None, Path | None]:
    """The first of `places` that can be written, and the file of the plan there."""
    for place in places:
        plan = place.with_name(f".{place.name.lstrip('.')}.plan")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            draft.save(plan)
            return place, plan
        except OSError:
            continue
    return None, None
