"""The order and the index of shards from 10^6 to 10^9 samples: time, memory and disk of a start.

    python benchmarks/index.py --samples 1000000 1000000000 --shards 100000

Real: the order of samples, the table of the shards, the list and a `stat` of all shards, and looking up the
shards of 1000 samples, each in a process of its own. Simulated: the shards are sparse files without bytes,
and the table is written by this program, since to index 10^9 samples takes half a day; no index is mapped and
no member is read. Building an index is measured on real shards of small samples.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from megatron_evomoe.data.order import ARGSORT, NAME, SampleOrder
from megatron_evomoe.data.shard_set import draft_of
from megatron_evomoe.data.shards import ShardDataset, expand_paths, write_shards

_BATCH = 256
_LARGEST_ARGSORT = 10**7


def simulate(folder: Path, samples: int, shards: int) -> None:
    """Sparse shards and their table."""
    folder.mkdir()
    for i in range(shards):
        with open(folder / f"shard-{i:06d}.tar", "wb") as file:
            file.truncate(4096 * (samples // shards))
    draft, (place, *_) = draft_of(expand_paths(str(folder)))
    row = samples // shards, samples // shards, "0" * 32, {}
    draft.with_rows(dict.fromkeys(range(shards), row), folder).save(place)


def pss() -> float:
    """Proportional set size of this process in MiB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def measure_start(folder: str) -> dict[str, float]:
    """A rank's start, in this process: seconds and MiB, of the rank that looks at the files."""
    before, started = pss(), time.perf_counter()
    dataset = ShardDataset(folder)
    seconds = time.perf_counter() - started
    rng = np.random.default_rng(0)
    for i in rng.integers(0, len(dataset), 1000).tolist():
        dataset.shard(i)
    return {"start s": seconds, "start MiB": pss() - before, "whole MiB": pss()}


def measure_order(samples: int, name: str) -> dict[str, float]:
    """Microseconds an index, 256 together, and seconds of an epoch's turn."""
    before, order = pss(), SampleOrder(samples, 1, name=name)
    started = time.perf_counter()
    order.indices(range(_BATCH))
    turn = time.perf_counter() - started
    rounds = 400
    started = time.perf_counter()
    for first in range(0, rounds * _BATCH, _BATCH):
        order.indices(range(first, first + _BATCH))
    each = (time.perf_counter() - started) / (rounds * _BATCH) * 1e6
    return {"us an index": each, "turn s": turn, "order MiB": pss() - before}


def measure_build(folder: Path) -> dict[str, float]:
    """Microseconds a sample of building indexes, and bytes a sample on disk."""
    count = 4000
    turns = [{"from": "human", "value": "What is this?"}, {"from": "gpt", "value": "A digit."}]
    record = {"conversations": turns}
    write_shards([(record, [b"\xff\xd8" + bytes(2000)])] * count, folder, samples_per_shard=1000)
    for path in folder.glob(".*"):
        path.unlink()
    started = time.perf_counter()
    ShardDataset(folder)
    seconds = time.perf_counter() - started
    size = sum(path.stat().st_size for path in folder.glob(".*"))
    return {"build us a sample": seconds / count * 1e6, "bytes a sample": size / count}


def apart(*arguments: str) -> dict[str, float]:
    """The figures of a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, env={**os.environ}
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[10**6, 10**7, 10**8, 10**9])
    parser.add_argument(
        "--shards", type=int, default=100_000, help="the most shards (1000 samples each, or more)"
    )
    parser.add_argument("--start", help=argparse.SUPPRESS)
    parser.add_argument("--order", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        print(json.dumps(measure_start(args.start)))
    elif args.order:
        print(json.dumps(measure_order(int(args.order[0]), args.order[1])))
    else:
        with tempfile.TemporaryDirectory() as folder:
            report(Path(folder), args.samples, args.shards)


def report(folder: Path, sizes: list[int], most: int) -> None:
    print("| samples | shards | figure |\n|---|---|---|")
    for samples in sizes:
        shards = min(most, samples // 1000)
        simulate(folder / str(samples), samples, shards)
        figures = apart("--start", str(folder / str(samples)))
        for name in (NAME, ARGSORT):
            if name == NAME or samples <= _LARGEST_ARGSORT:
                order = apart("--order", str(samples), name)
                figures |= {f"{key} ({name})": value for key, value in order.items()}
        text = ", ".join(f"{key} {value:.3g}" for key, value in figures.items())
        print(f"| {samples:.0e} | {shards} | {text} |", flush=True)
    text = ", ".join(f"{key} {value:.3g}" for key, value in measure_build(folder / "real").items())
    print(f"| 4000, real | 4 | {text} |")


if __name__ == "__main__":
    main()
