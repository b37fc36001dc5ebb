"""Which checkpoint an export starts from, and the configuration it was trained with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_evomoe.checkpoint import find
from megatron_evomoe.checkpoint.record import CheckpointError, Record
from megatron_evomoe.config import RunConfig, load_config


def find_checkpoint(path: Path) -> Path:
    """The ``iter_…`` folder that `path` is, or the newest whole one in a stage's folder. Needs no process
    group.

    Raises:
        CheckpointError: there is none, or `path` is a run's directory with several stages.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is no directory; give a stage's folder of a run, or an iter_… folder in it"
        )
    if path.name.startswith("iter_"):
        return path
    found = find.latest(path)
    if found is None:
        stages = sorted(p.name for p in path.iterdir() if p.is_dir() and find.candidates(p))
        hint = (
            f"it holds the stages {', '.join(stages)}: name one of them"
            if stages
            else "it has no whole iter_* folder"
        )
        raise CheckpointError(f"no checkpoint in {path}: {hint}")
    return found


def config_of(folder: Path, record: Record) -> RunConfig:
    """The run's configuration as the checkpoint's stage saw it, with the true vocabulary size.

    Raises:
        ConfigError: the saved configuration cannot be read.
    """
    config = load_config(folder / "run_config.yaml")
    if any(stage.name == record.stage for stage in config.stages):
        config = config.for_stage(record.stage)
    return replace(config, language=replace(config.language, vocab_size=record.vocab_size))


def lineage(record: Record) -> list[dict[str, Any]]:
    """The stages before this one, without the paths, which mean nothing elsewhere."""
    return [{key: ancestor[key] for key in ("stage", "kind", "step")} for ancestor in record.lineage]
