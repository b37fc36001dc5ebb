"""What all stages of one call of `train` share: tokenizer, logger, topology, the run's id."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_evomoe.checkpoint import find, run_id
from megatron_evomoe.checkpoint import record as records
from megatron_evomoe.checkpoint.find import Owner
from megatron_evomoe.checkpoint.store import Saver
from megatron_evomoe.config import ConfigError, RunConfig, StageConfig
from megatron_evomoe.data.conversation import check_template, stop_ids
from megatron_evomoe.data.tokenizer import Tokenizer, build_tokenizer
from megatron_evomoe.observe.heartbeat import Heartbeat
from megatron_evomoe.observe.log import RunLogger
from megatron_evomoe.parallel import topology
from megatron_evomoe.parallel.topology import Topology
from megatron_evomoe.train import preflight
from megatron_evomoe.train.hooks import StepHook


@dataclass
class Session:
    """What all stages of a run share. `open_session` makes it once."""

    config: RunConfig
    """The run's configuration, without the values that belong to one stage."""
    topology: Topology
    tokenizer: Tokenizer
    logger: RunLogger
    run_dir: Path
    """The folder of `run_folder`."""
    saver: Saver
    heartbeat: Heartbeat
    run_id: str
    """Identifies the run in its checkpoints (checkpoint/run_id.py)."""
    hooks: tuple[StepHook, ...] = ()
    """The user's hooks; the package's own are added for each stage (train/builtin_hooks.py)."""

    def owner(self, stage: StageConfig) -> Owner:
        """The owner that the checkpoints in a stage's folder must have."""
        return Owner(stage.name, self.run_id)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the tokenizer."""
        return self.tokenizer.fingerprint()

    def stop_ids(self, config: RunConfig) -> set[int]:
        """Token ids that end an answer."""
        return stop_ids(self.tokenizer, config.data.conversation_template)


def prepare_config(config: RunConfig) -> tuple[RunConfig, Tokenizer]:
    """Build the tokenizer, and set the model's vocabulary size by it if the configuration leaves it out.

    Raises:
        ConfigError: there is no tokenizer, there are no stages, a stage names another tokenizer, or the
            vocabulary is smaller than the tokenizer's.
    """
    if not config.stages:
        raise ConfigError("the configuration lists no stages; add stages: [{name: align, …}, …]")
    if not config.data.tokenizer:
        raise ConfigError(
            "data.tokenizer is not set; give a sentencepiece .model file or a Hugging Face tokenizer "
            "directory"
        )
    tokenizer = build_tokenizer(config.data.tokenizer)
    size = config.language.vocab_size
    if size is None:
        config = replace(config, language=replace(config.language, vocab_size=tokenizer.vocab_size))
    elif size < tokenizer.vocab_size:
        raise ConfigError(
            f"vocab_size {size} is smaller than the tokenizer's {tokenizer.vocab_size}; leave it out or "
            "raise it, or import the model with tools/convert_from_hf.py --resize-embeddings, which adds "
            "rows to its embedding"
        )
    for stage in config.stages:
        data = config.for_stage(stage.name).data
        if data.tokenizer != config.data.tokenizer:
            raise ConfigError(
                f"stage {stage.name!r} names tokenizer {data.tokenizer}, the run {config.data.tokenizer}; "
                "stages share one embedding and so one tokenizer: name it only in section data"
            )
        check_template(tokenizer, data.conversation_template)
    return config, tokenizer


def run_folder(config: RunConfig) -> Path:
    """The folder of the run's metrics and, if it saves any, its checkpoints."""
    return Path(config.checkpoint.save or "runs/default")


def open_session(config: RunConfig, hooks: Sequence[StepHook], check_folder: Callable[[], None]) -> Session:
    """Set up process groups, logger, tokenizer and the run's id.

    Communicates: every rank calls it once, after `init_process_group`.

    Args:
        hooks: the user's.
        check_folder: called on rank 0 before every save; raises if the run's folder is no longer there.
    """
    config, tokenizer = prepare_config(config)
    preflight.check(config)
    place = topology.initialize(config)
    run_dir = run_folder(config)
    identity = run_id.of_run(run_dir)
    logger = RunLogger(
        config.log,
        run_dir,
        is_main=place.rank == 0,
        run_name=run_dir.name,
        config_dict=config.to_dict(),
        wandb_run_id=_known_wandb_run(config, run_dir, identity) if place.rank == 0 else None,
    )
    return Session(
        config=config,
        topology=place,
        tokenizer=tokenizer,
        logger=logger,
        run_dir=run_dir,
        saver=Saver(config.checkpoint, check_folder),
        heartbeat=Heartbeat(run_dir),
        run_id=identity,
        hooks=tuple(hooks),
    )


def _known_wandb_run(config: RunConfig, run_dir: Path, identity: str) -> str | None:
    """The wandb id under which an earlier part of this run logged, or none."""
    for stage in reversed(config.stages):
        found = find.latest(stage_dir(run_dir, stage), Owner(stage.name, identity))
        if found:
            return records.read(found).wandb_run_id
    return None


def earlier_stage(config: RunConfig, stage: StageConfig) -> StageConfig | None:
    """The stage before `stage` in the list."""
    names = [s.name for s in config.stages]
    at = names.index(stage.name)
    return config.stages[at - 1] if at else None


def stage_dir(run_dir: Path, stage: StageConfig) -> Path:
    """The folder of a stage's checkpoints."""
    return run_dir / stage.name


def selected(config: RunConfig, names: Sequence[str] | None) -> list[StageConfig]:
    """The stages to run: all, or those named. Raises `ConfigError` for a name the run lacks."""
    if not names:
        return list(config.stages)
    known = {s.name: s for s in config.stages}
    for name in names:
        if name not in known:
            raise ConfigError(f"no stage {name!r}; this run has {', '.join(known)}")
    return [known[name] for name in names]
