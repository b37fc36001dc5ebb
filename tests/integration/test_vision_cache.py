"""Training from cached features gives the loss of training from pixels, under any layout."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from megatron_evomoe.data.shards import ShardDataset, write_shards
from tests.runs import metrics, run

LAYOUTS = {
    "two replicas": {"expert_model_parallel_size": 2},
    "TP 2": {"tensor_model_parallel_size": 2},
    "PP 2": {"pipeline_model_parallel_size": 2},
}
STEPS = 4
# A matrix product over 32 images and one over a microbatch's images may sum in another order. Here the
# metrics are equal to the last bit on one thread; the bound is that of tests/distributed/test_layouts.py.
METRICS = 1e-5


@pytest.fixture(scope="module")
def shards(digits, tmp_path_factory):
    """Shards in which every sixth sample has an invalid image."""
    data = tmp_path_factory.mktemp("data") / "shards"
    dataset = ShardDataset([str(digits / "instruct")])
    raw = [dataset.read(i) for i in range(60)]
    samples = [
        (r.record, [b"no image", *r.images[1:]] if i % 6 == 1 and r.images else r.images)
        for i, r in enumerate(raw)
    ]
    write_shards(iter(samples), data, samples_per_shard=25)
    return data


def train(folder: Path, tiny_yaml, shards: Path, *flags: str, expect: int | None = 0, **parallel: int):
    path = tiny_yaml(
        folder,
        parallel=parallel,
        data={"train_data": [str(shards)], "eval_data": [], "max_bad_sample_rate": 1.0},
        stages=[{"name": "align", "train_iters": STEPS}, {"name": "warmup", "train_iters": STEPS}],
    )
    return run("train", "--config", str(path), *flags, processes=2, expect=expect)


@pytest.fixture(scope="module")
def from_pixels(tmp_path_factory, tiny_yaml, shards) -> Path:
    folder = tmp_path_factory.mktemp("pixels")
    train(folder, tiny_yaml, shards, **LAYOUTS["two replicas"])
    return folder / "run"


@pytest.fixture(scope="module")
def cached(tmp_path_factory, tiny_yaml, shards) -> tuple[Path, str]:
    """Train from cached features on two replicas; returns the run's folder and its output.

    The cache is in `run/vision_features`.
    """
    folder = tmp_path_factory.mktemp("cached")
    done = train(
        folder, tiny_yaml, shards, "--cache-vision-features", "--num-workers", "2", **LAYOUTS["two replicas"]
    )
    return folder / "run", done.stdout


def compare(one: Path, other: Path) -> None:
    wanted, got = metrics(one), metrics(other)
    assert len(wanted) == len(got) == 2 * STEPS
    for a, b in zip(wanted, got, strict=True):
        for name in ("lm loss", "grad-norm"):
            assert b[name] == pytest.approx(a[name], rel=METRICS), (a["stage"], a["step"], name)


def test_loss_is_that_of_pixels(from_pixels, cached):
    compare(from_pixels, cached[0])
    assert [line.get("samples") for line in metrics(cached[0])] == [
        line.get("samples") for line in metrics(from_pixels)
    ]
    # samples with an invalid image were met
    assert metrics(cached[0])[STEPS - 1]["samples"]["skipped"]["corrupt-image"] > 0


def test_second_stage_finds_the_features_of_the_first(cached):
    said = [line for line in cached[1].splitlines() if "vision features" in line]
    assert len(said) == 2 and "computing" in said[0] and ": all " in said[1]


@pytest.mark.parametrize("layout", ["TP 2", "PP 2"])
def test_other_layouts_find_the_same_features_and_make_what_is_missing(
    layout, from_pixels, cached, tiny_yaml, shards, tmp_path
):
    """Other layouts read the cache that two replicas wrote and compute only what is missing.

    One part of the cache is deleted and one is cut short.
    """
    folder = tmp_path / "features"
    shutil.copytree(cached[0] / "vision_features", folder)
    gone, cut = sorted(folder.rglob("*.safetensors"))[:2]
    sizes = [path.stat().st_size for path in (gone, cut)]
    gone.unlink()
    os.truncate(cut, sizes[1] // 2)
    done = train(
        tmp_path,
        tiny_yaml,
        shards,
        "--cache-vision-features",
        "--feature-cache-dir",
        str(folder),
        **LAYOUTS[layout],
    )
    said = re.findall(r"computing (\d+) of (\d+) images", done.stdout)
    # if the layout had changed the tower's name in the cache, all images would be computed
    assert len(said) == 1 and 0 < int(said[0][0]) < int(said[0][1])
    compare(from_pixels, tmp_path / "run")
    assert [path.stat().st_size for path in (gone, cut)] == sizes


def test_refused_where_the_tower_trains(tiny_yaml, shards, tmp_path):
    done = train(
        tmp_path,
        tiny_yaml,
        shards,
        "--cache-vision-features",
        "--trainable",
        "[projector, vision]",
        expect=None,
    )
    assert done.returncode != 0 and "trains the vision tower" in done.stderr + done.stdout
    assert not (tmp_path / "run" / "align").exists()
