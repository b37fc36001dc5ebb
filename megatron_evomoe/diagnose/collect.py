"""Observe the routers of a model while it runs, and write what was observed to `diagnostics.jsonl`.

This module knows the model and the process groups; the maths is in routing.py and similarity.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_evomoe.config import RunConfig
from megatron_evomoe.diagnose import diagnostics_file
from megatron_evomoe.diagnose.routing import LogitSample, ShareCounter, draw_permutations, shuffle_routing
from megatron_evomoe.diagnose.similarity import cosine_from_gram, expert_gram
from megatron_evomoe.parallel import backend, topology


class Watch:
    """Counts tokens and samples logits in every MoE layer; each rank fills in its own layers.

    Attributes:
        layers: numbers of the MoE layers in the decoder, from 0 as in megatron-core's own metrics.
        shares: this rank's counts.
        logits: this rank's sample; None without `with_logits`.
    """

    def __init__(self, config: RunConfig, *, with_logits: bool) -> None:
        pattern = config.moe.layer_pattern(config.language.num_layers)
        self.layers = [layer for layer, is_moe in enumerate(pattern) if is_moe]
        self._index = {layer + 1: i for i, layer in enumerate(self.layers)}  # routers count from 1
        experts = config.moe.num_experts
        self.shares = ShareCounter(len(self.layers), experts, backend.device())
        self.logits = LogitSample(len(self.layers), experts, seed=dist.get_rank()) if with_logits else None

    def __call__(
        self, layer_number: int, token_types: Tensor, logits: Tensor, probs: Tensor, routing_map: Tensor
    ) -> None:
        """Take what a router decided (`moe.router.Observer`)."""
        index = self._index[layer_number]
        self.shares.add(index, token_types, routing_map)
        if self.logits is not None:
            self.logits.add(index, token_types, logits)

    def total(self) -> Tensor:
        """Counts over all ranks, int64 [L, 2, E]. Communicates.

        Ranks that share tokens (TP without sequence parallelism) each count them, which does not change the
        shares.
        """
        counts = self.shares.counts.clone()
        dist.all_reduce(counts)
        return counts

    def merge_logits(self) -> None:
        """Merge the logit samples of all ranks into `logits` of each. Communicates."""
        assert self.logits is not None
        mine = self.logits.state.to(backend.device())
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        self.logits.merge(torch.stack(everyone).cpu())


@contextlib.contextmanager
def watching(layers: Sequence[Any], config: RunConfig) -> Iterator[Watch]:
    """Observe the routers of `layers` inside a `with` block."""
    watch = Watch(config, with_logits=True)
    before = [layer.router.observer for layer in layers]
    for layer in layers:
        layer.router.observer = watch
    try:
        yield watch
    finally:
        for layer, observer in zip(layers, before, strict=True):
            layer.router.observer = observer


@contextlib.contextmanager
def shuffled(layers: Sequence[Any], seed: int) -> Iterator[None]:
    """Shuffle the routing of `layers` inside a `with` block (`routing.shuffle_routing`).

    Every forward draws new permutations. Ranks of a TP group that share tokens draw equal ones, because they
    have equal seeds and call the router equally often.
    """

    def intervention(generator: torch.Generator) -> Any:
        def intervene(probs: Tensor, routing_map: Tensor, token_types: Tensor) -> tuple[Tensor, Tensor]:
            permutations = draw_permutations(len(probs), probs.shape[1], generator)
            routing_map, probs = shuffle_routing(routing_map, probs, permutations)
            return probs, routing_map

        return intervene

    replica = topology.current().data.rank
    for layer in layers:
        layer.router.intervene = intervention(
            torch.Generator().manual_seed(seed * 1_000_003 + layer.layer_number * 1009 + replica)
        )
    try:
        yield
    finally:
        for layer in layers:
            layer.router.intervene = None


def expert_similarity(layers: Sequence[Any], config: RunConfig) -> dict[str, Tensor]:
    """Cosine of every pair of experts, by their weights, in all MoE layers. Communicates.

    Returns:
        What was compared ("weights", "weights, less their mean") to float64 [L, E, E].
    """
    pattern = config.moe.layer_pattern(config.language.num_layers)
    numbers = [i + 1 for i, is_moe in enumerate(pattern) if is_moe]
    experts = config.moe.num_experts
    grams = {
        name: torch.zeros(len(numbers), experts, experts, dtype=torch.float64, device=backend.device())
        for name in ("weights", "weights, less their mean")
    }
    place = topology.current()
    for layer in layers:
        weights = _all_experts(layer)
        for name, centred in (("weights", False), ("weights, less their mean", True)):
            gram = expert_gram(weights, centred=centred)
            dist.all_reduce(gram, group=place.expert_tensor.group)
            grams[name][numbers.index(layer.layer_number)] = gram
    for gram in grams.values():
        dist.all_reduce(gram, group=place.pipeline.group)
    return {name: cosine_from_gram(gram).cpu() for name, gram in grams.items()}


def _all_experts(layer: Any) -> Tensor:
    """Weights [E, P] of the experts of one layer, P of them on this expert-TP rank. Communicates over EP."""
    local = [
        torch.cat([p.detach().flatten() for p in expert.parameters()])
        for expert in local_experts(layer.experts)
    ]
    mine = torch.stack(local)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(layer.ep_group))]
    dist.all_gather(everyone, mine, group=layer.ep_group)
    return torch.cat(everyone)


def local_experts(experts: Any) -> list[Any]:
    """The experts of this rank: modules of a `SequentialMLP`, or groups of parameters of a `TEGroupedMLP`."""
    if hasattr(experts, "local_experts"):
        return list(experts.local_experts)
    return [_ParameterGroup(experts, i) for i in range(experts.num_local_experts)]


class _ParameterGroup:
    """The parameters of one expert of a grouped MLP."""

    def __init__(self, experts: Any, index: int) -> None:
        self._experts, self._index = experts, index

    def parameters(self) -> list[Tensor]:
        return [
            getattr(getattr(self._experts, fc), f"weight{self._index}") for fc in ("linear_fc1", "linear_fc2")
        ]


def save(
    run_dir: Path,
    stage: str,
    step: int,
    watch: Watch,
    layers: Sequence[Any],
    config: RunConfig,
    *,
    is_main: bool,
) -> dict[str, Any]:
    """Merge what all ranks observed and write shares, logits and similarity. Communicates.

    Returns:
        "shares": the counts, int64 [L, 2, E]; "similarity": the cosines of `expert_similarity`.
    """
    counts = watch.total().cpu()
    watch.merge_logits()
    similarity = expert_similarity(layers, config)
    if is_main and watch.logits is not None:
        diagnostics_file.write_shares(run_dir, stage, step, watch.layers, counts)
        diagnostics_file.write_logits(run_dir, stage, step, watch.layers, watch.logits)
        diagnostics_file.write_similarity(run_dir, stage, step, watch.layers, similarity)
    return {"shares": counts, "similarity": similarity}
