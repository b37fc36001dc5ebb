"""`python -m megatron_evomoe` with injected faults.

A trigger file names the fault and the rank that has it; the fault lasts as long as the file exists. Examples:

{"rank": 1, "kind": "nan"}                                      a gradient that turns NaN, once
{"rank": 0, "kind": "write", "files": "common.pt*", "errno": 28}  files that cannot be written
{"rank": 1, "kind": "raise", "where": "build_stage"}  MemoryError out of a function of the training loop
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_evomoe import cli
from tests.faults import failing, matching


def asked(trigger: Path, kind: str) -> dict[str, Any] | None:
    """The fault of `kind` that the trigger file asks of this rank now, or None."""
    try:
        fault = json.loads(trigger.read_text())
    except (OSError, ValueError):  # there is no file, or it is being written
        return None
    return fault if fault["kind"] == kind and str(fault["rank"]) == os.environ["RANK"] else None


def add_faults(trigger: Path) -> None:
    """Wrap functions that the training loop calls, in the modules that call them, so that they can fail."""
    from megatron_evomoe.parallel import backend

    backend.prepare()
    import megatron_evomoe.config
    from megatron_evomoe.checkpoint import store
    from megatron_evomoe.train import beginning, held_out, loop, stage_run

    modules = {
        loop: ["open_session", "take_step"],
        beginning: ["build_stage"],
        stage_run: ["train_loader", "next_step"],
        held_out: ["questions"],
        store: ["_load"],
        megatron_evomoe.config: ["load_config"],
    }
    for module, names in modules.items():
        for name in names:
            setattr(module, name, with_faults(name, getattr(module, name), trigger))


def with_faults(name: str, original: Callable[..., Any], trigger: Path) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        fault = asked(trigger, "raise")
        if fault is not None and fault["where"] == name:
            raise MemoryError(f"injected into {name}")
        if name == "take_step" and asked(trigger, "nan"):
            trigger.unlink()
            poison(args[0].optimizer)
        return original(*args, **kwargs)

    return wrapped


def poison(optimizer: Any) -> None:
    """Set this rank's shard of the reduced gradient to NaN before the next update."""
    update = optimizer.step

    def poisoned() -> Any:
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            for buffer in getattr(part, "buffers", []):
                buffer.grad_data.fill_(float("nan"))
        return update()

    optimizer.step = poisoned


def main() -> int:
    trigger = Path(os.environ["CHAOS_TRIGGER"])
    add_faults(trigger)

    def fault(name: str) -> int:
        found = asked(trigger, "write")
        return matching(found["files"], found["errno"])(name) if found else 0

    with failing(fault, Path(os.environ["CHAOS_SAVE"])):
        return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
