"""Which run a checkpoint belongs to, and what a hostile checkpoint does, through the command line."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import zlib
from pathlib import Path

import pytest
import yaml

from megatron_evomoe.checkpoint import metadata
from megatron_evomoe.checkpoint import record as records
from tests.runs import run
from tests.unit.checkpoint.test_metadata import GETATTR, Shell, name, text, unframed

STAGES = [{"name": "align", "train_iters": 2}, {"name": "warmup"}]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_yaml) -> Path:
    """A run of two stages that was told to end in the second one, after 4 of 6 steps.

    The second stage has checkpoints of steps 2 and 4.
    """
    folder = tmp_path_factory.mktemp("begun")
    tiny_yaml(folder, stages=STAGES, data={"eval_data": []})
    train(folder, "--stage", "align")
    train(folder, "--exit-interval", "4")
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return copied(finished, tmp_path)


def copied(source: Path, folder: Path) -> Path:
    """A copy of a run, whose configuration points to the copy."""
    shutil.copytree(source / "run", folder / "run")
    (folder / "run.yaml").write_text(
        (source / "run.yaml").read_text().replace(str(source / "run"), str(folder / "run"))
    )
    return folder


def train(folder: Path, *flags: str, expect: int = 0) -> str:
    """Train and return what the run printed."""
    done = run("train", "--config", str(folder / "run.yaml"), *flags, expect=expect)
    return done.stdout + done.stderr


def identity(folder: Path) -> str:
    return json.loads((folder / "run" / "run.json").read_text())["run_id"]


def rewritten(path: Path, **changes) -> None:
    dataclasses.replace(records.read_unchecked(path), **changes).write(path)


def test_checkpoints_carry_their_run_and_its_lineage(finished):
    for path in (finished / "run").glob("*/iter_*"):
        assert records.read(path).run_id == identity(finished)
    (parent,) = records.read(finished / "run" / "warmup" / "iter_0000004").lineage
    assert (parent["stage"], parent["step"], parent["run_id"]) == ("align", 2, identity(finished))


@pytest.mark.parametrize("changes", [{"run_id": "0" * 32}, {"stage": "align", "kind": "align"}])
def test_another_s_checkpoint_in_a_stage_s_folder_is_named_and_the_one_before_is_taken(copy, changes):
    rewritten(copy / "run" / "warmup" / "iter_0000004", **changes)
    said = train(copy)
    whose = f"run {'0' * 32}" if "run_id" in changes else "stage 'align'"
    assert (
        f"iter_0000004 is of {whose}, and is in the" in said
        and "falling back to the checkpoint before it" in said
    )
    assert "resumed at step 2 from" in said


def test_a_stage_does_not_begin_from_another_run_s(copy):
    shutil.rmtree(copy / "run" / "warmup")
    rewritten(copy / "run" / "align" / "iter_0000002", run_id="0" * 32)
    said = train(copy, "--stage", "warmup", expect=2)
    assert f"iter_0000002 is of run {'0' * 32}, and is in the directory of run {identity(copy)}" in said
    assert "name it in `load:`" in said
    raw = yaml.safe_load((copy / "run.yaml").read_text())
    raw["stages"][1]["load"] = str(copy / "run" / "align" / "iter_0000002")
    (copy / "run.yaml").write_text(yaml.safe_dump(raw))
    train(copy, "--stage", "warmup")
    (parent,) = records.read(copy / "run" / "warmup" / "iter_0000006").lineage
    assert parent["run_id"] == "0" * 32


def test_a_stage_that_began_from_another_stage_is_not_gone_on_with(copy):
    raw = yaml.safe_load((copy / "run.yaml").read_text())
    raw["stages"].insert(1, {"name": "again", "kind": "align", "train_iters": 1, "load": "align"})
    (copy / "run.yaml").write_text(yaml.safe_dump(raw))
    said = train(copy, "--stage", "warmup", expect=2)
    assert "began from stage 'align', and this run's stage 'warmup' begins from 'again'" in said


def test_a_run_that_is_moved_stays_the_same(copy, tmp_path_factory):
    moved = copied(copy, tmp_path_factory.mktemp("moved"))
    shutil.rmtree(copy / "run")
    assert "resumed at step 4 from" in train(moved)
    assert records.read(moved / "run" / "warmup" / "iter_0000006").run_id == identity(moved)


def test_another_run_goes_on_with_it_under_load(copy, tmp_path_factory, tiny_yaml):
    other = tmp_path_factory.mktemp("other")
    tiny_yaml(other, stages=STAGES, data={"eval_data": []}, checkpoint={"load": str(copy / "run")})
    assert "resumed at step 4 from" in train(other, "--stage", "warmup")
    assert records.read(other / "run" / "warmup" / "iter_0000006").run_id == identity(other) != identity(copy)


def test_a_lost_id_is_taken_from_the_checkpoints_and_asked_for_where_they_differ(copy):
    before = identity(copy)
    (copy / "run" / "run.json").write_text("{")
    assert "run.json is damaged" in train(copy, expect=2)
    (copy / "run" / "run.json").unlink()
    rewritten(copy / "run" / "warmup" / "iter_0000004", run_id="0" * 32)
    said = train(copy, expect=2)
    assert "holds checkpoints of several runs" in said and before in said and "0" * 32 in said
    shutil.rmtree(copy / "run" / "warmup" / "iter_0000004")
    assert "resumed at step 2 from" in train(copy)
    assert identity(copy) == before


def test_a_record_of_another_step_than_the_tensors_is_refused(copy):
    newest = copy / "run" / "warmup" / "iter_0000004"
    rewritten(newest, step=5)
    newest.rename(newest.with_name("iter_0000005"))
    assert "its record is of step 5, its schedule of 4: they are not of one save" in train(copy, expect=2)


CLASS = name("torch.distributed.checkpoint.metadata", "MetadataIndex")


@pytest.mark.parametrize("kind", ["state on a class", "a call", "an object in the tensors"])
def test_a_hostile_checkpoint_runs_nothing_and_is_named(copy, tmp_path, kind):
    """A stage starts from the checkpoint's weights, named by the stage's folder and by its own folder."""
    canary, path = tmp_path / "ran", copy / "run" / "align" / "iter_0000002"
    harm = Shell(f"touch {canary}")
    found = metadata.read(path)
    if kind == "an object in the tensors":
        content = pickle.dumps(harm)
        index, place = next((i, p) for i, p in found.storage_data.items() if i.offset is None)
        data = path / place.relative_path
        found.storage_data[index] = dataclasses.replace(
            place, offset=data.stat().st_size, length=len(content)
        )
        data.write_bytes(data.read_bytes() + content)
    # an earlier reader of `.metadata` could be misled by an object whose `__setstate__` is getattr
    if kind == "state on a class":
        content = (
            b"\x80\x04" + CLASS + b"N}" + text("__setstate__") + GETATTR + b"s\x86b0" + unframed(found)[2:]
        )
    else:
        content = pickle.dumps(harm if kind == "a call" else found)
    (path / ".metadata").write_bytes(content)
    sums = {
        p.name: [p.stat().st_size, zlib.crc32(p.read_bytes())]
        for p in path.iterdir()
        if p.name != records.FILE_NAME
    }
    rewritten(path, files=sums)
    shutil.rmtree(copy / "run" / "warmup")
    for source in (path, path.parent):
        raw = yaml.safe_load((copy / "run.yaml").read_text())
        raw["stages"][1]["load"] = str(source)
        (tmp_path / "from.yaml").write_text(yaml.safe_dump(raw))
        done = run("train", "--config", str(tmp_path / "from.yaml"), "--stage", "warmup", expect=2)
        said = done.stdout + done.stderr
        assert str(path) in said and "nothing was loaded" in said, said
    assert not canary.exists()
