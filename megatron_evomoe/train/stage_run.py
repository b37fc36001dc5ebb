"""What belongs to one stage's run, in one object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_evomoe.checkpoint.record import Record
from megatron_evomoe.config import RunConfig, StageConfig
from megatron_evomoe.data.loader import StepBatch, TrainLoader
from megatron_evomoe.observe import profile
from megatron_evomoe.parallel.broadcast import Step
from megatron_evomoe.train import vision_cache
from megatron_evomoe.train.built import Built
from megatron_evomoe.train.data_order import sample_order
from megatron_evomoe.train.hooks import HookChain
from megatron_evomoe.train.session import Session, stage_dir
from megatron_evomoe.train.stop import StopRequests
from megatron_evomoe.train.training_set import TrainingSet, next_step, sample_lengths, train_loader


@dataclass(kw_only=True)
class StageRun:
    """One stage while it runs. `beginning.open_stage` makes it; the loop and the hooks are given it."""

    session: Session
    """The objects that all stages share: logger, topology, tokenizer, saver."""
    stage: StageConfig
    config: RunConfig
    """The run's configuration with the stage's own values in place."""
    built: Built
    """Model, optimizer and schedule on this rank."""
    record: Record
    """Steps done and samples consumed; it is saved with every checkpoint."""
    samples: TrainingSet | None
    """What the stage trains on; none where all its steps are done."""
    stop: StopRequests
    hooks: HookChain
    loader: TrainLoader | None = None
    """Reads this replica's samples; none on ranks that receive them, and before `open_samples`."""
    _batches: Iterator[StepBatch] | None = None
    _metrics: dict[str, float] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Steps done in this stage."""
        return self.record.step

    @property
    def has_steps_left(self) -> bool:
        """Whether the stage had steps left when it was opened."""
        return self.samples is not None

    @property
    def is_at_last_step(self) -> bool:
        """Whether all of the stage's steps are done."""
        return self.step >= self.config.train.train_iters

    def open_samples(self) -> str | None:
        """Open the stage's samples from the record's position on.

        Before that, the lengths of samples are counted and vision features are computed, if the configuration
        needs them. Communicates.

        Returns:
            Why the run was asked to end before all features were there, or none.
        """
        assert self.samples is not None and self.record.data is not None
        lengths = sample_lengths(self.session, self.config, self.samples.dataset)
        features = vision_cache.open_cache(self)
        if reason := vision_cache.complete(features, self):
            return reason
        self.loader = train_loader(
            self.session,
            self.config,
            self.stage.kind,
            self.samples.dataset,
            order=sample_order(self.record.data),
            lengths=lengths,
            start_position=self.record.position,
            features=features,
        )
        self._batches = iter(self.loader) if self.loader is not None else None
        return None

    def next_batch(self) -> Step:
        """The next step's samples on this rank. Communicates within the replica."""
        with profile.phase("data"):
            return next_step(self._batches, self.session.topology, self.config)

    def count_step(self) -> None:
        """Record that a step was taken and its samples consumed."""
        self.record.step += 1
        self.record.position += self.config.train.global_batch_size

    def add_metrics(self, numbers: Mapping[str, float]) -> None:
        """Add numbers to the present step's line in metrics.jsonl and the other logs; rank 0's are written.

        Raises:
            ValueError: the line has a number of that name already.
        """
        if taken := sorted(self._metrics.keys() & numbers.keys()):
            raise ValueError(f"the step has metrics named {', '.join(taken)} already; use other names")
        self._metrics.update(numbers)

    def log_metrics(self) -> None:
        """Log the present step's line."""
        skipped = dict(self.loader.skipped) if self.loader is not None else {}
        metrics, self._metrics = self._metrics, {}
        self.session.logger.log(self.step, metrics, {"skipped": skipped} if skipped else None)

    def stop_reason(self) -> str | None:
        """Why all ranks stop after the present step, or none; the last step needs no reason. Communicates."""
        return None if self.is_at_last_step else self.stop.agreed(self.step)

    @property
    def is_save_due(self) -> bool:
        """Whether `save_interval` asks for a checkpoint of this step. The last step is saved anyway."""
        every = self.config.checkpoint.save_interval
        return every > 0 and self.step % every == 0 and not self.is_at_last_step

    def save(self) -> None:
        """Write a checkpoint, if the run saves any; with `async_save` it is published later. Communicates."""
        if self.session.config.checkpoint.save is None:
            return
        self.hooks.before_save(self)
        self.session.logger.flush()  # a run that resumes from here does not log these lines again
        with profile.phase("save"):
            self.poll_saves(wait=True)  # one save at a time
            path = self.session.saver.save(
                stage_dir(self.session.run_dir, self.stage),
                modules=self.built.gather_weights(),
                optimizer=self.built.optimizer,
                scheduler=self.built.scheduler,
                record=self.record,
                config_yaml=self.session.config.to_yaml(),
            )
        self._announce(path)

    def poll_saves(self, *, wait: bool = False) -> None:
        """Publish a background save that is complete, or `wait` until it is.

        Communicates while a save is under way.
        """
        self._announce(self.session.saver.poll(wait=wait))

    def _announce(self, published: Path | None) -> None:
        if published is not None:
            self.session.logger.event(
                "save", stage=self.stage.name, step=int(published.name[5:]), checkpoint=str(published)
            )
            self.hooks.after_save(self, published)
