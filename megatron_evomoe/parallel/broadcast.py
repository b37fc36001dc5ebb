"""Send a step's tensors from the rank that reads them to the other ranks of its replica.

Tokens, labels and token types of the *whole step* take a few hundred kilobytes and are sent in one message,
so that every pipeline stage knows the token types of each microbatch beforehand. Images are sent only to the
TP group of the first pipeline stage.

M microbatches per step · b rows per microbatch · s positions · n images in a microbatch · S pixels per side ·
t tokens per image · C width of a feature. b, s and n may differ between microbatches.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megatron_evomoe.config import RunConfig
from megatron_evomoe.data.batch import MicroBatch
from megatron_evomoe.data.feature_cache import image_form
from megatron_evomoe.parallel import backend
from megatron_evomoe.parallel.topology import Topology


@dataclass(kw_only=True)
class Step:
    """The samples of one optimizer step on this rank."""

    microbatches: list[MicroBatch]
    """On the device, after `to_replica`: int64 tensors; images on the first pipeline stage only."""


def to_replica(step: Step | None, topology: Topology, config: RunConfig) -> Step:
    """Send `step` to the TP x PP x CP ranks of the replica. Communicates, unless the replica is one rank.

    Args:
        step: the step on the rank that reads (`Topology.reads_data`), none elsewhere.

    Returns:
        The step on this rank's device.
    """
    where = backend.device()
    if dist.get_world_size(topology.model_group) * topology.context.size > 1:
        return _broadcast(step, topology, config, where)
    assert step is not None
    return Step(microbatches=[_on_device(m, where) for m in step.microbatches])


def _on_device(micro: MicroBatch, where: torch.device) -> MicroBatch:
    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(where, non_blocking=True).long()

    assert micro.images is not None
    return replace(
        micro,
        tokens=moved(micro.tokens),
        labels=moved(micro.labels),
        token_types=moved(micro.token_types),
        images=micro.images.to(where, non_blocking=True),
    )


def _broadcast(step: Step | None, topology: Topology, config: RunConfig, where: torch.device) -> Step:
    group = topology.model_group
    source = dist.get_global_rank(group, 0)
    sizes = torch.zeros(2, dtype=torch.int64, device=where)
    if topology.reads_data:
        assert step is not None
        shapes, payload = _message(step)
        sizes.copy_(torch.tensor([len(shapes), len(payload)]))
    dist.broadcast(sizes, source, group=group)
    head, body = sizes.tolist()
    message = torch.empty(head + body, dtype=torch.int32, device=where)
    if topology.reads_data:
        message[:head].copy_(torch.tensor(shapes, dtype=torch.int32))
        message[head:].copy_(payload)
    dist.broadcast(message, source, group=group)
    received, images = _read(message[:head].tolist(), message[head:].long())
    if topology.first_stage:
        for micro, pixels in zip(received, _send_images(step, images, topology, config, where), strict=True):
            micro.images = pixels
    if step is not None:
        for micro, mine in zip(received, step.microbatches, strict=True):
            micro.keys = mine.keys
    return Step(microbatches=received)


def _message(step: Step) -> tuple[list[int], torch.Tensor]:
    """The numbers that describe each microbatch, and tokens, labels and token types in one int32 tensor.

    The numbers of a microbatch are b, s, n, the number of segments (−1 without), and their lengths.
    """
    shapes: list[int] = []
    parts: list[torch.Tensor] = []
    for micro in step.microbatches:
        assert micro.images is not None
        segments = micro.segments
        shapes += [*micro.tokens.shape, len(micro.images), -1 if segments is None else len(segments)]
        shapes += segments or ()
        parts += [tensor.flatten() for tensor in (micro.tokens, micro.labels, micro.token_types)]
    return shapes, torch.cat(parts).to(torch.int32)


def _read(shapes: list[int], payload: torch.Tensor) -> tuple[list[MicroBatch], list[int]]:
    """The microbatches of a message without their images, and the number of images of each."""
    numbers = iter(shapes)
    found: list[MicroBatch] = []
    images: list[int] = []
    start = 0
    for b in numbers:
        s, n, count = next(numbers), next(numbers), next(numbers)
        segments = None if count < 0 else tuple(itertools.islice(numbers, count))
        end = start + 3 * b * s
        tokens, labels, types = payload[start:end].view(3, b, s)
        found.append(
            MicroBatch(tokens=tokens, labels=labels, token_types=types, images=None, segments=segments)
        )
        images.append(n)
        start = end
    return found, images


def _send_images(
    step: Step | None, counts: list[int], topology: Topology, config: RunConfig, where: torch.device
) -> Sequence[torch.Tensor]:
    """The images of each microbatch, on the ranks of the first pipeline stage. Communicates over TP."""
    group = topology.tensor.group
    shape, dtype = image_form(config)
    stacked = torch.empty(sum(counts), *shape, dtype=dtype, device=where)
    if topology.reads_data:
        assert step is not None
        stacked.copy_(torch.cat([m.images for m in step.microbatches if m.images is not None]))
    if topology.tensor.size > 1 and len(stacked):
        dist.broadcast(stacked, dist.get_global_rank(group, 0), group=group)
    return stacked.split(counts)
