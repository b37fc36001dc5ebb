"""The processes that share an evaluation under torchrun; they exchange a few words and never tensors, so gloo serves GPUs too."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_PATIENCE = datetime.timedelta(days=7)  # a rank whose share is done waits for the slowest


class Ranks:
    """Context: this process's place among `size`. Outside torchrun it is alone and nothing is started."""

    def __init__(self) -> None:
        self.index, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def __enter__(self) -> Ranks:
        if self.size > 1:
            import torch.distributed as dist

            dist.init_process_group("gloo", timeout=_PATIENCE)
        return self

    def __exit__(self, kind: type | None, *args: object) -> None:
        if self.size > 1 and kind is None:  # after a failure the others may not come, and torchrun ends them
            import torch.distributed as dist

            dist.destroy_process_group()

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()

    def first_alone(self, work: Callable[[], T]) -> T | None:
        """Rank 0 does `work`; all go on when it succeeded, and all stop when it failed, one of them saying why.

        Returns:
            What `work` returned on rank 0, None on the others.

        Raises:
            ValueError: on rank 0, what `work` raised (all errors meant for users are ValueErrors).
            SystemExit: on the others, status 2.
        """
        result, error = None, None
        if self.index == 0:
            try:
                result = work()
            except ValueError as raised:
                error = raised
        if self._any(error is not None):
            raise error or SystemExit(2)
        return result

    def _any(self, mine: bool) -> bool:
        if self.size == 1:
            return mine
        import torch
        import torch.distributed as dist

        flag = torch.tensor(int(mine))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
