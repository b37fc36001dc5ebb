"""The kinds of training stages."""

from __future__ import annotations

from enum import Enum


class StageKind(str, Enum):
    """What a stage trains; the values are those of ``kind:`` in a configuration and in a checkpoint's record.

    A member equals its plain string and is written as that string. The kind of a checkpoint can also be
    `PRETRAINED`, which is not a stage.
    """

    ALIGN = "align"
    """Trains the projector, so that image features become inputs that the language model understands."""
    WARMUP = "warmup"
    """Trains the dense language model on instructions (stage I of the paper)."""
    DENSE = "dense"
    """Continues `WARMUP` without experts: the dense baseline."""
    EVOLVE = "evolve"
    """Trains the first expert of each MoE layer; experts 2…N are updated from it (stage II)."""
    ROUTE = "route"
    """Trains the routers of the mixture (stage III)."""

    __str__ = str.__str__

    @property
    def has_mixture(self) -> bool:
        """Whether a checkpoint of this kind holds all experts of each MoE layer."""
        return self in (StageKind.EVOLVE, StageKind.ROUTE)

    @property
    def has_router(self) -> bool:
        """Whether a stage of this kind routes tokens to experts."""
        return self is StageKind.ROUTE


STAGE_KINDS: tuple[str, ...] = tuple(kind.value for kind in StageKind)
"""The values of `StageKind`, in the order of the recipe."""
MIXTURE_KINDS: tuple[str, ...] = tuple(kind.value for kind in StageKind if kind.has_mixture)
"""The kinds of checkpoints that hold experts."""
PRETRAINED = "pretrained"
"""The kind of a checkpoint that was imported, not trained by a stage."""
