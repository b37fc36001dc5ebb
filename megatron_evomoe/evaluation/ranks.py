"""The processes that share an evaluation under torchrun.

They only exchange short messages, so they use torch's key-value store and no process groups.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from megatron_evomoe.errors import UserError

if TYPE_CHECKING:
    import torch.distributed as dist

T = TypeVar("T")
_PATIENCE = datetime.timedelta(days=7)  # a rank that has finished its share waits for the slowest
_POLL = 0.02


class Ranks:
    """A context for this process as rank `index` of `size`. Outside torchrun it is the only one."""

    def __init__(self) -> None:
        self.index, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self._store: dist.Store | None = None
        self._meetings = 0

    def __enter__(self) -> Ranks:
        if self.size > 1:
            import torch.distributed as dist

            from megatron_evomoe.parallel import attempt

            store, _, _ = next(dist.rendezvous("env://", timeout=_PATIENCE))
            self._store = (
                attempt.own_store(store, self.index, self.size, _PATIENCE)
                if attempt.is_restartable()
                else store
            )
        return self

    def __exit__(self, kind: type | None, *args: object) -> None:
        if (
            self._store is not None and kind is None
        ):  # after a failure other ranks may never leave, and torchrun ends them
            self._store.add("left", 1)
            while self.index == 0 and self._store.add("left", 0) < self.size:  # rank 0 may host the store
                time.sleep(_POLL)

    def wait(self) -> None:
        """Wait until every rank has called this."""
        if self._store is not None:
            self._meetings += 1
            if self._store.add(f"here {self._meetings}", 1) == self.size:
                self._store.set(f"all {self._meetings}", "")
            self._store.wait([f"all {self._meetings}"], _PATIENCE)

    def first_alone(self, work: Callable[[], T]) -> T | None:
        """Call `work` on rank 0 while the others wait. If it fails, all ranks stop, and rank 0 reports why.

        Returns:
            The result of `work` on rank 0, None on the others.

        Raises:
            UserError, OSError: on rank 0, what `work` raised.
            SystemExit: on the other ranks, with status 2.
        """
        result, error = None, None
        if self.index == 0:
            try:
                result = work()
            except (UserError, OSError) as raised:
                error = raised
        if self._any(error is not None):
            raise error or SystemExit(2)
        return result

    def _any(self, mine: bool) -> bool:
        if self._store is None:
            return mine
        key = f"raised {self._meetings}"
        if mine:
            self._store.set(key, "")
        self.wait()
        return bool(self._store.check([key]))
