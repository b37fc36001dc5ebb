"""Shared by ``--verify`` of both converters: megatron-core's model, and the table of checks.

Both models run in float32 with weights rounded to the written dtype, so that a difference comes from the
models and not from the rounding of activations.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_evomoe.config import RunConfig
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.parallel.single_rank import one_rank

LOGITS = 1e-4
"""Largest accepted difference, relative to the largest value.

Tiny models differ by 3e-6, because sums are computed in another order. The difference grows with width and
depth.
"""
NOTHING = re.compile(r"(?!)")
"""Matches no tensor."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    found: str
    limit: str
    good: bool


def difference(what: str, got: torch.Tensor, wanted: torch.Tensor, limit: float = LOGITS) -> Row:
    """The largest difference of two tensors, relative to the largest value of `wanted`."""
    error = ((got - wanted).abs().max() / wanted.abs().max()).item()
    return Row(f"{what}: largest difference", f"{error:.1e}", f"{limit:.0e} of the largest", error <= limit)


def table(rows: Sequence[Row]) -> str:
    """The rows as text in aligned columns."""
    cells = [
        ("check", "found", "accepted", ""),
        *((r.what, r.found, r.limit, "ok" if r.good else "FAILED") for r in rows),
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


@contextmanager
def core_model(
    checkpoint: Path,
    config: RunConfig,
    kind: str,
    *,
    may_be_fresh: re.Pattern[str] = NOTHING,
    may_be_left: re.Pattern[str] | None = None,
) -> Iterator[Any]:
    """The checkpoint's model in megatron-core on one rank, in float32 and evaluation mode.

    megatron-core itself reads the checkpoint, not the converters.

    Args:
        checkpoint: an ``iter_…`` folder.
        kind: stage kind of the checkpoint.
        may_be_fresh: names of tensors that the checkpoint may lack; they keep their initial values.
        may_be_left: names of tensors that the checkpoint may have and the model lacks.
    """
    with one_rank(config):
        # These import megatron-core, for which `one_rank` prepares the process.
        from megatron_evomoe.checkpoint import store
        from megatron_evomoe.model.build import build_modules

        [model] = build_modules(config, StageKind.ROUTE if kind == StageKind.ROUTE else StageKind.DENSE)
        states, _ = store.load_weights(
            checkpoint,
            [model.sharded_state_dict(metadata=store.metadata())],
            may_be_fresh=may_be_fresh,
            may_be_left=may_be_left,
        )
        model.load_state_dict({k: v for k, v in states[0].items() if torch.is_tensor(v)}, strict=False)
        yield model.eval()
