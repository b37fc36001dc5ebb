"""Finds the checkpoint to export, and the configuration it was trained with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_evomoe.checkpoint import find
from megatron_evomoe.checkpoint.record import CheckpointError, Record
from megatron_evomoe.config import RunConfig, load_config


def find_checkpoint(path: Path) -> Path:
    """The newest complete ``iter_…`` folder in a stage's folder, or `path` itself if it is such a folder.

    Raises:
        CheckpointError: there is none, or `path` is a run's folder with several stages.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a directory; give the folder of a run's stage, or an iter_… folder in it"
        )
    if path.name.startswith("iter_"):
        return path
    found = find.latest(path)
    if found is None:
        stages = sorted(p.name for p in path.iterdir() if p.is_dir() and find.candidates(p))
        hint = (
            f"it holds the stages {', '.join(stages)}: name one of them"
            if stages
            else "it has no complete iter_* folder"
        )
        raise CheckpointError(f"no checkpoint in {path}: {hint}")
    return found


def config_of(folder: Path, record: Record) -> RunConfig:
    """The run's configuration resolved for the checkpoint's stage, with the true vocabulary size.

    Raises:
        ConfigError: the saved configuration cannot be read.
    """
    config = load_config(folder / "run_config.yaml")
    if any(stage.name == record.stage for stage in config.stages):
        config = config.for_stage(record.stage)
    return replace(config, language=replace(config.language, vocab_size=record.vocab_size))


def lineage(record: Record) -> list[dict[str, Any]]:
    """The stages before this one, without their paths, which are of no use on another machine."""
    return [{key: ancestor[key] for key in ("stage", "kind", "step")} for ancestor in record.lineage]
