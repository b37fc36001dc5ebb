"""This project's loader against others that read the same shards.

    python benchmarks/loader.py                       # both ways to make a square, 7 rounds
    python benchmarks/loader.py --rounds 11 --aspect-ratio square --tokenizer path/to/tokenizer
    python benchmarks/loader.py --tiny                # shows that the script works

Samples are made: a JPEG of 640 x 480 that becomes 336 x 336 pixels, and three turns of text. Each loader
(`loader_peers.py`) runs in a process of its own, with worker processes, and all take turns, so that other
load on the machine slows all alike. Before each turn's measurement, the loader runs until what was prepared
while it waited is used up; after it, until its workers have prepared as much again. A loader whose package is
not installed is named and left out. The figures are medians over the rounds:

* images/s, while nothing is done with the batches;
* CPU time a sample, of all processes, and of the training process (the one that takes the batches) alone;
* memory of all its processes together (PSS; libraries' pages count fully, whoever else has them mapped).

At last, the parts of a sample's work are timed alone, in one process.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import loader_peers  # noqa: E402
import measure  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from loader_peers import ENERGON, LOADERS, PROJECT, TEMPLATE, TOKENS_PER_IMAGE, Job  # noqa: E402

from megatron_evomoe.data.conversation import EncodedSample, encode  # noqa: E402
from megatron_evomoe.data.image import decode_image  # noqa: E402
from megatron_evomoe.data.shards import ShardDataset, write_shards  # noqa: E402
from megatron_evomoe.data.tokenizer import Tokenizer, build_tokenizer, train_sentencepiece  # noqa: E402

VOCABULARY = 4000
_IDLE = 5  # tenths of a second in which workers did nothing


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=40, help="measured in a round")
    parser.add_argument("--batch", type=int, default=16, help="samples")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--prefetch", type=int, default=4, help="batches that each worker prepares ahead")
    parser.add_argument("--samples", type=int, default=1024, help="in the shards")
    parser.add_argument("--aspect-ratio", nargs="+", choices=["square", "pad"], default=["square", "pad"])
    parser.add_argument("--loaders", nargs="+", choices=list(LOADERS), default=list(LOADERS))
    parser.add_argument("--tokenizer", type=Path, help="one to use instead of the one that is trained")
    parser.add_argument("--tiny", action="store_true", help="batches of 2, one round: plumbing only")
    parser.add_argument("--serve", nargs=2, metavar=("LOADER", "JOB"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tiny:
        args.rounds, args.batches, args.batch, args.samples = 1, 2, 2, 16
    return args


class Served:
    """A loader in a process of its own."""

    def __init__(self, name: str, job: Job) -> None:
        """Start it. Raises `ModuleNotFoundError` if its package is not installed."""
        command = [sys.executable, __file__, "--serve", name, json.dumps(asdict(job))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self.take(1, 1)
        except BaseException:
            self.close()
            raise

    def take(self, unmeasured: int, measured: int) -> dict[str, float]:
        """Take batches. Returns seconds, CPU seconds (of all, of the training process) and memory in MiB."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(unmeasured, measured, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} ended; its error stands above")
        answer = json.loads(line)
        if "missing" in answer:
            raise ModuleNotFoundError(answer["missing"])
        return answer

    def close(self) -> None:
        """End the process and its workers."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def serve(name: str, job: Job) -> None:
    """Take as many batches as each line of the input says, and print what that cost."""
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr  # loaders print too
    try:
        batches = LOADERS[name](job)
    except ModuleNotFoundError as error:
        print(json.dumps({"missing": str(error)}), file=answers, flush=True)
        return
    for line in sys.stdin:
        unmeasured, measured = map(int, line.split())
        print(json.dumps(taken(batches, unmeasured, measured)), file=answers, flush=True)


def taken(batches: Iterator[Any], unmeasured: int, measured: int) -> dict[str, float]:
    """What it costs to take `measured` batches, after `unmeasured` others."""
    for _ in range(unmeasured):
        next(batches)
    workers, own = psutil.Process().children(recursive=True), time.process_time()
    theirs, start = _cpu_seconds(workers), time.perf_counter()
    for _ in range(measured):
        next(batches)
    seconds, own = time.perf_counter() - start, time.process_time() - own
    cpu = own + _cpu_seconds(workers) - theirs
    _wait_until_idle(workers)
    return {
        "seconds": seconds,
        "cpu": cpu,
        "own_cpu": own,
        "mib": memory([psutil.Process(), *workers]) / 2**20,
    }


def _wait_until_idle(workers: Iterable[psutil.Process]) -> None:
    """Wait until batches are prepared ahead, because that work would slow the loader whose turn is next."""
    before, idle = _cpu_seconds(workers), 0
    while idle < _IDLE:
        time.sleep(0.1)
        now = _cpu_seconds(workers)
        idle = idle + 1 if now - before < 0.02 else 0
        before = now


def _cpu_seconds(processes: Iterable[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def memory(processes: Iterable[psutil.Process]) -> int:
    """Bytes of memory that these processes take together.

    It is their PSS, except that pages of files are not divided among other processes than these: each mapping
    of a file counts once, with the pages of the process that has most of them.
    """
    files: dict[tuple[str, str], int] = {}
    total = 0
    for process in processes:
        rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        sizes = {line.split(":")[0]: line.split()[1] for line in rollup[1:]}
        total += (int(sizes["Pss_Anon"]) + int(sizes["Pss_Shmem"])) * 1024
        for mapping in process.memory_maps(grouped=False):
            # shared memory has such names too
            if mapping.path.startswith("/") and not mapping.path.startswith(("/dev/", "/memfd:", "/SYSV")):
                at = (mapping.path, mapping.addr)
                files[at] = max(files.get(at, 0), mapping.rss - mapping.anonymous)
    return total + sum(files.values())


def compared(args: argparse.Namespace, job: Job) -> tuple[dict[str, list[dict[str, float]]], dict[str, str]]:
    """The figures of each loader in each round; and why loaders were left out."""
    served: dict[str, Served] = {}
    missing: dict[str, str] = {}
    try:
        for name in args.loaders:
            try:
                served[name] = Served(name, job)
            except ModuleNotFoundError as error:
                missing[name] = str(error)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in served}
        ahead = args.workers * args.prefetch + args.workers
        for number in range(args.rounds):
            for i in range(len(served)):
                name = list(served)[(i + number) % len(served)]
                found[name].append(served[name].take(ahead, args.batches))
        return found, missing
    finally:
        for loader in served.values():
            loader.close()


def rows(args: argparse.Namespace, job: Job, found: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    """A line of the table for each loader."""
    samples = args.batches * args.batch
    lines = []
    for name, rounds in found.items():
        median = {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}
        times = [
            theirs["seconds"] / ours["seconds"]
            for theirs, ours in zip(rounds, found.get(PROJECT, []), strict=False)
        ]
        lines.append(
            [
                job.aspect_ratio,
                name,
                measure.shown(samples / median["seconds"], ".0f"),
                measure.shown(statistics.median(times) if times else None, ".2f"),
                measure.shown(median["cpu"] / samples, ".2f", 1e3),
                measure.shown(median["own_cpu"] / samples, ".3f", 1e3),
                measure.shown(median["mib"], ".0f"),
            ]
        )
    return lines


def parts(args: argparse.Namespace, job: Job) -> list[str]:
    """Milliseconds a sample of each part of the work, in this process."""
    dataset, tokenizer, processor = ShardDataset(job.shards), build_tokenizer(job.tokenizer), job.processor()
    samples = range(min(len(dataset), 128))
    stored = [dataset.read(i) for i in samples]
    pixels = [decode_image(sample.images[0]) for sample in stored[:32]]
    actions: dict[str, Callable[[], Any]] = {
        "read": lambda: [(dataset.record(i), dataset.images(i)) for i in samples],
        "decode": lambda: [decode_image(sample.images[0]) for sample in stored],
        "resize": lambda: [processor(pixels[i % len(pixels)]) for i in samples],
        "text": lambda: [encoded(sample.record, tokenizer) for sample in stored],
    }
    seconds = measure.alternate(actions, args.rounds, clock=time.process_time)
    each = {name: 1e3 * statistics.median(found) / len(samples) for name, found in seconds.items()}
    return [job.aspect_ratio, *(f"{ms:.2f}" for ms in each.values()), f"{sum(each.values()):.2f}"]


def prepare(args: argparse.Namespace, folder: Path) -> tuple[Path, Path, float]:
    """Shards and a tokenizer in `folder`; and the mean number of tokens."""
    lines = [
        line.strip() for path in sorted(ROOT.glob("docs/*.md")) for line in path.read_text().splitlines()
    ]
    lines = [line for line in lines if line and "<" not in line and "[" not in line]
    tokenizer = args.tokenizer or train_sentencepiece(lines, folder / "sp.model", VOCABULARY)
    pictures = loader_peers.made_pictures(min(args.samples, 64))
    samples = loader_peers.made_samples(args.samples, " ".join(lines).split(), pictures)
    shards = folder / "shards"
    write_shards(samples, shards, samples_per_shard=-(-args.samples // 8))
    if ENERGON in args.loaders:
        _prepare_energon(shards)
    dataset, built = ShardDataset(shards), build_tokenizer(tokenizer)
    counts = [len(encoded(dataset.record(i), built).tokens) for i in range(min(len(dataset), 128))]
    return shards, tokenizer, statistics.mean(counts)


def encoded(record: dict[str, Any], tokenizer: Tokenizer) -> EncodedSample:
    """The text of a record, as all loaders encode it."""
    return encode(record["conversations"], 1, tokenizer, TEMPLATE, TOKENS_PER_IMAGE)


def _prepare_energon(shards: Path) -> None:
    if importlib.util.find_spec("megatron.energon") is None:
        return  # the loader itself says what is missing
    program = Path(sys.executable).parent / "energon"
    options = ["--non-interactive", "--no-progress", "--sample-type", "CrudeWebdataset"]
    command = [program, "prepare", shards, *options, "--split-ratio", "1,0,0"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    args = parse_args()
    if args.serve:
        serve(args.serve[0], Job(**json.loads(args.serve[1])))
        return
    torch.set_num_threads(1)
    lines, single, missing = [], [], {}
    with tempfile.TemporaryDirectory() as folder:
        shards, tokenizer, tokens = prepare(args, Path(folder))
        for aspect_ratio in args.aspect_ratio:
            job = Job(
                shards=str(shards),
                tokenizer=str(tokenizer),
                aspect_ratio=aspect_ratio,
                batch=args.batch,
                workers=args.workers,
                prefetch=args.prefetch,
            )
            found, absent = compared(args, job)
            missing |= absent
            lines += rows(args, job, found)
            single.append(parts(args, job))
    c = measure.circumstances()
    print(
        f"`{c['command']}`, {c['device']}, torch {c['versions']['torch']}; {tokens:.0f} tokens a sample, "
        f"batch {args.batch}, {args.workers} workers, {args.rounds} rounds\n"
    )
    header = ["square by", "loader", "images/s", "ours is faster by", "CPU ms a sample", "of it in training"]
    print(measure.table([*header, "MiB"], lines), "\n")
    print(measure.table(["square by", "read ms", "decode", "resize", "text", "sum"], single))
    for name, reason in missing.items():
        print(f"\nleft out: {name}: {reason}")


if __name__ == "__main__":
    main()
