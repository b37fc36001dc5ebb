"""Record -> reduce -> report: what a step measured, kept on its device until somebody asks.

    meter = Meter()
    meter.record("lm loss", loss_sum / tokens, weight=tokens)     # per microbatch; no device sync
    meter.record("learning-rate", lr, reduce="last")
    metrics = meter.flush(gather)                                 # one collective, one sync, then empty

Names are Megatron's where it has one: `lm loss`, `learning-rate`, `grad-norm`, `params-norm`, `batch-size`,
`iteration-time` (s), `throughput` (TFLOP/s/GPU), `tokens/s`, `mem-max-allocated-bytes`,
`load_balancing_loss`, `moe/load_balancing_loss_layer_{i}`, `moe/max_overload_factor`, and ours:
`moe/share_{vision,text}/layer_{i}/expert_{e}`, `moe/expert_similarity_layer_{i}`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Literal

import torch

Reduce = Literal["mean", "sum", "max", "last"]
Number = float | torch.Tensor

_CODE: dict[str, int] = {"mean": 1, "sum": 2, "max": 3, "last": 4}  # 0: this rank did not record the name


class Meter:
    """Accumulates named numbers on one rank; `pack` and `unpack` reduce them over ranks with a single
    all-gather.
    """

    def __init__(self) -> None:
        self._entries: dict[
            str, tuple[Reduce, Number, Number]
        ] = {}  # name -> (kind, value or Σ value·weight, Σ weight)

    def record(self, name: str, value: Number, *, reduce: Reduce = "mean", weight: Number = 1.0) -> None:
        """Add `value` to `name`. Tensors must hold one element; they stay where they are and are not waited
        for.

        reduce: over records and over ranks alike. `mean` is weighted (a mean of no weight is nan); `last`
        takes this
            rank's latest record, and over ranks the first rank's that has one.
        weight: only `mean` uses it.

        Raises:
            ValueError: an unknown `reduce`, another `reduce` than earlier records of this name, or a tensor
                of many elements.
        """
        if reduce not in _CODE:
            raise ValueError(f"metric {name!r}: reduce={reduce!r} is not one of {', '.join(_CODE)}")
        value, weight = _scalar(name, value), _scalar(name, weight)
        if reduce == "mean":
            value = _weighted(value, weight)
        old = self._entries.get(name)
        if old is not None:
            if old[0] != reduce:
                raise ValueError(
                    f"metric {name!r} was recorded with reduce={old[0]!r} and now with {reduce!r}; use one "
                    "of them"
                )
            if reduce == "max":
                value = _larger(old[1], value)
            elif reduce != "last":
                value = old[1] + value
            weight = old[2] + weight
        self._entries[name] = (reduce, value, weight)

    def pack(self, names: Sequence[str] | None = None) -> tuple[list[str], torch.Tensor]:
        """All entries as one float64 tensor [1 + n, 3] (kind, value, weight), on the device of the recorded
        tensors.

        The first row is a checksum of the names, so that ranks with other names are noticed and not mixed up.
        Ranks that record different names (pipeline stages) pass the union of them as `names`; what a rank
        lacks does not count.
        """
        names = sorted(self._entries) if names is None else list(names)
        rows: list[Number] = [0.0, float(zlib.crc32("\n".join(names).encode())), 0.0]
        for name in names:
            kind, value, weight = self._entries.get(name, (None, 0.0, 0.0))
            rows += [float(_CODE[kind]) if kind else 0.0, value, weight]
        device = next(
            (r.device for r in rows if isinstance(r, torch.Tensor) and r.device.type != "cpu"),
            torch.device("cpu"),
        )
        # one copy for all plain numbers, then one write per tensor: no value is read back here
        flat = torch.tensor(
            [0.0 if isinstance(r, torch.Tensor) else r for r in rows], dtype=torch.float64, device=device
        )
        for i, row in enumerate(rows):
            if isinstance(row, torch.Tensor):
                flat[i] = row
        return names, flat.view(-1, 3)

    def flush(self, gather: Callable[[torch.Tensor], torch.Tensor] | None = None) -> dict[str, float]:
        """The reduced values; the meter is empty afterwards. The only place that waits for the device.

        gather: [1 + n, 3] -> [ranks, 1 + n, 3], the caller's all-gather; none reduces this rank alone.
        """
        names, packed = self.pack()
        self.reset()
        return unpack(names, gather(packed) if gather is not None else packed[None])

    def reset(self) -> None:
        """Forget everything recorded."""
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)


def unpack(names: Sequence[str], gathered: torch.Tensor) -> dict[str, float]:
    """Reduce what `pack` made on each rank: float64 [ranks, 1 + n, 3] (or one rank's [1 + n, 3]) -> name to
    value.

    Names that no rank recorded are left out.

    Raises:
        ValueError: the ranks did not pack the same names, or disagree on how one is reduced.
    """
    ranks = (gathered[None] if gathered.dim() == 2 else gathered).tolist()
    checksum = float(zlib.crc32("\n".join(names).encode()))
    if any(len(rows) != len(names) + 1 or rows[0][1] != checksum for rows in ranks):
        raise ValueError(
            f"ranks packed different metric names than this one's {list(names)}; give pack() the union of "
            "the names"
        )
    out = {}
    for i, name in enumerate(names, start=1):
        rows = [r[i] for r in ranks if r[i][0] != 0]
        if not rows:
            continue
        kinds = {int(kind) for kind, _, _ in rows}
        if len(kinds) > 1:
            raise ValueError(
                f"metric {name!r} is reduced in different ways on different ranks (codes {sorted(kinds)})"
            )
        out[name] = _reduce(kinds.pop(), [v for _, v, _ in rows], [w for _, _, w in rows])
    return out


def _reduce(code: int, values: list[float], weights: list[float]) -> float:
    if code == _CODE["mean"]:
        total = math.fsum(weights)
        return sum(values) / total if total else math.nan
    if code == _CODE["sum"]:
        return sum(values)
    if code == _CODE["max"]:
        return (
            math.nan if any(math.isnan(v) for v in values) else max(values)
        )  # max() would depend on the order of a nan
    return values[0]


def _scalar(name: str, value: Number) -> Number:
    """float64 on its own device: sums of thousands of bf16 losses would lose digits otherwise."""
    if not isinstance(value, torch.Tensor):
        return float(value)
    if value.numel() != 1:
        raise ValueError(
            f"metric {name!r} got a tensor of shape {tuple(value.shape)}; record one number (its mean or sum)"
        )
    return (
        value.detach().reshape(()).to(torch.float64, copy=True)
    )  # a copy: the caller may overwrite its buffer


def _weighted(value: Number, weight: Number) -> Number:
    """value · weight, but 0 for no weight: the mean over no tokens is nan and must not poison the others."""
    if isinstance(weight, torch.Tensor):
        product = value * weight
        return torch.where(weight.to(product.device) == 0, torch.zeros_like(product), product)
    return value * weight if weight else 0.0


def _larger(a: Number, b: Number) -> Number:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        like = a if isinstance(a, torch.Tensor) else b
        return torch.maximum(
            torch.as_tensor(a, dtype=torch.float64, device=like.device),
            torch.as_tensor(b, dtype=torch.float64, device=like.device),
        )
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)
