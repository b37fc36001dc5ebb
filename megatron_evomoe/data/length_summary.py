"""What the lengths of a data set mean for a run: how many samples fit, are cut, or are left out, and why."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_evomoe.data.lengths import Lengths
from megatron_evomoe.data.lengths_file import Problem

_MOST = 1_000_000


@dataclass
class LengthSummary:
    """The lengths of n usable samples.

    Attributes:
        total: all samples of the data set.
        samples: int64 [n], their numbers.
        whole: int32 [n], their tokens before cutting.
        kept: int32 [n], tokens that training keeps of them, 0 where one is left out for its length.
        seen: samples that were looked at, n and unusable ones.
        problems: unusable samples of the whole data set, by reason.
    """

    total: int
    samples: np.ndarray
    whole: np.ndarray
    kept: np.ndarray
    seen: int
    problems: dict[str, Problem]

    @property
    def is_sampled(self) -> bool:
        """Whether only every so many-th sample was looked at."""
        return self.seen < self.total

    @property
    def unusable(self) -> int:
        """Samples of the data set that are unusable at any length."""
        return sum(problem.count for problem in self.problems.values())

    @property
    def left_out(self) -> int:
        """Samples among those seen that are left out for their length."""
        return int(np.count_nonzero(self.kept == 0))

    @property
    def cut(self) -> int:
        """Samples among those seen that are cut."""
        return int(np.count_nonzero((self.kept > 0) & (self.kept < self.whole)))

    def facts(self) -> list[tuple[str, str]]:
        """Names and values for a table."""
        share = f" of {self.seen} looked at, evenly spread" if self.is_sampled else ""
        facts = [
            ("samples", str(self.total)),
            ("unusable at any length", str(self.unusable)),
            ("left out as too long", f"{self.left_out}{share}"),
            ("cut", f"{self.cut}{share}"),
        ]
        if len(self.whole):
            middle, p95, p99 = np.percentile(self.whole, [50, 95, 99]).round().astype(int).tolist()
            facts += [
                ("tokens of a sample, mean", f"{self.whole.mean():.0f}"),
                ("median, 95 %, 99 %, longest", f"{middle}, {p95}, {p99}, {self.whole.max()}"),
                (
                    "tokens that are kept, mean",
                    f"{self.kept[self.kept > 0].mean():.0f}" if self.kept.any() else "0",
                ),
            ]
        return facts


def summarize(lengths: Lengths, seq_length: int, long_samples: str, *, most: int = _MOST) -> LengthSummary:
    """Summarise the lengths of a data set, or of `most` evenly spread samples of a larger one."""
    total = len(lengths)
    samples = np.unique(np.linspace(0, total - 1, min(total, most)).astype(np.int64))
    whole = lengths[samples]
    usable = whole > 0
    kept = lengths.usable(samples[usable], seq_length, long_samples)
    return LengthSummary(total, samples[usable], whole[usable], kept, len(samples), lengths.problems)
