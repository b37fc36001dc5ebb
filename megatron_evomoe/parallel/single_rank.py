"""megatron-core on a single rank, for comparisons outside a training run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megatron_evomoe.config import RunConfig
from megatron_evomoe.parallel import backend


@contextmanager
def one_rank(config: RunConfig) -> Iterator[None]:
    """Make the builders of ``model/`` work in this process for the duration of a ``with`` block.

    Process groups that exist already are used and left in place; otherwise groups of one rank are created and
    destroyed again.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.core.*|torch\.distributed.*")
    backend.prepare()
    if dist.is_initialized():
        yield
        return
    # These import megatron-core, for which `backend.prepare` has to come first.
    from megatron.core import parallel_state

    from megatron_evomoe.parallel import topology

    backend.init_process_group(timeout_minutes=1)
    topology.initialize(config)
    topology.seed_everything(config.train.seed)  # megatron-core needs seeded generators to build a model
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
