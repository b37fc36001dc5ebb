"""The samples a stage trains on, opened once, the same on all nodes, and known to all ranks by name and
digest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from megatron_evomoe.checkpoint.record import TrainingData
from megatron_evomoe.config import ConfigError, RunConfig
from megatron_evomoe.data import changed, order
from megatron_evomoe.data.errors import DataError
from megatron_evomoe.data.shards import ShardDataset
from megatron_evomoe.parallel.agree import require_all
from megatron_evomoe.parallel.topology import Topology


@dataclass
class TrainingSet:
    """A stage's samples."""

    dataset: ShardDataset | None
    """On ranks that read samples, none elsewhere."""
    data: TrainingData
    """What goes into checkpoints, the same on all ranks."""


def training_set(config: RunConfig, place: Topology) -> TrainingSet:
    """The shards of `train_data`, opened where samples are read. Communicates.

    Raises:
        ConfigError: on every rank: there are none, or some rank cannot read them or finds other samples than
            rank 0.
    """
    dataset, contents, problem = None, [], None
    if place.reads_data:
        try:
            if not config.data.train_data:
                raise ConfigError("train_data is empty; name shard sets, e.g. train_data: [data/train]")
            dataset = ShardDataset(config.data.train_data)
            contents = dataset.contents()
        except (ConfigError, DataError, OSError) as error:
            problem = str(error)
    require_all(problem, ConfigError)
    first = [contents]
    dist.broadcast_object_list(first, src=0)  # rank 0 reads samples in every layout
    found = changed.differences(first[0], contents) if dataset is not None else []
    require_all(
        f"rank {place.rank} finds other samples under train_data than rank 0: {'; '.join(found)}; copy the "
        "same "
        "shards to every node"
        if found
        else None,
        ConfigError,
    )
    samples = sum(count for _, count, _ in first[0])
    return TrainingSet(
        dataset, {"order": order.NAME, "seed": config.train.seed, "samples": samples, "shards": first[0]}
    )
