"""What `inspect-data` says of a whole data set: lengths, padding, unusable samples, duplicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_evomoe.config import ConfigError, RunConfig
from megatron_evomoe.data.batch import Preparer
from megatron_evomoe.data.duplicates import find_duplicates
from megatron_evomoe.data.length_summary import LengthSummary, summarize
from megatron_evomoe.data.lengths import Lengths
from megatron_evomoe.data.order import SampleOrder
from megatron_evomoe.data.progress import Progress
from megatron_evomoe.data.waste import waste
from megatron_evomoe.observe.data_page import Histogram, Table

_STEPS = 50
_READ = 200
"""Samples that are read with their pictures."""
_EXAMPLES = 5
_GROUPS = 20


@dataclass
class DataReport:
    """The report of a data set.

    Attributes:
        order: the order in which a run sees the samples.
        preparer: makes the rows of that run.
        replicas: data-parallel size for which padding is computed.
    """

    config: RunConfig
    lengths: Lengths
    order: SampleOrder
    preparer: Preparer
    replicas: int = 1

    def __post_init__(self) -> None:
        data = self.config.data
        self.summary: LengthSummary = summarize(self.lengths, data.seq_length, data.long_samples)

    def tables(self) -> list[Table]:
        """Lengths, padding, and samples that are left out; computed from the file of lengths alone."""
        return [self._facts(), self._padding(), self._left_out()]

    def parts(self, say: Callable[[str], None]) -> list[Table | Histogram]:
        """Everything, also what needs samples to be read."""
        facts, padding, left_out = self.tables()
        return [facts, self._histogram(), padding, left_out, self._read(), self._duplicates(say)]

    def _facts(self) -> Table:
        return Table(
            "Lengths",
            f"Tokens after template and pictures, {self.preparer.tokens_per_image} for a picture.",
            ("", ""),
            self.summary.facts(),
        )

    def _histogram(self) -> Histogram:
        data = self.config.data
        return Histogram(
            "Tokens of a sample",
            f"{len(self.summary.whole)} usable samples before cutting; the line is seq_length.",
            self.summary.whole,
            data.seq_length,
            f"seq_length {data.seq_length} (longer: {data.long_samples})",
        )

    def _padding(self) -> Table:
        train, data = self.config.train, self.config.data
        count, rows = train.global_batch_size, train.micro_batch_size * self.replicas
        if count % rows:
            raise ConfigError(
                f"--replicas {self.replicas} x micro_batch_size {train.micro_batch_size} must divide "
                f"global_batch_size {count}"
            )
        steps = min(_STEPS, -(-self.order.num_samples // count))
        batches = [
            self.lengths.usable(
                np.array([self.order.index(step * count + i) for i in range(count)]),
                data.seq_length,
                data.long_samples,
            )
            for step in range(steps)
        ]
        found = waste(data, train.micro_batch_size, self.replicas, batches)
        return Table(
            "Padding",
            f"The first {steps} steps: global_batch_size {count}, micro_batch_size {train.micro_batch_size}, "
            f"data-parallel size {self.replicas}; the run has packing {data.packing}.",
            ("packing", "padding", "positions a step", "microbatches a replica", "busiest replica ÷ mean"),
            [
                (
                    one.packing,
                    f"{100 * one.share:.1f} %",
                    f"{one.positions / steps:.0f}",
                    f"{one.microbatches:.1f}",
                    f"{one.imbalance:.3f}",
                )
                for one in found
            ],
        )

    def _left_out(self) -> Table:
        rows = [
            (reason, str(problem.count), self._named(problem.examples))
            for reason, problem in sorted(self.lengths.problems.items(), key=lambda item: -item[1].count)
        ]
        summary = self.summary
        if summary.left_out:
            some = np.flatnonzero(summary.kept == 0)[:_EXAMPLES]
            examples = [(int(summary.samples[at]), f"{summary.whole[at]} tokens") for at in some]
            rows.append(("too-long", str(summary.left_out), self._named(examples)))
        return Table(
            "Left out",
            f"Samples that the text alone makes unusable, of all {summary.total}"
            + (f"; too long ones of {summary.seen} looked at." if summary.is_sampled else ".")
            + ("" if rows else " None."),
            ("reason", "samples", "for example"),
            rows,
        )

    def _named(self, examples: list[tuple[int, str]]) -> str:
        dataset = self.preparer.dataset
        return "; ".join(
            f"{dataset.key(i)} of {dataset.shard(i).name} ({message})" for i, message in examples
        )

    def _read(self) -> Table:
        total = self.order.num_samples
        numbers = np.unique(np.linspace(0, total - 1, min(total, _READ)).astype(np.int64)).tolist()
        counts: Counter[str] = Counter()
        examples: dict[str, list[tuple[int, str]]] = {}
        for i in numbers:
            if (problem := self.preparer.row(i).problem) is not None:
                reason, message = problem
                counts[reason] += 1
                examples.setdefault(reason, []).append((i, message))
        return Table(
            "Samples read with their pictures",
            f"{len(numbers)} of {total}, evenly spread; {counts.total()} of them are unusable.",
            ("reason", "samples", "for example"),
            [(r, str(count), self._named(examples[r][:_EXAMPLES])) for r, count in counts.most_common()],
        )

    def _duplicates(self, say: Callable[[str], None]) -> Table:
        dataset = self.preparer.dataset
        with Progress("comparing samples", "samples", len(dataset), say) as progress:
            found = find_duplicates(dataset, at=progress.at)
        note = f"Samples of equal turns and pictures among {found.compared} of {found.total} samples: "
        note += f"{found.superfluous} could be left out without losing content, in {len(found.groups)} groups"
        if len(found.groups) > _GROUPS:
            note += f", of which the {_GROUPS} largest are listed"
        if found.unread:
            note += (
                f". Pictures of {found.unread} more samples of equal turns were not compared; they are many"
            )
        return Table(
            "Duplicates",
            f"{note}.",
            ("samples", "which"),
            [
                (
                    str(len(group)),
                    "; ".join(f"{dataset.key(i)} of {dataset.shard(i).name}" for i in group[:_EXAMPLES])
                    + (" …" if len(group) > _EXAMPLES else ""),
                )
                for group in found.groups[:_GROUPS]
            ],
        )
