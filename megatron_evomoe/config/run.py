"""The configuration of a run: its sections, its stages, and the flat names of fields for flags and stages."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, fields, replace
from typing import Any, Optional

from megatron_evomoe.config import check, text
from megatron_evomoe.config.errors import ConfigError
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.config.model import LanguageConfig, MoEConfig, VisionConfig
from megatron_evomoe.config.training import (
    CheckpointConfig,
    DataConfig,
    GpuConfig,
    LogConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from megatron_evomoe.config.types import StageName, Text

STAGE_SECTIONS = ("moe", "data", "optimizer", "train", "gpu", "log")
MODEL_SECTIONS = ("language", "vision", "moe")


@dataclass(kw_only=True)
class StageConfig:
    """One stage of the recipe. Other keys of its mapping override fields of the sections `STAGE_SECTIONS`."""

    name: StageName
    """The name of the stage in logs, and of its directory; unique among the stages."""
    kind: StageKind
    """What the stage does (config/recipe.py). By default the kind that its name names."""
    load: Optional[Text] = None
    """The checkpoint directory, or the earlier stage, that it starts from. None means the stage before it."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Flat field names to the values that the stage overrides."""


@dataclass(kw_only=True)
class RunConfig:
    """The configuration of one run; `load_config` and `from_mapping` build it."""

    preset: Optional[str] = None
    """A named model shape, or a YAML file with the sections `language`, `vision` and `moe` (as the importer
    writes it). Values of the configuration itself override those of the preset.
    """
    language: LanguageConfig = field(default_factory=LanguageConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    gpu: GpuConfig = field(default_factory=GpuConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    stages: list[StageConfig] = field(default_factory=list)

    def check(self, kind: StageKind | None = None) -> None:
        """Check the fields against each other, and against what a stage of `kind` needs.

        Raises:
            ConfigError: a rule of config/check.py does not hold.
        """
        layers = self.language.num_layers
        check.check_language(self.language, self.data)
        check.check_vision(self.vision, self.data)
        check.check_experts(self.moe, layers)
        check.check_training(self.train, self.optimizer, self.parallel, self.gpu, layers)
        check.check_fp8(self.gpu, self.train, self.moe, self.parallel, self.language)
        if kind is not None:
            check.check_mixture(self.moe, layers, kind)

    def for_stage(self, name: str) -> RunConfig:
        """A copy with the overrides of stage `name` applied.

        Raises:
            ConfigError: the run has no such stage, or its fields contradict each other.
        """
        stage = next((s for s in self.stages if s.name == name), None)
        if stage is None:
            raise ConfigError(
                f"no stage {name!r}; this run has {', '.join(s.name for s in self.stages) or 'none'}"
            )
        config = replace(self)
        for key, value in stage.overrides.items():
            section, field_name = FLAT[key]
            setattr(config, section, replace(getattr(config, section), **{field_name: value}))
        try:
            config.check(stage.kind)
        except ConfigError as error:
            raise ConfigError(f"stage {name!r}: {error}") from None
        return config

    def order_key(self, name: str) -> str:
        """The stage in whose order stage `name` takes its samples: itself, or with `continue_data` another.

        This holds for a run that is trained from its first stage on. A stage that begins from a checkpoint of
        another run goes on in the order recorded there.
        """
        names = [s.name for s in self.stages]
        at = names.index(name)
        load = self.stages[at].load
        before = load if load in names else names[at - 1] if at and load is None else None
        if before is None or not self.for_stage(name).data.continue_data:
            return name
        return self.order_key(before)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain data, which `from_mapping` reads back."""
        out = dataclasses.asdict(self)
        out["stages"] = [
            {"name": s.name, "kind": s.kind.value, **({"load": s.load} if s.load else {}), **s.overrides}
            for s in self.stages
        ]
        return _plain(out)

    def to_yaml(self) -> str:
        """The resolved configuration as a file that `load_config` reads."""
        return text.dump(self.to_dict())


SECTIONS: dict[str, type] = {
    "language": LanguageConfig,
    "vision": VisionConfig,
    "moe": MoEConfig,
    "data": DataConfig,
    "parallel": ParallelConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "gpu": GpuConfig,
    "checkpoint": CheckpointConfig,
    "log": LogConfig,
}


def flat_name(section: str, name: str) -> str:
    """The name by which flags and stages address a section's field."""
    return f"vision_{name}" if section == "vision" else name


# flat name -> (section, field): what a flag or a stage override may say
FLAT: dict[str, tuple[str, str]] = {}
for _section, _cls in SECTIONS.items():
    for _f in fields(_cls):
        _key = flat_name(_section, _f.name)
        assert _key not in FLAT, f"two sections share the flag --{_key}"
        FLAT[_key] = (_section, _f.name)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
