"""An estimated step time, to rank layouts by. The machine's speeds are assumptions the report prints.

Arithmetic is counted (2 FLOP per weight and token forward; backward the same again for the input's gradient
and for each trained weight's; attention by its causal half), traffic is `communication.Volume`, and nothing
of it is taken to overlap with arithmetic but what ``overlap_grad_reduce`` and ``overlap_param_gather`` say.
Kernels' efficiency is taken to be the same in all layouts, which favours large TP a little.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_evomoe.config import RunConfig
from megatron_evomoe.config.recipe import trained_parts
from megatron_evomoe.plan import layout
from megatron_evomoe.plan.activations import sizes_of
from megatron_evomoe.plan.communication import Volume
from megatron_evomoe.plan.counts import (
    attention_heads,
    chunks,
    decoder_layer,
    is_first,
    is_last,
    vision_tower,
)
from megatron_evomoe.plan.flow import LayerFlow, chunk_flow, recomputed_modules


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The cluster. Defaults: a node of eight H100s or H200s with one 400 Gb/s adapter per GPU."""

    nnodes: int
    gpus_per_node: int = 8
    gpu_memory: float = 80.0
    """GiB."""
    headroom: float = 0.1
    """Share of the memory left to the CUDA context, NCCL, the allocator and what is only needed for a
    moment.
    """
    tflops: float = 400.0
    """Sustained TFLOP/s of one GPU in the model's matrix products."""
    intra_bandwidth: float = 400.0
    """GB/s a GPU sends inside its node."""
    inter_bandwidth: float = 40.0
    """GB/s a GPU sends to other nodes."""

    @property
    def world_size(self) -> int:
        """GPUs."""
        return self.nnodes * self.gpus_per_node

    @property
    def usable_bytes(self) -> float:
        """Memory a plan may fill, per GPU."""
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
    """Waiting for the pipeline to fill and to drain."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.compute + self.tp + self.ep + self.pp + self.dp + self.bubble


def bubble_ratio(pp: int, chunks_per_rank: int, microbatches: int) -> float:
    """Waiting time over working time: (PP − 1) / (m·v) (Narayanan et al. 2021, arXiv 2104.04473)."""
    return (pp - 1) / (microbatches * chunks_per_rank)


def step_time(
    config: RunConfig,
    kind: str,
    volume: Volume,
    machine: Machine,
    pp_rank: int,
    seq_length: int | None = None,
) -> StepTime:
    """As if pipeline stage `pp_rank` set the pace; `config` has layout and overrides applied."""
    p, world = config.parallel, machine.world_size
    m = layout.microbatches(config, world)
    forward, backward = flops(config, kind, pp_rank, seq_length)
    compute = m * (forward + backward) / (machine.tflops * 1e12)
    speed = _Speeds(machine)
    tp = volume.tp / speed.among(p.tensor_model_parallel_size)
    ep = volume.ep / speed.among(p.expert_model_parallel_size * p.expert_tensor_parallel_size)
    pp = volume.pp / speed.strided(world // p.pipeline_model_parallel_size)
    bubble = bubble_ratio(p.pipeline_model_parallel_size, chunks(config), m) * (compute + tp + ep + pp)
    replicas = speed.among(world // p.pipeline_model_parallel_size)
    reduce, gather = volume.gradients / replicas, volume.parameters / replicas
    if p.overlap_grad_reduce:
        reduce = max(0.0, reduce - m * backward / (machine.tflops * 1e12))
    if p.overlap_param_gather and kind != "evolve":  # evolution waits for the weights
        gather = max(0.0, gather - m * forward / (machine.tflops * 1e12))
    return StepTime(compute=compute, tp=tp, ep=ep, pp=pp, dp=reduce + gather, bubble=bubble)


@dataclass(frozen=True)
class _Speeds:
    """Bytes/s by who talks. megatron-core numbers ranks TP first, then replicas (experts: expert-TP, EP,
    replicas), then stages.
    """

    machine: Machine

    def among(self, consecutive: int) -> float:
        """Ranks that lie within `consecutive` neighbouring numbers."""
        inside = consecutive <= self.machine.gpus_per_node
        return 1e9 * (self.machine.intra_bandwidth if inside else self.machine.inter_bandwidth)

    def strided(self, distance: int) -> float:
        """Two ranks `distance` numbers apart."""
        inside = self.machine.nnodes == 1 or distance < self.machine.gpus_per_node
        return 1e9 * (self.machine.intra_bandwidth if inside else self.machine.inter_bandwidth)


def flops(config: RunConfig, kind: str, pp_rank: int, seq_length: int | None = None) -> tuple[float, float]:
    """(forward, backward with recompute) of one microbatch on one rank of the pipeline stage."""
    forward = backward = 0.0
    for chunk in range(chunks(config)):
        for flow in chunk_flow(config, kind, pp_rank, chunk):
            f, b = _layer_flops(config, kind, flow, seq_length)
            forward, backward = forward + f, backward + b
        f, b = _ends_flops(config, kind, pp_rank, chunk, seq_length)
        forward, backward = forward + f, backward + b
    return forward, backward


def _layer_flops(
    config: RunConfig, kind: str, flow: LayerFlow, seq_length: int | None
) -> tuple[float, float]:
    z = sizes_of(config, seq_length)
    weights = dict.fromkeys(("attention", "ffn", "router"), 0)
    for name, numel in decoder_layer(config, kind, flow.mixture):
        if ".experts." in name:
            # of a mixture each token meets top-K experts; names of expert 0 stand for one of them
            weights["ffn"] += numel * config.moe.moe_router_topk if ".local_experts.0." in name else 0
        elif ".router." in name:
            weights["router"] += numel
        else:
            weights["ffn" if name.startswith("mlp.") else "attention"] += numel
    # weights are a rank's own: T tokens meet those that TP splits; a mixture's tokens come to its experts
    # from all ranks alike
    etp = config.parallel.expert_tensor_parallel_size
    attention, ffn = 2 * z.T * weights["attention"], 2 * (z.R * etp if flow.mixture else z.T) * weights["ffn"]
    router = z.R * weights["router"]  # half of them: a token meets its own modality's hypernetwork
    heads, _, head_size = attention_heads(config)
    scores = 2 * z.T * z.seq * heads * head_size / z.t  # QKᵀ and AV, causal half
    forward = attention + ffn + router + scores
    touched = flow.ffn_input_grad or flow.trains_ffn or flow.trains_router
    backward = 0.0
    if flow.ffn_input_grad:
        backward += 2 * scores + attention * (1 + int(flow.trains_attention)) + ffn + router
    elif flow.mixture and touched:
        backward += ffn / 2  # through the output matrices, back to the probabilities
    backward += ffn * flow.trains_ffn + router * flow.trains_router
    return forward, backward + _recomputed_flops(config, flow, touched, forward, scores, ffn)


def _recomputed_flops(
    config: RunConfig, flow: LayerFlow, touched: bool, forward: float, scores: float, ffn: float
) -> float:
    if config.train.recompute_granularity == "full":
        return forward
    modules = recomputed_modules(config)
    again = scores if "core_attn" in modules and flow.ffn_input_grad else 0.0
    return again + (ffn if ("moe" if flow.mixture else "mlp") in modules and touched else 0.0)


def _ends_flops(
    config: RunConfig, kind: str, pp_rank: int, chunk: int, seq_length: int | None
) -> tuple[float, float]:
    from megatron_evomoe.model.language import padded_vocab_size

    z, parts = sizes_of(config, seq_length), trained_parts(config, kind)
    forward = backward = 0.0
    if is_first(pp_rank, chunk) and not config.data.cache_vision_features:
        v = config.vision
        tower = (
            2
            * config.train.micro_batch_size
            * (v.image_size // v.patch_size) ** 2
            * sum(n for _, n in vision_tower(config))
        )
        forward, backward = forward + tower, backward + (2 * tower if "vision" in parts else 0)
    if is_last(config, pp_rank, chunk):
        logits = 2 * z.T * z.C * padded_vocab_size(config) / z.t
        forward, backward = forward + logits, backward + logits * (1 + int("language" in parts))
    return forward, backward
