"""Writes a run's numbers to JSONL files and the console, and to TensorBoard and wandb if configured.

metrics.jsonl   {"step", "stage", "time", metrics…, "samples"?}    one line per logged step
events.jsonl    {"event", "time", "stage"?, fields…}               what happened: eval, save, resume, …
tables.jsonl    {"title", "time", "columns", "rows"}
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_evomoe.config import LogConfig
from megatron_evomoe.observe import jsonl
from megatron_evomoe.observe.console import ConsoleReport
from megatron_evomoe.observe.sinks import TensorBoardSink, WandbSink

log = logging.getLogger(__name__)

RESERVED = frozenset({"step", "stage", "time", "samples"})


class RunLogger:
    """All sinks of one run. Except on the main rank, each method returns at once and nothing is opened.

    Args:
        log_config: `log_interval` spaces the plain lines of the console and nothing else.
        run_dir: folder of the JSONL files and of wandb's own files.
        wandb_run_id: from the checkpoint on a resume; none makes a new one. Without wandb it is kept as
            given, so that checkpoints do not lose it.

    Raises:
        RuntimeError: TensorBoard or wandb is configured but not installed.
    """

    def __init__(
        self,
        log_config: LogConfig,
        run_dir: str | Path,
        *,
        is_main: bool,
        run_name: str,
        config_dict: dict[str, Any],
        wandb_run_id: str | None = None,
    ):
        self.is_main, self.run_dir, self._wandb_run_id = is_main, Path(run_dir), wandb_run_id
        self._stage: str | None = None
        if not is_main:
            return
        self._sinks: list[TensorBoardSink | WandbSink] = []
        self._failed: set[TensorBoardSink | WandbSink] = set()
        if log_config.tensorboard_dir:
            self._sinks.append(TensorBoardSink(log_config.tensorboard_dir))
        if log_config.wandb_project:
            wandb = WandbSink(
                project=log_config.wandb_project,
                entity=log_config.wandb_entity,
                name=log_config.wandb_exp_name or run_name,
                config=jsonl.plain(config_dict),
                directory=self.run_dir,
                run_id=wandb_run_id,
            )
            self._sinks.append(wandb)
            self._wandb_run_id = wandb.run_id
        self._metrics = jsonl.LineFile(self.run_dir / "metrics.jsonl")
        self._events = jsonl.LineFile(self.run_dir / "events.jsonl")
        self._console = ConsoleReport(log_config.log_interval)

    @property
    def wandb_run_id(self) -> str | None:
        """The id to save in checkpoints. On other ranks than the main one, the id that was given."""
        return self._wandb_run_id

    def start_stage(self, name: str, total_steps: int, start_step: int) -> None:
        """Begin stage `name`, whose steps from `start_step` + 1 to `total_steps` are logged next."""
        self._stage = name
        if not self.is_main:
            return
        for sink in self._sinks:
            self._guarded(sink, partial(sink.start_stage, name, start_step))
        self._console.start_stage(name, total_steps, start_step)

    def rewind(self, stage: str, step: int) -> None:
        """Remove the lines of a resumed stage that will be written again.

        These are its metrics after `step` and its diagnostics from `step` on. Other stages' lines stay, and
        so does events.jsonl, which is a history.
        """
        if not self.is_main:
            return
        self._metrics.close()
        jsonl.rewind(self.run_dir / "metrics.jsonl", stage, step)
        # diagnostics of a step are written after its checkpoint
        jsonl.rewind(self.run_dir / "diagnostics.jsonl", stage, step - 1)
        self._metrics = jsonl.LineFile(self.run_dir / "metrics.jsonl")

    def log(self, step: int, metrics: dict[str, Any], samples: dict[str, Any] | None = None) -> None:
        """Log one step (the first is 1).

        Args:
            metrics: name -> number; none is left out.
            samples: about the step's data (counts by reason, sample keys, texts); for the JSONL file only.

        Raises:
            ValueError: a metric has the name of a field of the line (`RESERVED`), or is no number.
        """
        if not self.is_main:
            return
        assert self._stage is not None, "start_stage comes before log"
        if not RESERVED.isdisjoint(metrics):
            raise ValueError(
                f"metric names {sorted(RESERVED & set(metrics))} are fields of every line; use others"
            )
        numbers = {name: _number(name, value) for name, value in metrics.items() if value is not None}
        record = {"step": step, "stage": self._stage, "time": time.time(), **numbers}
        self._metrics.write(record if samples is None else {**record, "samples": samples})
        for sink in self._sinks:
            self._guarded(sink, partial(sink.log, step, numbers))
        self._console.step(step, numbers)

    def _guarded(self, sink: TensorBoardSink | WandbSink, work: Callable[[], None]) -> None:
        """Call `work` of TensorBoard or wandb. A failure does not end the run and is logged once per sink."""
        try:
            work()
        except Exception as error:
            if sink not in self._failed:
                log.warning(
                    "%s failed (%s: %s) and may lack numbers from here on; metrics.jsonl has them all",
                    type(sink).__name__,
                    type(error).__name__,
                    error,
                )
            self._failed.add(sink)

    def flush(self) -> None:
        """Write the lines that a full disk has delayed, as far as that is possible now."""
        if self.is_main:
            self._metrics.flush()
            self._events.flush()

    def event(self, name: str, **fields: Any) -> None:
        """Append to events.jsonl. The current stage is added unless `fields` has one.

        The loss figure shows `event("eval", step=…, accuracy=…, blind=…)`, whose values are numbers in [0, 1]
        or {question kind: number}; `blind` (accuracy with blanked images) may be left out.
        """
        if not self.is_main:
            return
        stage = {} if self._stage is None else {"stage": self._stage}
        self._events.write({"event": name, "time": time.time(), **stage, **fields})

    def say(self, text: str) -> None:
        """Print a line: above the progress line on a terminal, else as it is."""
        if self.is_main:
            self._console.say(text)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Print a table and append it to tables.jsonl.

        Args:
            rows: cells are strings, numbers or none.

        Raises:
            ValueError: a row's length differs from that of `columns`.
        """
        if not self.is_main:
            return
        if wrong := [row for row in rows if len(row) != len(columns)]:
            raise ValueError(
                f"table {title!r} has {len(columns)} columns, but a row with {len(wrong[0])} cells: "
                f"{wrong[0]!r}"
            )
        self._console.table(title, columns, rows)
        jsonl.append(
            self.run_dir / "tables.jsonl",
            {"title": title, "time": time.time(), "columns": columns, "rows": rows},
        )

    def close(self) -> None:
        """End the live line and close every sink. May be called twice."""
        if not self.is_main:
            return
        self._console.stop()
        for sink in self._sinks:
            self._guarded(sink, sink.close)
        self._sinks = []
        self._metrics.close()
        self._events.close()


def _number(name: str, value: Any) -> float | int:
    """A Python number from a number, a tensor or a numpy scalar. Raises `ValueError` for anything else."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"metric {name!r} is a {type(value).__name__}, not a number; put texts in `samples`")
    return value
