"""Estimates the time of an optimizer step, by which layouts are ranked.

`plan/flops.py` counts arithmetic, and traffic is a `communication.Volume`. The machine's speeds are
assumptions, which the report prints. Traffic overlaps with arithmetic only under ``overlap_grad_reduce``
and ``overlap_param_gather``. Kernels are taken to be equally efficient in all layouts, which favours large
TP a little.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_evomoe.config import RunConfig
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.plan.communication import Volume
from megatron_evomoe.plan.flops import flops
from megatron_evomoe.plan.rank_tensors import chunks
from megatron_evomoe.plan.work import Work, step_work


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The cluster. Defaults: a node of eight H100s or H200s with one 400 Gb/s adapter per GPU."""

    nnodes: int
    gpus_per_node: int = 8
    gpu_memory: float = 80.0
    """GiB."""
    headroom: float = 0.1
    """Share of the memory that is left to the CUDA context, NCCL, the allocator and temporary tensors."""
    tflops: float = 400.0
    """Sustained TFLOP/s of one GPU in the model's matrix products."""
    intra_bandwidth: float = 400.0
    """GB/s that a GPU sends inside its node."""
    inter_bandwidth: float = 40.0
    """GB/s that a GPU sends to other nodes."""

    @property
    def world_size(self) -> int:
        """Number of GPUs."""
        return self.nnodes * self.gpus_per_node

    @property
    def usable_bytes(self) -> float:
        """Bytes of each GPU that a plan may fill."""
        return self.gpu_memory * 2**30 * (1 - self.headroom)


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds per optimizer step, of the slowest pipeline stage."""

    compute: float
    tp: float
    ep: float
    pp: float
    dp: float
    bubble: float
    """Time in which the pipeline fills and drains."""

    @property
    def total(self) -> float:
        """The sum."""
        return self.compute + self.tp + self.ep + self.pp + self.dp + self.bubble


def bubble_ratio(pp: int, chunks_per_rank: int, microbatches: int) -> float:
    """Idle time over working time, (PP − 1) / (m·v) (Narayanan et al. 2021, arXiv 2104.04473)."""
    return (pp - 1) / (microbatches * chunks_per_rank)


def step_time(
    config: RunConfig,
    kind: StageKind,
    volume: Volume,
    machine: Machine,
    pp_rank: int,
    work: Work | None = None,
) -> StepTime:
    """The step time if `pp_rank` is the slowest pipeline stage; `config` has layout and overrides applied.

    Args:
        work: a step's, of one replica. None takes full rows.
    """
    p, world = config.parallel, machine.world_size
    work = work or step_work(config, kind, world)
    forward, backward = flops(config, kind, pp_rank, work)
    compute = (forward + backward) / (machine.tflops * 1e12)
    speed = _Speeds(machine)
    tp = volume.tp / speed.among(p.tensor_model_parallel_size)
    ep = volume.ep / speed.among(p.expert_model_parallel_size * p.expert_tensor_parallel_size)
    pp = volume.pp / speed.strided(world // p.pipeline_model_parallel_size)
    bubble = bubble_ratio(p.pipeline_model_parallel_size, chunks(config), work.microbatches) * (
        compute + tp + ep + pp
    )
    replicas = speed.among(world // p.pipeline_model_parallel_size)
    reduce, gather = volume.gradients / replicas, volume.parameters / replicas
    if p.overlap_grad_reduce:
        reduce = max(0.0, reduce - backward / (machine.tflops * 1e12))
    if p.overlap_param_gather and kind != StageKind.EVOLVE:  # evolution waits for the weights
        gather = max(0.0, gather - forward / (machine.tflops * 1e12))
    return StepTime(compute=compute, tp=tp, ep=ep, pp=pp, dp=reduce + gather, bubble=bubble)


@dataclass(frozen=True)
class _Speeds:
    """Bytes per second between ranks.

    megatron-core numbers ranks by TP first, then by replicas, then by stages; for experts by expert-TP, EP,
    replicas, stages.
    """

    machine: Machine

    def among(self, consecutive: int) -> float:
        """Between ranks that lie within `consecutive` neighbouring numbers."""
        inside = consecutive <= self.machine.gpus_per_node
        return 1e9 * (self.machine.intra_bandwidth if inside else self.machine.inter_bandwidth)

    def strided(self, distance: int) -> float:
        """Between two ranks `distance` numbers apart."""
        inside = self.machine.nnodes == 1 or distance < self.machine.gpus_per_node
        return 1e9 * (self.machine.intra_bandwidth if inside else self.machine.inter_bandwidth)
