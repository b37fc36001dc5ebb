"""`python -m megatron_evomoe`, with one thing more: a gradient that turns NaN on rank 1 when a file asks for it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from megatron_evomoe import cli


def poison_when_asked(trigger: Path) -> None:
    """Wrap the loop's step: once `trigger` exists, rank 1's share of the reduced gradient is NaN for one step."""
    from megatron_evomoe.parallel import backend

    backend.prepare()
    from megatron_evomoe.train import loop

    original = loop.take_step

    def take_step(built: Any, batch: Any, number: int) -> Any:
        if os.environ["RANK"] == "1" and trigger.exists():
            trigger.unlink()
            update = built.optimizer.step

            def poisoned() -> Any:
                for part in getattr(built.optimizer, "chained_optimizers", [built.optimizer]):
                    for buffer in getattr(part, "buffers", []):
                        buffer.grad_data.fill_(float("nan"))
                return update()

            built.optimizer.step = poisoned
        return original(built, batch, number)

    loop.take_step = take_step


if __name__ == "__main__":
    poison_when_asked(Path(os.environ["CHAOS_TRIGGER"]))
    sys.exit(cli.main(sys.argv[1:]))
