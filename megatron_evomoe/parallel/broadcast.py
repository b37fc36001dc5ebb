"""The step's tensors, from the one reading rank of a replica to the ranks that need them.

Tokens, labels and token types of the *whole step* are a few hundred kilobytes, so they travel at once: every
pipeline stage then knows its token types without any coupling per microbatch. Pixels go to the first stage's
TP group only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_evomoe.config import RunConfig
from megatron_evomoe.data.feature_cache import image_form
from megatron_evomoe.parallel import backend
from megatron_evomoe.parallel.topology import Topology


@dataclass(kw_only=True)
class Step:
    """One optimizer step's samples on this rank: M microbatches of b rows and s positions."""

    tokens: torch.Tensor
    """int64 [M, b, s]"""
    labels: torch.Tensor
    """int64 [M, b, s], −100 where nothing is supervised"""
    token_types: torch.Tensor
    """int64 [M, b, s]: text, vision, padding (data/conversation.py)"""
    images: list[torch.Tensor]
    """per microbatch uint8 [n, 3, S, S], or cached features [n, t, C]; empty list off the first pipeline
    stage
    """
    keys: list[list[str]] = field(default_factory=list)
    """per microbatch; known to the reading rank only"""


def to_replica(step: Step | None, topology: Topology, config: RunConfig) -> Step:
    """Give the reading rank's `step` to its TP x PP x CP ranks. Communicates unless the replica is one
    rank.
    """
    where = backend.device()
    if dist.get_world_size(topology.model_group) * topology.context.size > 1:
        step = _broadcast(step, topology, config, where)
    assert step is not None
    for name in ("tokens", "labels", "token_types"):
        setattr(step, name, getattr(step, name).to(where, non_blocking=True))
    step.images = [i.to(where, non_blocking=True) for i in step.images]
    return step


def _broadcast(step: Step | None, topology: Topology, config: RunConfig, where: torch.device) -> Step:
    group = topology.model_group
    b = config.train.micro_batch_size
    m = config.train.global_batch_size // (b * topology.data.size)
    # One message of a length all ranks know, so that none has to be told it first: s, images of each
    # microbatch, then tokens, labels and types, in int32, which is half the bytes.
    message = torch.zeros(1 + m + 3 * m * b * config.data.seq_length, dtype=torch.int32, device=where)
    if topology.reads_data:
        assert step is not None
        head = torch.tensor([step.tokens.shape[2], *(len(i) for i in step.images)])
        flat = torch.cat([head, step.tokens.flatten(), step.labels.flatten(), step.token_types.flatten()])
        message[: len(flat)].copy_(flat)
    dist.broadcast(message, dist.get_global_rank(group, 0), group=group)
    s, *counts = message[: 1 + m].tolist()
    tokens, labels, token_types = message[1 + m : 1 + m + 3 * m * b * s].long().view(3, m, b, s)
    images: list[torch.Tensor] = []
    if topology.first_stage:
        tp_group = topology.tensor.group
        shape, dtype = image_form(config)
        stacked = torch.empty(sum(counts), *shape, dtype=dtype, device=where)
        if topology.reads_data:
            assert step is not None
            stacked.copy_(torch.cat(step.images))
        if topology.tensor.size > 1 and len(stacked):
            dist.broadcast(stacked, dist.get_global_rank(tp_group, 0), group=tp_group)
        images = list(stacked.split(counts))
    return Step(
        tokens=tokens, labels=labels, token_types=token_types, images=images, keys=step.keys if step else []
    )
