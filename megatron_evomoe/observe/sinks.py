"""TensorBoard and wandb with one interface: `start_stage`, `log`, `close`. Both are imported only if used."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any


class TensorBoardSink:
    """One TensorBoard run per stage (`tensorboard_dir/STAGE`), so that stages share their tags."""

    def __init__(self, directory: str | Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RuntimeError(
                f"tensorboard_dir is set but TensorBoard does not import ({error}); "
                "pip install tensorboard, or unset --tensorboard-dir"
            ) from error
        self._make, self._directory = SummaryWriter, Path(directory)
        self._writer: SummaryWriter | None = None

    def start_stage(self, name: str, start_step: int) -> None:
        """Open a writer for the stage. TensorBoard hides what an interrupted run wrote after `start_step`."""
        self.close()
        self._writer = self._make(str(self._directory / name), purge_step=start_step + 1)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Write every number under its name."""
        assert self._writer is not None, "start_stage comes before log"
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is buffered."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandbSink:
    """One wandb run for all stages.

    Metrics are `STAGE/name` over `STAGE/step`, because each stage counts its steps from 1.
    """

    def __init__(
        self,
        *,
        project: str,
        entity: str | None,
        name: str | None,
        config: dict[str, Any],
        directory: Path,
        run_id: str | None,
    ):
        try:
            import wandb
        except ImportError as error:
            raise RuntimeError(
                f"wandb_project is set but wandb does not import ({error}); "
                "pip install wandb, or unset --wandb-project"
            ) from error
        self.run_id = run_id or new_run_id()
        directory.mkdir(parents=True, exist_ok=True)
        # console off: wandb's capture of stdout would garble the live progress line
        self._run = wandb.init(
            project=project,
            entity=entity,
            name=name,
            id=self.run_id,
            resume="allow",
            config=config,
            dir=str(directory),
            settings=wandb.Settings(console="off"),
        )
        self._stage = ""

    def start_stage(self, name: str, start_step: int) -> None:
        """Make `name/step` the x axis of everything under `name/`."""
        self._stage = name
        self._run.define_metric(f"{name}/step", hidden=True)
        self._run.define_metric(f"{name}/*", step_metric=f"{name}/step")

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Send every number under the current stage."""
        self._run.log({f"{self._stage}/step": step, **{f"{self._stage}/{k}": v for k, v in numbers.items()}})

    def close(self) -> None:
        """Finish the run; the same id resumes it."""
        self._run.finish()


def new_run_id() -> str:
    """A new run's id: eight characters that wandb accepts."""
    return secrets.token_hex(4)
