"""Send a step's tensors from the rank that reads them to the other ranks of its replica.

Tokens, labels and token types of the *whole step* take a few hundred kilobytes and are sent in one message,
so that every pipeline stage knows the token types of each microbatch beforehand. Images are sent only to the
TP group of the first pipeline stage.

M microbatches per step · b rows per microbatch · s positions · n images in a microbatch · S pixels per side ·
t tokens per image · C width of a feature.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_evomoe.config import RunConfig
from megatron_evomoe.data.feature_cache import image_form
from megatron_evomoe.parallel import backend
from megatron_evomoe.parallel.degrees import microbatches
from megatron_evomoe.parallel.topology import Topology


@dataclass(kw_only=True)
class Step:
    """The samples of one optimizer step on this rank."""

    tokens: torch.Tensor
    """int64 [M, b, s]"""
    labels: torch.Tensor
    """int64 [M, b, s]; −100 where nothing is supervised."""
    token_types: torch.Tensor
    """int64 [M, b, s]; values of `config.token_types.TokenType`."""
    images: list[torch.Tensor]
    """One tensor per microbatch: uint8 pixels [n, 3, S, S], or cached features [n, t, C].

    The list is empty on ranks outside the first pipeline stage.
    """
    keys: list[list[str]] = field(default_factory=list)
    """The samples' keys, one list per microbatch; empty on ranks that do not read."""


def to_replica(step: Step | None, topology: Topology, config: RunConfig) -> Step:
    """Send `step` to the TP x PP x CP ranks of the replica. Communicates, unless the replica is one rank.

    Args:
        step: the step on the rank that reads (`Topology.reads_data`), none elsewhere.

    Returns:
        The step on this rank's device.
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
    m = microbatches(config, topology.data.size)
    # One message whose length all ranks know: s, the number of images in each microbatch, then tokens, labels
    # and token types. It is int32, which halves the bytes.
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
