"""`diagnostics.jsonl`: one record per (stage, step, kind); figures are drawn from it alone, long after the
run.

| kind         | fields beside stage, step, kind and time |
|---|---|
| `shares`     | layers [L]; counts [L][2][E] (text, vision); divergence [L] (bits) |
| `logits`     | layers [L]; text, vision: [L][n][E] |
| `similarity` | layers [L]; of ("weights", "difference from …", "outputs", …) -> [L][E][E] |
| `shuffle`    | accuracy; shuffled: accuracies of the draws; mode |

`layers` are numbers to show, as the caller counts them. Later records of the same (stage, step, kind) replace
earlier ones.
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
LOGIT_DIGITS = 4  # decimals; a density needs no more, and full precision triples the file


def write(run_dir: str | Path, stage: str, step: int, kind: str, **data: Any) -> None:
    """Append one record. Tensors become lists. One rank only."""
    jsonl.append(
        Path(run_dir) / FILE, {"stage": stage, "step": step, "kind": kind, "time": time.time(), **data}
    )


def read(run_dir: str | Path, kind: str | None = None, stage: str | None = None) -> list[dict[str, Any]]:
    """Records in the order written, without replaced ones; of one `kind` or `stage` when given."""
    latest: dict[tuple[str, int, str], dict[str, Any]] = {}
    for record in jsonl.read(Path(run_dir) / FILE):
        if kind in (None, record["kind"]) and stage in (None, record["stage"]):
            key = (record["stage"], record["step"], record["kind"])
            latest.pop(key, None)  # so that the replacement takes its own place in the order
            latest[key] = record
    return list(latest.values())


def write_shares(run_dir: str | Path, stage: str, step: int, layers: Sequence[int], counts: Tensor) -> None:
    """counts: int64 [L, 2, E], summed over ranks (`ShareCounter.counts`)."""
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
    """sample: merged over ranks."""

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
    """of: what is compared -> [L, E, E]; the names become row titles of the figure, in this order."""
    write(run_dir, stage, step, "similarity", layers=list(layers), of=of)
