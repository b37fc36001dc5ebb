"""benchmarks/loader.py: the compared loaders do the same work, and memory is counted once."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MIB = 2**20


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """Make the folder of scripts importable, as it is when a script runs."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def job(tmp_path_factory, benchmarks):
    """Shards of 8 samples; `aspect_ratio` is replaced where it matters."""
    import loader_peers

    from megatron_evomoe.data.shards import write_shards
    from megatron_evomoe.data.tokenizer import train_sentencepiece

    folder = tmp_path_factory.mktemp("loaders")
    words = ["the", "of", "a", "loader", "sample", "picture", "worker", "batch"]
    write_shards(loader_peers.made_samples(8, words, loader_peers.made_pictures(2)), folder / "shards", 4)
    tokenizer = train_sentencepiece([" ".join(words)] * 50, folder / "sp.model", 320)
    return loader_peers.Job(
        shards=str(folder / "shards"),
        tokenizer=str(tokenizer),
        aspect_ratio="square",
        batch=4,
        workers=0,
        prefetch=2,
    )


@pytest.mark.parametrize("aspect_ratio", ["square", "pad"])
def test_pillow_makes_the_same_pictures(job, aspect_ratio):
    import loader_peers

    made = replace(job, aspect_ratio=aspect_ratio)
    data = loader_peers.made_pictures(1)[0]
    ours = made.processor().normalize(loader_peers.SameDecode(made).image(data)[None])[0]
    theirs = loader_peers.PillowFloat(made).image(data)
    # 0.02 of 255 is the resizing's mean difference from Pillow's (data/image.py); over the smallest deviation
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().mean() < 0.02 / 255 / min(loader_peers.CLIP_STD)


def test_other_loaders_give_the_samples_of_the_project(job):
    import loader_peers

    from megatron_evomoe.config.token_types import TokenType

    def samples(batch):
        names = ("tokens", "labels", "token_types", "images")
        values = batch if isinstance(batch, dict) else vars(batch.microbatches[0])
        for tokens, labels, types, image in zip(*(values[name] for name in names), strict=True):
            real = types != TokenType.PADDING
            yield *(tuple(t[real].tolist()) for t in (tokens, labels, types)), image.numpy().tobytes()

    def two_batches(name):
        batches = loader_peers.LOADERS[name](job)
        return {sample for _ in range(2) for sample in samples(next(batches))}

    ours = two_batches(loader_peers.PROJECT)
    assert len(ours) == 8  # one pass
    assert two_batches("dataloader") == ours
    assert two_batches("webdataset") <= ours  # it shuffles over passes too


def test_memory_of_several_processes_is_counted_once():
    import loader

    size = 64 * MIB
    shared = b"x" * size
    me = psutil.Process()

    def added(fill: bool) -> int:
        """Bytes that a forked child adds, which has `shared` too and may fill as much of its own."""
        before = loader.memory([me])
        ready, finish = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            own = mmap.mmap(-1, size)
            if fill:
                own.write(shared)
            os.write(ready[1], b"x")
            os.read(finish[0], 1)
            os._exit(0)
        try:
            os.read(ready[0], 1)
            assert psutil.Process(child).memory_info().rss > size
            return loader.memory([me, psutil.Process(child)]) - before
        finally:
            os.write(finish[1], b"x")
            os.waitpid(child, 0)
            for end in (*ready, *finish):
                os.close(end)

    # A child's own tables and the pages that it writes to by running take some MiB, more in a large process,
    # and equally many whether it fills memory of its own.
    overhead = added(fill=False)
    assert overhead < size / 2
    assert size <= added(fill=True) < size * 1.25 + overhead


def test_the_script_runs_and_names_loaders_that_are_not_installed():
    command = [sys.executable, BENCHMARKS / "loader.py", "--tiny", "--aspect-ratio", "pad"]
    done = subprocess.run([*command, "--loaders", "project", "energon"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| pad")]
    figures = {row[1]: [float(value) for value in row[2:]] for row in rows[:-1]}
    images, faster, cpu, own_cpu, mib = figures["project"]
    assert faster == 1 and images > 0 and mib > 50
    assert 0 < own_cpu <= cpu + 0.01  # rounded; workers can need less than the clock shows
    assert "energon" in figures or "left out: energon: No module named 'megatron.energon'" in done.stdout
