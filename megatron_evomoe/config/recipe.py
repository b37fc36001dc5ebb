"""What each stage kind trains, has and starts from: the recipe as data (docs/stages.md)."""

from __future__ import annotations

import typing

from megatron_evomoe.config.errors import ConfigError
from megatron_evomoe.config.kinds import PRETRAINED, StageKind
from megatron_evomoe.config.run import RunConfig, StageConfig
from megatron_evomoe.config.training import Part

PARTS: tuple[str, ...] = typing.get_args(Part)
"""What a stage can train or freeze; every parameter belongs to one part (`part_of`)."""

MODULES = ("vision_model", "vision_projection", "language_model")
"""The modules of the model; a checkpoint's record lists under `parts` those that it holds."""

TRAINS: dict[StageKind, tuple[str, ...]] = {
    StageKind.ALIGN: ("projector",),
    StageKind.WARMUP: ("projector", "language"),
    StageKind.DENSE: ("projector", "language"),  # the dense baseline, which continues stage I
    StageKind.EVOLVE: ("first_expert",),
    StageKind.ROUTE: ("router",),
}
"""Stage kind -> parts trained by default (paper, section "Training"); `train.trainable` overrides it."""

HAS_BESIDES: dict[StageKind, tuple[str, ...]] = {
    StageKind.EVOLVE: ("first_expert",),
    StageKind.ROUTE: ("experts", "router"),
}
"""Stage kind -> parts that its model has besides vision tower, projector and language model."""

STARTS_FROM: dict[StageKind, tuple[str, ...]] = {
    StageKind.ALIGN: (StageKind.ALIGN, PRETRAINED),
    StageKind.WARMUP: (StageKind.ALIGN, StageKind.WARMUP, StageKind.DENSE, PRETRAINED),
    StageKind.DENSE: (StageKind.ALIGN, StageKind.WARMUP, StageKind.DENSE, PRETRAINED),
    StageKind.EVOLVE: (StageKind.WARMUP, StageKind.DENSE, StageKind.ALIGN, PRETRAINED),
    StageKind.ROUTE: (
        StageKind.EVOLVE,
        StageKind.ROUTE,
        StageKind.WARMUP,
        StageKind.DENSE,
        StageKind.ALIGN,
        PRETRAINED,
    ),
}
"""Stage kind -> kinds whose checkpoint it can start from."""


def trained_parts(config: RunConfig, stage_kind: StageKind) -> tuple[str, ...]:
    """The parts whose parameters a stage of this kind trains: `train.trainable`, or the kind's own.

    A trained language model includes the FFNs of all its layers, whatever they have become: `is_trained`.

    Raises:
        ConfigError: `train.trainable` names a part that a model of this stage kind does not have.
    """
    parts = tuple(config.train.trainable) or TRAINS[stage_kind]
    has = {"vision", "projector", "language", *HAS_BESIDES.get(stage_kind, ())}
    absent = [part for part in parts if part not in has]
    # Beside "language" they are harmless: in this stage kind they belong to the language model.
    if absent and "language" not in parts:
        raise ConfigError(
            f"trainable names {', '.join(absent)}, which a stage of kind {stage_kind} does not have "
            f"as parts of their own; choose from {', '.join(part for part in PARTS if part in has)}"
        )
    return parts


def is_trained(part: str, parts: tuple[str, ...]) -> bool:
    """Whether parameters of `part` get gradients in a stage that trains `parts` (`trained_parts`).

    Experts and routers are layers of the language model, so they train with it.
    """
    return part in parts or (part in ("experts", "router") and "language" in parts)


def check_feature_cache(config: RunConfig, stage: StageConfig) -> None:
    """Check that the vision tower is frozen where its features are kept as files.

    Raises:
        ConfigError: the stage trains the tower, which changes the features with every step.
    """
    if config.data.cache_vision_features and "vision" in trained_parts(config, stage.kind):
        raise ConfigError(
            f"stage {stage.name!r} trains the vision tower, so its features cannot be kept; leave 'vision' "
            "out of trainable, or set cache_vision_features: false for this stage"
        )
