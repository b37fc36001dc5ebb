"""``make-shards``: writes webdataset shards of a LLaVA JSON file and a directory of images.

Shard k holds the usable records among the input records [k·N, (k+1)·N), with their numbers as keys. Shards do
not depend on each other, so they are written in parallel, and a killed run can be continued: it writes the
missing shards, and the result has the same bytes. report.json lists the skipped records and the reasons.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from megatron_evomoe.config import ConfigError
from megatron_evomoe.data.conversation import parse_turns
from megatron_evomoe.data.errors import SampleError
from megatron_evomoe.data.files import write_atomically
from megatron_evomoe.data.image import decode_image
from megatron_evomoe.data.media import short
from megatron_evomoe.data.sample_record import MAX_RECORD_BYTES, image_names, load_json, usable_record
from megatron_evomoe.data.shard_index import load_index
from megatron_evomoe.data.shards import tar_bytes
from megatron_evomoe.data.workers import die_with_parent

_PROGRESS = ".make-shards"
_EXAMPLES_PER_REASON = 3


@dataclass(frozen=True)
class Job:
    """Everything that the output depends on; a directory that was begun with another job is not continued."""

    json: str
    json_sha256: str
    images: str
    samples_per_shard: int
    max_image_pixels: int


def make_shards(
    json_path: Path,
    images: Path | None,
    output: Path,
    *,
    samples_per_shard: int,
    workers: int,
    max_image_pixels: int,
) -> int:
    """Write the shards that are missing in `output`, and then the report.

    Args:
        json_path: LLaVA JSON, or JSON lines if its name ends in ``.jsonl``.
        images: directory to which image paths are relative; None for text only.
        output: directory for ``shard-000000.tar`` … and ``report.json``.
        samples_per_shard: input records per shard.
        workers: processes.
        max_image_pixels: images with more pixels are skipped.

    Returns:
        The number of usable records.

    Raises:
        ConfigError: the input cannot be read, the directory belongs to another job, or a worker was killed.
    """
    console = Console()
    records, digest = _load(json_path)
    if images is not None and not images.is_dir():
        raise ConfigError(f"--images {images} is not a directory")
    job = Job(
        str(json_path.resolve()),
        digest,
        str(images.resolve()) if images else "",
        samples_per_shard,
        max_image_pixels,
    )
    _open_output(output, job)
    total = -(-len(records) // job.samples_per_shard)
    missing = [shard for shard in range(total) if not _is_done(output, shard)]
    if len(missing) < total:
        console.print(f"continuing: {total - len(missing)} of {total} shards exist")
    _write_missing(records, missing, output, job, workers, console)
    report = _report(output, job, len(records), total)
    _print(report, output, console)
    return report["written"]


def _load(path: Path) -> tuple[list[Any], str]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--json {path} cannot be read: {error.strerror or error}") from None
    try:
        lines = data.splitlines() if path.suffix == ".jsonl" else None
        records = load_json(data) if lines is None else [load_json(line) for line in lines if line.strip()]
    except SampleError as error:
        raise ConfigError(f"--json {path} is not valid JSON: {error.message}") from None
    if not isinstance(records, list) or not records:
        raise ConfigError(
            f"--json {path} must be a list of records and not empty, got {type(records).__name__}"
        )
    return records, hashlib.sha256(data).hexdigest()


def _open_output(output: Path, job: Job) -> None:
    (output / _PROGRESS).mkdir(parents=True, exist_ok=True)
    # temporary files of a killed run
    for left_over in (*output.glob(".*.tmp"), *(output / _PROGRESS).glob(".*.tmp")):
        left_over.unlink(missing_ok=True)
    begun = output / _PROGRESS / "job.json"
    if begun.exists():
        before = json.loads(begun.read_text())
        changed = [
            f"{name} {before.get(name)!r} -> {value!r}"
            for name, value in asdict(job).items()
            if before.get(name) != value
        ]
        if changed:
            raise ConfigError(
                f"{output} was begun with other arguments ({'; '.join(changed)}); use those, or another "
                "directory"
            )
    elif any(output.glob("*.tar")):
        raise ConfigError(f"{output} holds shards of another origin; use an empty directory")
    else:
        write_atomically(begun, json.dumps(asdict(job), indent=1).encode())


def _shard_path(output: Path, shard: int) -> Path:
    return output / f"shard-{shard:06d}.tar"


def _notes_path(output: Path, shard: int) -> Path:
    return output / _PROGRESS / f"{shard:06d}.json"


def _is_done(output: Path, shard: int) -> bool:
    """Whether a shard is complete.

    Its notes are written after its tar and hold the size of the tar, which is 0 if all records were skipped.
    """
    try:
        size = json.loads(_notes_path(output, shard).read_text())["tar_bytes"]
        return size == 0 or _shard_path(output, shard).stat().st_size == size
    except (OSError, ValueError, KeyError):
        return False


def _write_missing(
    records: list[Any], missing: list[int], output: Path, job: Job, workers: int, console: Console
) -> None:
    n = job.samples_per_shard
    columns = (
        TextColumn("make-shards"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("records, {task.fields[skipped]} skipped"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=sum(len(records[k * n : (k + 1) * n]) for k in missing), skipped=0)
        skipped = 0
        for done, bad in _in_parallel(
            ((records[k * n : (k + 1) * n], k, output, job) for k in missing), workers
        ):
            skipped += bad
            progress.update(task, advance=done, skipped=skipped)


def _in_parallel(work: Iterator[tuple], workers: int) -> Iterator[tuple[int, int]]:
    """The results of `write_shard` in the order in which they finish.

    At most 2 shards for each worker wait in the queue, so that a large input is not copied into it.
    """
    if workers == 1:
        yield from (write_shard(*item) for item in work)
        return
    with ProcessPoolExecutor(workers, initializer=die_with_parent) as pool:
        running: set[Future] = set()
        try:
            for item in work:
                running.add(pool.submit(write_shard, *item))
                if len(running) >= 2 * workers:
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in finished)
            while running:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        except BrokenProcessPool:
            raise ConfigError(
                "a worker was killed (out of memory?); run the same command again, with fewer --workers"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def write_shard(records: list[Any], shard: int, output: Path, job: Job) -> tuple[int, int]:
    """Write one shard, its index and its notes; returns the numbers of records and of skipped records."""
    samples, skipped = [], []
    for number, record in enumerate(records, start=shard * job.samples_per_shard):
        try:
            samples.append((f"{number:09d}", *_sample(record, job)))
        except SampleError as error:
            identity = _identity(record)
            skipped.append(
                {"record": number, "id": identity, "reason": error.reason, "message": error.message}
            )
    path, data = _shard_path(output, shard), tar_bytes(samples) if samples else b""
    if data:
        write_atomically(path, data)
        load_index(path)
    notes = {"records": len(records), "written": len(samples), "tar_bytes": len(data), "skipped": skipped}
    # after the tar, which is on disk by now
    write_atomically(_notes_path(output, shard), json.dumps(notes).encode(), sync=False)
    return len(records), len(skipped)


def _identity(record: Any) -> str | int | None:
    """The `id` of a record, shortened if it would not fit into a line of the report."""
    found = record.get("id") if isinstance(record, dict) else None
    is_plain = (
        found is None
        or isinstance(found, int)
        or (isinstance(found, str) and found.isprintable() and len(found) <= 200)
    )
    return found if is_plain else short(found)


def _sample(record: Any, job: Job) -> tuple[dict[str, Any], list[bytes]]:
    """A record and the bytes of its images. Raises `SampleError` if one of them is unusable."""
    if not isinstance(record, dict):
        raise SampleError("no-conversation", f"record is a {type(record).__name__}")
    _check_storable(record)
    names = image_names(record)
    turns = parse_turns(usable_record(record, len(names))["conversations"], len(names))
    if not any(turn.role == "gpt" for turn in turns):
        raise SampleError("no-conversation", "no gpt turn, so nothing to learn from")
    images = [_image_bytes(name, job.images) for name in names]
    for name, data in zip(names, images, strict=True):
        try:
            decode_image(data, job.max_image_pixels)
        except SampleError as error:
            raise SampleError(error.reason, f"{name}: {error.message}") from None
    return record, images


def _check_storable(record: dict[str, Any]) -> None:
    try:
        size = len(json.dumps(record, ensure_ascii=False).encode())
    except (ValueError, RecursionError) as error:
        raise SampleError("bad-text", f"the record cannot be written as JSON in UTF-8: {error}") from None
    if size > MAX_RECORD_BYTES:
        raise SampleError(
            "record-too-large", f"{size} bytes; at most {MAX_RECORD_BYTES} are read from a shard"
        )


def _image_bytes(name: Any, folder: str) -> bytes:
    if isinstance(name, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", name):
        raise SampleError(
            "image-url",
            f"{name[:80]!r} is a URL; only files of the image directory are read, so download it first",
        )
    if not isinstance(name, str) or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise SampleError("image-path", f"{short(name)} must be a path inside the image directory")
    if not folder:
        raise SampleError("missing-image", f"{name}: no --images directory was given")
    try:
        path = Path(folder) / name
        if path.exists() and not path.is_file():  # reading a pipe could block
            raise SampleError("missing-image", f"{name}: not a file")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise SampleError("missing-image", f"{name}: {getattr(error, 'strerror', None) or error}") from None


def _report(output: Path, job: Job, records: int, shards: int) -> dict[str, Any]:
    notes = [json.loads(_notes_path(output, shard).read_text()) for shard in range(shards)]
    skipped = [entry for note in notes for entry in note["skipped"]]
    report = {
        **asdict(job),
        "records": records,
        "written": sum(note["written"] for note in notes),
        "shards": sum(note["tar_bytes"] > 0 for note in notes),
        "bytes": sum(note["tar_bytes"] for note in notes),
        "skipped_by_reason": dict(sorted(Counter(entry["reason"] for entry in skipped).items())),
        "skipped": skipped,
    }
    write_atomically(output / "report.json", json.dumps(report, indent=1, ensure_ascii=False).encode())
    return report


def _print(report: dict[str, Any], output: Path, console: Console) -> None:
    console.print(
        f"{report['written']} of {report['records']} records in {report['shards']} shards, "
        f"{report['bytes'] / 1e6:.1f} MB, in {output}",
        markup=False,
    )
    if not report["skipped"]:
        return
    table = Table("reason", "records", "for example", title="skipped (all of them in report.json)")
    for reason, count in sorted(report["skipped_by_reason"].items(), key=lambda item: -item[1]):
        examples = [entry for entry in report["skipped"] if entry["reason"] == reason][:_EXAMPLES_PER_REASON]
        table.add_row(
            reason,
            str(count),
            "\n".join(_escape(f"{e['record']} (id {e['id']}): {e['message']}") for e in examples),
        )
    console.print(table)


def _escape(text: str) -> str:
    return escape(text if len(text) <= 160 else text[:157] + "...")
