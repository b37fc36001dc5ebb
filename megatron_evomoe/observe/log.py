"""Where a run's numbers go: JSONL always; console; TensorBoard and wandb when asked.

metrics.jsonl   {"step", "stage", "time", metrics…, "samples"?}    one line per logged step
events.jsonl    {"event", "time", "stage"?, fields…}               what happened: eval, save, resume, …
tables.jsonl    {"title", "time", "columns", "rows"}
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_evomoe.config import LogConfig
from megatron_evomoe.observe import jsonl
from megatron_evomoe.observe.console import ConsoleReport
from megatron_evomoe.observe.sinks import TensorBoardSink, WandbSink

log = logging.getLogger(__name__)

RESERVED = frozenset({"step", "stage", "time", "samples"})


class RunLogger:
    """All sinks of one run. On other ranks than the main one every method returns at once and nothing is
    imported or opened.

    log_config: read once; `log_interval` spaces the plain console lines, nothing else. How often `log` is
    called is the caller's. run_dir: JSONL files, and wandb's own. wandb_run_id: from the checkpoint when
    resuming; none mints a new one. Kept as given when wandb is off, so it is not lost.

    Raises:
        RuntimeError: TensorBoard or wandb is asked for and not installed; says what to install or unset.
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
        """To be saved in the checkpoint. On other ranks than the main one, only what they were given."""
        return self._wandb_run_id

    def start_stage(self, name: str, total_steps: int, start_step: int = 0) -> None:
        """Following `log` calls belong to `name`, whose steps run from `start_step` + 1 to `total_steps`."""
        self._stage = name
        if not self.is_main:
            return
        for sink in self._sinks:
            self._guarded(sink, lambda sink=sink: sink.start_stage(name, start_step))
        self._console.start_stage(name, total_steps, start_step)

    def rewind(self, stage: str, step: int) -> int:
        """On resume: drop `stage`'s metrics beyond `step` and its diagnostics from `step` on, which will be
        written again; returns the metric lines dropped. Other stages' lines and events.jsonl, which is a
        history of what happened, stay.
        """
        if not self.is_main:
            return 0
        self._metrics.close()
        dropped = jsonl.rewind(self.run_dir / "metrics.jsonl", stage, step)
        jsonl.rewind(self.run_dir / "diagnostics.jsonl", stage, step - 1)  # made after their step was saved
        self._metrics = jsonl.LineFile(self.run_dir / "metrics.jsonl")
        return dropped

    def log(self, step: int, metrics: dict[str, Any], samples: dict[str, Any] | None = None) -> None:
        """Report one step (the first is 1).

        metrics: name -> number.
        samples: about the data of the step (counts by reason, sample keys, texts); JSONL only.

        Raises:
            ValueError: a metric is named like a field of the line (`RESERVED`).
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
            self._guarded(sink, lambda sink=sink: sink.log(step, numbers))
        self._console.step(step, numbers)

    def _guarded(self, sink: TensorBoardSink | WandbSink, work: Callable[[], None]) -> None:
        """What a copy of the numbers cannot do never ends a run: it is said once for each sink."""
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
        """Write the lines that a full disk has kept waiting, as far as that can be done now."""
        if self.is_main:
            self._metrics.flush()
            self._events.flush()

    def event(self, name: str, **fields: Any) -> None:
        """Append to events.jsonl; the current stage is added unless `fields` has one.

        The loss figure marks `event("eval", step=…, accuracy=…, blind=…)`: a number in [0, 1], or {question
        kind: number}; `blind` (images blanked) may be left out.
        """
        if not self.is_main:
            return
        stage = {} if self._stage is None else {"stage": self._stage}
        self._events.write({"event": name, "time": time.time(), **stage, **fields})

    def say(self, text: str) -> None:
        """A line for people: above the progress line on a terminal, else plain."""
        if self.is_main:
            self._console.say(text)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table and append it to tables.jsonl. Cells: strings, numbers or none.

        Raises:
            ValueError: a row has another length than `columns`.
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
        """End the live line and finish every sink; safe to call twice."""
        if not self.is_main:
            return
        self._console.stop()
        for sink in self._sinks:
            self._guarded(sink, sink.close)
        self._sinks = []
        self._metrics.close()
        self._events.close()


def _number(name: str, value: Any) -> float | int:
    """A Python number from a number, a tensor or a numpy scalar."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"metric {name!r} is a {type(value).__name__}, not a number; put texts in `samples`")
    return value
