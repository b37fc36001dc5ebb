"""One optimizer step: forward and backward over microbatches, reduction of logged figures, and update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.data.conversation import IGNORE_INDEX
from megatron_evomoe.observe.profile import phase
from megatron_evomoe.parallel import backend, topology
from megatron_evomoe.parallel.broadcast import Step
from megatron_evomoe.train.built import Built


class NonFiniteError(RuntimeError):
    """The loss or a gradient became NaN or infinite; the message names step, rank and samples."""


@dataclass(kw_only=True)
class StepResult:
    """What one step did, equal on every rank."""

    loss: float
    """mean over the supervised tokens of the global batch"""
    grad_norm: float
    """before clipping"""
    learning_rate: float
    """of this step's update"""
    supervised_tokens: int
    tokens: int
    """positions that are not padding, image positions included"""
    image_tokens: int
    """those of them that images take"""
    microbatches: int
    """forward passes of this replica, the same number on all replicas"""
    filled_microbatches: int
    """microbatches of all replicas that hold more than padding"""
    positions: int
    """positions computed by all replicas, padding included"""
    squares: int
    """sum over all sequences (rows, or segments of packed rows) of their length squared"""


def take_step(built: Built, step: Step, number: int) -> StepResult:
    """Forward, backward, update. Communicates.

    The loss is the mean over *all supervised tokens of the global batch*: each microbatch contributes its
    sum, scaled so that megatron-core's averaging over microbatches and replicas gives that mean. Auxiliary
    losses are means over the microbatches of the global batch that hold more than padding. (megatron-core's
    option `calculate_per_token_loss` would multiply them by all tokens / supervised tokens.)

    Raises:
        NonFiniteError: on every rank alike.
    """
    counts = _count(step)
    _weigh_auxiliary_losses(built, len(step.microbatches), filled=counts.filled)
    losses = _forward_backward(built, step, counts)
    loss = _reduce_loss(losses) / max(1, counts.supervised)
    if not torch.isfinite(loss):
        _explain("loss", float(loss), step, losses, number)
    with phase("optimizer"):
        _, grad_norm, _ = built.optimizer.step()
        grad_norm = float(grad_norm or 0.0)  # a device synchronisation
    if not torch.isfinite(torch.tensor(grad_norm)):
        _explain("gradient norm", grad_norm, step, losses, number)
    learning_rate = (
        built.optimizer.param_groups[0]["lr"] if built.optimizer.param_groups else built.scheduler.get_lr({})
    )
    built.scheduler.step(increment=1)
    return StepResult(
        loss=float(loss),
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        supervised_tokens=counts.supervised,
        tokens=counts.real,
        image_tokens=counts.vision,
        microbatches=len(step.microbatches),
        filled_microbatches=counts.filled,
        positions=counts.positions,
        squares=counts.squares,
    )


class _Counts(NamedTuple):
    """Sums over the global batch."""

    supervised: int
    real: int
    """tokens that are not padding"""
    vision: int
    positions: int
    squares: int
    """of the lengths of sequences"""
    filled: int
    """microbatches that hold more than padding"""
    images: list[int]
    """images of each replica, on the first pipeline stage; zeros elsewhere"""


def _count(step: Step) -> _Counts:
    """Count the global batch. Communicates over replicas."""
    micro = step.microbatches
    supervised = torch.stack([(m.labels != IGNORE_INDEX).sum() for m in micro]).sum()
    real = torch.stack([(m.token_types != TokenType.PADDING).sum() for m in micro])
    vision = torch.stack([(m.token_types == TokenType.VISION).sum() for m in micro]).sum()
    lengths = [length for m in micro for length in m.lengths]
    work = torch.tensor([sum(lengths), sum(length**2 for length in lengths)], device=real.device)
    replicas = topology.current().data
    images = torch.zeros(replicas.size, dtype=torch.int64, device=real.device)
    images[replicas.rank] = sum(len(m.images) for m in micro if m.images is not None)
    sums = torch.stack([supervised, real.sum(), vision])
    counts = torch.cat([sums, work, real.count_nonzero()[None], images])
    dist.all_reduce(counts, group=replicas.group)
    n_supervised, n_real, n_vision, positions, squares, filled, *of_replicas = counts.tolist()
    return _Counts(n_supervised, n_real, n_vision, positions, squares, filled, of_replicas)


