"""What a run is made of: one keyword-only dataclass per concern, and the way from YAML and flags to them.

A YAML file has one mapping per section (``language:``, ``vision:``, ``moe:``, ``data:`` …) and a list of
``stages:``. Every field is also a command-line flag in Megatron's spelling: ``optimizer.clip_grad`` is
``--clip-grad``; the vision tower's are prefixed (``--vision-hidden-size``). Flags win over the file. A stage
may override any flat field of the sections `STAGE_SECTIONS`, so each stage says only what is special about
it.
"""

from megatron_evomoe.config.errors import ConfigError
from megatron_evomoe.config.flags import add_flags, flags_from
from megatron_evomoe.config.kinds import STAGE_KINDS, StageKind
from megatron_evomoe.config.model import LanguageConfig, MoEConfig, VisionConfig
from megatron_evomoe.config.read import from_mapping, load_config
from megatron_evomoe.config.run import MODEL_SECTIONS, SECTIONS, RunConfig, StageConfig
from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.config.training import (
    CheckpointConfig,
    DataConfig,
    GpuConfig,
    LogConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)

__all__ = [
    "MODEL_SECTIONS",
    "SECTIONS",
    "STAGE_KINDS",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "GpuConfig",
    "LanguageConfig",
    "LogConfig",
    "MoEConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "StageConfig",
    "StageKind",
    "TokenType",
    "TrainConfig",
    "VisionConfig",
    "add_flags",
    "flags_from",
    "from_mapping",
    "load_config",
]
