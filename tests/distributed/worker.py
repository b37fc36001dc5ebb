"""One rank of `harness.run`: runs jobs in turn and recreates the process groups for each new layout."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_evomoe.parallel import backend
from tests.distributed.campaign import deviation
from tests.distributed.harness import ROWS, Job, Layout, configuration, microbatches

SMALL_BUCKET = 500  # parameters; megatron-core's default is so large that a small model has one bucket

_current: list[dict[str, Any]] = []


def main(asked: str, answered: str) -> None:
    """Run every job in the file `asked`; rank 0 writes the results to `answered`."""
    backend.prepare()
    torch.set_num_threads(1)
    backend.init_process_group(timeout_minutes=2)
    results = {}
    for raw in json.loads(Path(asked).read_text()):
        results[raw["name"]] = run_job(Job(**raw | {"layout": Layout(**raw["layout"])}))
    if torch.distributed.get_rank() == 0:
        Path(answered).write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_job(job: Job) -> list[dict[str, float]]:
    """Build the stage, load, train and save; returns the metrics of every step, which all ranks agree on."""
    from megatron.core.distributed import DistributedDataParallelConfig

    from megatron_evomoe.checkpoint import find, store
    from megatron_evomoe.config import CheckpointConfig, from_mapping
    from megatron_evomoe.diagnose.collect import Watch
    from megatron_evomoe.parallel import topology
    from megatron_evomoe.train import optimizer
    from megatron_evomoe.train.built import build_stage
    from megatron_evomoe.train.parameters import params_norm
    from megatron_evomoe.train.routing_metrics import forget_auxiliary_losses, routing_metrics
    from megatron_evomoe.train.step import take_step

    config = from_mapping(configuration(job))
    lay_out(config)
    topology.seed_everything(config.train.seed)
    optimizer.DistributedDataParallelConfig = functools.partial(
        DistributedDataParallelConfig, bucket_size=SMALL_BUCKET if job.layout.overlap else None
    )
    built = build_stage(config.for_stage(job.kind), config.stages[0])
    check_vision_place(built)
    load(job, built, config)
    forget_auxiliary_losses()
    watch = Watch(config, with_logits=False) if job.kind == "route" else None
    for layer in built.mixtures():
        layer.router.observer = watch
    if job.collapse:
        collapse(built)
    steps = []
    for number in range(job.first, job.last + 1):
        result = take_step(built, replica_step(number, config), number)
        built.evolve(number, config.train.seed)
        measured = {
            "loss": result.loss,
            "grad norm": result.grad_norm,
            "tokens": result.tokens,
            "supervised": result.supervised_tokens,
            "lr": built.optimizer.param_groups[0]["lr"],
        }
        # only every second step: the norm gathers weights, which the next forward must also do by itself
        if number % 2 == 0:
            measured["params norm"] = params_norm(built.gather_weights())
        if watch is not None:
            measured |= routing_metrics(watch, config, microbatches=result.filled_microbatches)
        steps.append(measured)
    check_ranks_agree(steps)
    if job.save:
        store.Saver(CheckpointConfig(keep=0)).save(
            Path(job.save),
            modules=built.gather_weights(),
            optimizer=built.optimizer,
            scheduler=built.scheduler,
            config_yaml="{}\n",
            record=record_of(job, config),
        )
    assert job.resume is None or find.record_of(find.resolve(Path(job.resume))).step == job.first - 1
    return steps


def check_ranks_agree(steps: list[dict[str, float]]) -> None:
    """Assert that all ranks have the same metrics, whichever of them logs. Communicates."""
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, steps)
    for rank, theirs in enumerate(everyone):
        assert deviation(everyone[0], theirs) < 1e-6, (rank, everyone[0], theirs)


def check_vision_place(built: Any) -> None:
    """Assert that tower and projector are in the first chunk of the first pipeline stage and nowhere else."""
    from megatron.core import parallel_state

    for i, module in enumerate(built.modules):
        is_first = parallel_state.get_pipeline_model_parallel_rank() == 0 and i == 0
        assert (module.vision_model is not None) == (module.vision_projection is not None) == is_first


def lay_out(config: Any) -> None:
    """Create megatron-core's groups for `config.parallel`, unless those of the job before are the same."""
    from megatron.core import parallel_state

    from megatron_evomoe.parallel import degrees, topology

    flags = {k: v for k, v in config.to_dict()["parallel"].items() if "size" in k or "virtual" in k}
    if _current and _current[-1] == flags:
        degrees.validate(config, torch.distributed.get_world_size())
        return
    if _current:
        parallel_state.destroy_model_parallel()
    topology.initialize(config)
    _current.append(flags)


def load(job: Job, built: Any, config: Any) -> None:
    """Load the weights of the stage before, or resume this stage."""
    from megatron_evomoe.checkpoint import find, store
    from megatron_evomoe.train.transition import start_from

    if job.resume:
        path = find.resolve(Path(job.resume))
        store.load_training_state(
            path,
            modules=built.modules,
            optimizer=built.optimizer,
            scheduler=built.scheduler,
            record=find.record_of(path),
        )
    elif job.start:
        start_from(find.resolve(Path(job.start)), built, config, config.stages[0], fingerprint="abc")
    else:
        for mlp in built.evolving:
            mlp.begin()


def record_of(job: Job, config: Any) -> Any:
    from megatron_evomoe.checkpoint.record import Record
    from megatron_evomoe.parallel import rng

    return Record(
        stage=job.kind,
        kind=job.kind,
        step=job.last,
        position=ROWS * job.last,
        finished=False,
        layout=rng.layout(),
        vocab_size=config.language.vocab_size,
        tokenizer_fingerprint="abc",
        num_experts=config.moe.num_experts if job.kind in ("evolve", "route") else 0,
    )


def replica_step(number: int, config: Any) -> Any:
    """This replica's microbatches, read by one rank and broadcast as in training. Communicates.

    Microbatch c of the global batch goes to replica c mod DP, so every DP size computes the same
    microbatches.
    """
    from megatron_evomoe.parallel import broadcast, topology

    place = topology.current()
    step = None
    if place.reads_data:
        everything = microbatches(number, config)
        step = broadcast.Step(microbatches=everything[place.data.rank :: place.data.size])
    return broadcast.to_replica(step, place, config)


def collapse(built: Any) -> None:
    """Route every token to expert 0 by raising its logit, so that the ranks of the other experts get none."""
    for layer in built.mixtures():
        gating, favour = layer.router.gating, torch.tensor([50.0, 0.0, 0.0, 0.0])
        layer.router.gating = lambda *args, gating=gating, favour=favour: gating(*args) + favour


if __name__ == "__main__":
    main(*sys.argv[1:])
