"""`diagnostics.jsonl`: one record for each stage, step and kind. Figures are drawn from this file alone.

| kind         | fields beside stage, step, kind and time |
|---|---|
| `shares`     | layers [L]; counts [L][2][E] (text, vision); divergence [L] (bits) |
| `logits`     | layers [L]; text, vision: [L][n][E] |
| `similarity` | layers [L]; of: what is compared (such as "weights") to cosines [L][E][E] |

`layers` are the numbers that figures show. A later record of the same stage, step and kind replaces an
earlier one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.diagnose.routing import LogitSample, modality_divergence, normalise
from megatron_evomoe.observe import jsonl

FILE = "diagnostics.jsonl"
LOGIT_DIGITS = 4  # decimals; enough for a density plot, and full precision would triple the file


def write(run_dir: str | Path, stage: str, step: int, kind: str, **data: Any) -> None:
    """Append one record; tensors are written as lists. Call it on one rank only."""
    jsonl.append(
        Path(run_dir) / FILE, {"stage": stage, "step": step, "kind": kind, "time": time.time(), **data}
    )


def read(run_dir: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records in the order written, without replaced ones; those of one `kind` if it is given."""
    latest: dict[tuple[str, int, str], dict[str, Any]] = {}
    for record in jsonl.read(Path(run_dir) / FILE):
        if kind in (None, record["kind"]):
            key = (record["stage"], record["step"], record["kind"])
            latest.pop(key, None)  # so that the replacement is ordered by its own time
            latest[key] = record
    return list(latest.values())


def write_shares(run_dir: str | Path, stage: str, step: int, layers: Sequence[int], counts: Tensor) -> None:
    """Append a `shares` record; `counts` is int64 [L, 2, E], summed over ranks (`ShareCounter.counts`)."""
    write(
        run_dir,
        stage,
        step,
        "shares",
        layers=list(layers),
        counts=counts,
        divergence=modality_divergence(normalise(counts)),
    )


def write_logits(
    run_dir: str | Path, stage: str, step: int, layers: Sequence[int], sample: LogitSample
) -> None:
    """Append a `logits` record; `sample` is already merged over ranks."""

    def rounded(modality: int) -> list[Any]:
        return [
            [[round(x, LOGIT_DIGITS) for x in row] for row in sample.values(i, modality).tolist()]
            for i in range(len(layers))
        ]

    write(
        run_dir,
        stage,
        step,
        "logits",
        layers=list(layers),
        text=rounded(TokenType.TEXT),
        vision=rounded(TokenType.VISION),
    )


def write_similarity(
    run_dir: str | Path, stage: str, step: int, layers: Sequence[int], of: dict[str, Tensor]
) -> None:
    """Append a `similarity` record; `of` maps what is compared (a title in the figure) to [L, E, E]."""
    write(run_dir, stage, step, "similarity", layers=list(layers), of=of)