def _weigh_auxiliary_losses(built: Built, microbatches: int, *, filled: int) -> None:
    """Make megatron-core's mean over all microbatches and replicas one over the `filled` microbatches."""
    for layer in built.mixtures():
        layer.router.auxiliary_weight = microbatches * topology.current().data.size / max(1, filled)


def _forward_backward(built: Built, step: Step, counts: _Counts) -> list[torch.Tensor]:
    """Loss sums of this rank's microbatches; empty except on the last pipeline stage."""
    for wrapped in built.wrapped:
        wrapped.zero_grad_buffer()
    built.optimizer.zero_grad()
    m = len(step.microbatches)
    # the shapes of all microbatches, or megatron-core's schedules ask the neighbouring stage for each one's
    b, s = step.microbatches[0].tokens.shape
    scale = m * topology.current().data.size / max(1, counts.supervised)
    images = _encoded(built, step, counts)

    def forward_step(batches: Iterator[int], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        number = next(batches)
        micro = step.microbatches[number]
        output = model(
            micro.tokens, micro.token_types, images[number], labels=micro.labels, segments=micro.segments
        )

        def loss_func(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            total = (losses.float() * (micro.labels != IGNORE_INDEX)).sum()
            # a clone, because the schedule divides the returned loss in place
            return total * scale, {"loss_sum": total.detach().clone()}

        return output, loss_func

    iterators = [iter(range(m)) for _ in built.wrapped]
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=built.wrapped,
        num_microbatches=m,
        seq_length=s,
        micro_batch_size=b,
        decoder_seq_length=s,
        forward_only=False,
    )
    return [r["loss_sum"] for r in reports]


def _encoded(built: Built, step: Step, counts: _Counts) -> list[torch.Tensor | None]:
    """The features of each microbatch's images on the first pipeline stage, nothing elsewhere."""
    if built.tower is None:
        return [None] * len(step.microbatches)
    images = [m.images for m in step.microbatches if m.images is not None]
    return [*built.tower.features(images, counts.images)]


def _reduce_loss(losses: list[torch.Tensor]) -> torch.Tensor:
    """The loss summed over microbatches and replicas, on every pipeline stage. Communicates."""
    total = torch.stack(losses).sum() if losses else torch.zeros((), device=backend.device())
    place = topology.current()
    dist.all_reduce(total, group=place.data.group)
    if place.pipeline.size > 1:
        dist.all_reduce(total, group=place.pipeline.group)  # the other stages hold zero
    return total


def _explain(what: str, value: float, step: Step, losses: list[torch.Tensor], number: int) -> None:
    """Gather which ranks and samples have the bad value, and raise on every rank. Communicates."""
    bad = [i for i, loss in enumerate(losses) if not torch.isfinite(loss)]
    mine = {
        "rank": dist.get_rank(),
        "microbatches": bad,
        "keys": [key for i in bad for key in step.microbatches[i].keys],
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    guilty = [e for e in everyone if e["microbatches"]]
    where = (
        "; ".join(
            f"rank {e['rank']}, microbatches {e['microbatches']}, samples {', '.join(e['keys']) or 'unknown'}"
            for e in guilty
        )
        or "every microbatch's loss is finite: the backward pass produced it"
    )
    raise NonFiniteError(
        f"{what} is {value} at step {number} ({where}). The last checkpoint is untouched; "
        "lower the learning rate, look at the samples with inspect-data, or resume from that checkpoint"
    )
