"""The samples that a stage trains on: opened once, compared between nodes, loaded and sent to the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist

from megatron_evomoe.checkpoint.record import TrainingData
from megatron_evomoe.config import ConfigError, RunConfig
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.data import changed
from megatron_evomoe.data.errors import DataError
from megatron_evomoe.data.feature_cache import FeatureCache
from megatron_evomoe.data.image import processor_for
from megatron_evomoe.data.lengths import Lengths, open_lengths
from megatron_evomoe.data.loader import StepBatch, TrainLoader
from megatron_evomoe.data.order import NAME, SampleOrder
from megatron_evomoe.data.shards import ShardDataset
from megatron_evomoe.model.precision import sequence_multiple
from megatron_evomoe.parallel import broadcast
from megatron_evomoe.parallel.agree import await_all_ranks, require_all
from megatron_evomoe.parallel.topology import Topology
from megatron_evomoe.plan.work import attention_cost, packing_rounds
from megatron_evomoe.train.open_shards import open_shards
from megatron_evomoe.train.session import Session


@dataclass
class TrainingSet:
    """A stage's samples."""

    dataset: ShardDataset | None
    """The shards, on ranks that read samples; none elsewhere."""
    data: TrainingData
    """What checkpoints record of the samples; the same on all ranks. train/data_order.py gives the order."""


def training_set(session: Session, config: RunConfig) -> TrainingSet:
    """The shards of `train_data`, opened where samples are read. Communicates.

    Raises:
        ConfigError: on every rank: `train_data` is empty, or a rank cannot read it or finds other samples in
            it than rank 0.
    """
    place = session.topology
    dataset, contents, problem = None, [], None
    try:
        if not config.data.train_data:
            raise ConfigError("train_data is empty; name shard sets, e.g. train_data: [data/train]")
        dataset = open_shards(
            config.data.train_data,
            session.run_dir / "shard_index",
            reads=place.reads_data,
            readers=place.data.size,
            say=session.logger.say,
        )
        contents = dataset.contents() if dataset is not None else []
    except (ConfigError, DataError, OSError) as error:
        problem = str(error)
    require_all(problem, ConfigError)
    first = [contents]
    dist.broadcast_object_list(first, src=0)  # rank 0 reads samples in every layout
    found = changed.differences(first[0], contents) if dataset is not None else []
    require_all(
        f"rank {place.rank} finds other samples under train_data than rank 0: {'; '.join(found)}; copy the "
        "same shards to every node"
        if found
        else None,
        ConfigError,
    )
    samples = sum(count for _, count, _ in first[0])
    return TrainingSet(
        dataset, {"order": NAME, "seed": config.train.seed, "samples": samples, "shards": first[0]}
    )


def sample_lengths(session: Session, config: RunConfig, dataset: ShardDataset | None) -> Lengths | None:
    """The lengths of all samples, counted now if they are not known; none where they are not needed.

    The ranks that read samples count together, through files, and the others wait for them without a limit
    of time. Communicates.

    Args:
        dataset: none on ranks that do not read samples.

    Raises:
        ConfigError: on every rank: lengths cannot be written or read on some rank, or differ between ranks.
    """
    if config.data.packing == "none":
        return None
    session.heartbeat.enter("lengths")
    found, problem = None, None
    if dataset is not None:
        say = session.logger.say if session.topology.rank == 0 else None
        try:
            found = open_lengths(
                dataset,
                session.tokenizer,
                config.data,
                config.vision.tokens_per_image,
                folder=session.run_dir,
                say=say,
            )
        except (ConfigError, DataError, OSError) as error:
            problem = str(error)
    await_all_ranks()
    require_all(problem, ConfigError)
    first = [found.digest if found is not None else None]
    dist.broadcast_object_list(first, src=0)
    if found is not None and found.digest != first[0]:
        problem = (
            f"rank {session.topology.rank} has other lengths of samples in {found.path} than rank 0; delete "
            "that file on every node"
        )
    require_all(problem, ConfigError)
    return found


def train_loader(
    session: Session,
    config: RunConfig,
    kind: StageKind,
    dataset: ShardDataset | None,
    *,
    order: SampleOrder,
    lengths: Lengths | None,
    start_position: int,
    features: FeatureCache | None,
) -> TrainLoader | None:
    """The loader of this replica's samples, on the rank that reads them; none elsewhere.

    Args:
        dataset: none on ranks that do not read samples.
        order: the order of its samples.
        lengths: of all samples, if `packing` needs them.
        start_position: samples of the global order that were consumed already.
        features: kept vision features, which take the place of images.
    """
    if dataset is None:
        return None
    return TrainLoader(
        dataset,
        session.tokenizer,
        processor_for(config),
        config.data,
        config.vision.tokens_per_image,
        micro_batch_size=config.train.micro_batch_size,
        global_batch_size=config.train.global_batch_size,
        data_parallel_rank=session.topology.data.rank,
        data_parallel_size=session.topology.data.size,
        order=order,
        start_position=start_position,
        pad_to_multiple_of=sequence_multiple(config),
        features=features,
        lengths=lengths,
        rounds=packing_rounds(config),
        attention_cost=attention_cost(config, kind),
    )


def next_step(batches: Iterator[StepBatch] | None, place: Topology, config: RunConfig) -> broadcast.Step:
    """The step's samples on this rank. Communicates within the replica.

    batches: on the rank that reads samples, none elsewhere.
    """
    step = None
    if batches is not None:
        step = broadcast.Step(microbatches=next(batches).microbatches)
    return broadcast.to_replica(step, place, config)
