"""The vision tower, run once a step over the images of all microbatches.

On the first pipeline stage the step's images are spread evenly over the replicas and go through the tower,
`vision_batch_size` at a time, before megatron-core's schedule begins. Each microbatch then takes its features
in place of pixels, as it takes those of a feature cache; the projector stays in the microbatch. If the tower
trains, the schedule leaves the gradients of the features, and one backward through the tower follows its last
microbatch, before gradients are reduced.

Shape legend: n images of the step on this replica · S their side · t positions of each · C width of the
tower.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_evomoe.config import RunConfig
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.config.recipe import trained_parts
from megatron_evomoe.model.llava import LlavaModel
from megatron_evomoe.observe.profile import phase
from megatron_evomoe.parallel import topology
from megatron_evomoe.parallel.exchange import Exchange
from megatron_evomoe.plan.activations import vision_batch_size


@dataclass(kw_only=True)
class _Pending:
    """What the backward of a trained tower needs of the forward."""

    given_out: list[torch.Tensor]
    """The features of each microbatch, [n, t, C], whose gradients the schedule leaves."""
    exchange: Exchange | None
    batches: list[torch.Tensor]
    """The pixels that this replica computed, uint8 [≤ vision_batch_size, 3, S, S] each."""
    last: torch.Tensor
    """The features of the last batch, with the graph that computed them."""


class StepTower:
    """Computes the features of a step's images, and the gradients of a trained tower."""

    def __init__(self, wrapped: DistributedDataParallel, config: RunConfig, kind: StageKind) -> None:
        """See the class.

        Args:
            wrapped: the first chunk of the first pipeline stage.
            kind: of the stage, whose values `config` already has.
        """
        self._wrapped = wrapped
        self._model: LlavaModel = wrapped.module
        self._trains = "vision" in trained_parts(config, kind)
        self._batch_size = vision_batch_size(config, kind)
        self._pending: _Pending | None = None

    def features(self, images: Sequence[torch.Tensor], counts: Sequence[int]) -> list[torch.Tensor]:
        """The images of each microbatch as features [n, t, C]; cached features are returned as they are.

        Communicates over TP, and over replicas if their numbers of images are uneven.

        Args:
            images: of each microbatch, uint8 [n, 3, S, S] or features [n, t, C].
            counts: images of each replica in this step.
        """
        self._pending = None
        if images[0].dim() == 3:
            return list(images)
        with phase("forward"):
            return self._features(images, counts)

    def _features(self, images: Sequence[torch.Tensor], counts: Sequence[int]) -> list[torch.Tensor]:
        exchange = Exchange.of(counts, topology.current().data)
        pixels = torch.cat(list(images))
        batches = list((exchange.spread(pixels) if exchange else pixels).split(self._batch_size))
        # A trained tower keeps the activations of one batch. It runs even without images (model/vision.py),
        # because all replicas gather updated weights in the order of their first use.
        with torch.no_grad():
            first = [self._model.vision_features(batch) for batch in batches[:-1]]
        last = self._model.vision_features(batches[-1])
        computed = torch.cat([*first, last.detach()])
        own = exchange.collect(computed) if exchange else computed
        features = [part.detach() for part in own.split([len(some) for some in images])]
        if self._trains:
            for part in features:
                part.requires_grad_()
            self._pending = _Pending(given_out=features, exchange=exchange, batches=batches, last=last)
        return features

    def backward(self) -> None:
        """Add the gradients of a trained tower; nothing for a frozen one. Communicates as `features`.

        It is called once after the schedule's last backward, before gradients are reduced.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        with phase("backward"):
            self._backward(pending)

    def _backward(self, pending: _Pending) -> None:
        gradient = torch.cat(
            [torch.zeros_like(part) if part.grad is None else part.grad for part in pending.given_out]
        )
        if pending.exchange:
            gradient = pending.exchange.spread(gradient)
        parts = list(gradient.split(self._batch_size))
        # The batch that has its activations comes first, so that they are freed before others are computed.
        for i, (pixels, part) in enumerate(zip(reversed(pending.batches), reversed(parts), strict=True)):
            features = pending.last if i == 0 else self._model.vision_features(pixels)
            # megatron-core's wrapper may reduce a gradient as soon as a backward has reached it outside of
            # `no_sync`, so only the batch that comes last runs there
            is_last = i == len(parts) - 1
            with contextlib.nullcontext() if is_last else self._wrapped.no_sync():
                features.backward(part)
