"""megatron-core on one rank, for a comparison: set up if this process has no groups yet, and then taken down
again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_evomoe.config import RunConfig


@contextmanager
def one_rank(config: RunConfig) -> Iterator[None]:
    """Inside, the builders of ``model/`` work. Groups that are there already are used and stay."""
    from megatron_evomoe.parallel import backend

    warnings.filterwarnings("ignore", module=r"megatron\.core.*|torch\.distributed.*")
    backend.prepare()
    from torch import distributed as dist

    if dist.is_initialized():
        yield
        return
    from megatron.core import parallel_state

    from megatron_evomoe.parallel import topology

    backend.init_process_group(timeout_minutes=1)
    topology.initialize(config)
    topology.seed_everything(
        config.train.seed
    )  # the core wants its generators set, though evaluation draws nothing
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
