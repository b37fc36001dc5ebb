"""The parts of the checkpoint writer.

Tested are flat ranges as boxes, checksums computed while writing, and failures in any of the writer's
threads.
"""

from __future__ import annotations

import errno
import math
import random
import shutil
import threading
import unittest.mock
import zlib

import pytest
import torch

from megatron_evomoe.checkpoint import find, publication
from megatron_evomoe.checkpoint import record as records
from megatron_evomoe.checkpoint.record import CheckpointError
from megatron_evomoe.config import CheckpointConfig
from tests.faults import failing, matching
from tests.unit.checkpoint.test_store import built_for, record_for, save


def test_boxes_tile_any_range_in_memory_order():
    from megatron_evomoe.checkpoint.flat_shards import boxes

    draw = random.Random(1)
    for _ in range(2000):
        shape = tuple(draw.randint(1, 5) for _ in range(draw.randint(0, 4)))
        total = math.prod(shape)
        start, stop = sorted(draw.choices(range(total + 1), k=2))
        array = torch.arange(total).view(shape)
        found = list(boxes(shape, start, stop))
        assert len(found) <= max(1, 2 * len(shape) - 1)
        read = []
        for offset, size, first in found:
            part = array[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))]
            assert part.reshape(-1).tolist() == list(range(first, first + part.numel()))
            read += part.reshape(-1).tolist()
        assert read == list(range(start, stop)), (shape, start, stop)


def test_optimizer_shards_are_views_of_the_optimizer(one_rank):
    """Saving and loading hold no second copy of the optimizer state.

    The boxes are views of the moments and of the master weights themselves.
    """
    from megatron_evomoe.checkpoint import store

    _, built = built_for("warmup", trained=1)
    state = store._state(built.modules, built.optimizer, built.scheduler, is_loading=False)
    adam = built.optimizer.chained_optimizers[0].optimizer
    owned = {t.untyped_storage().data_ptr() for s in adam.state.values() for t in s.values() if t.dim()}
    boxes = [
        box
        for states in state["optimizer"]["param_state"].values()
        for name in ("exp_avg", "exp_avg_sq")
        for box in states[name]
    ]
    assert boxes and all(box.data.untyped_storage().data_ptr() in owned for box in boxes)


def test_checksums_are_those_of_the_files(tmp_path, one_rank):
    _, built = built_for("align", trained=1)
    path = save(tmp_path, built, "align", 1)
    files = records.read(path).files
    assert sum(name.endswith(".distcp") for name in files) == 2  # one per writing thread
    for name, (size, crc) in files.items():
        content = (path / name).read_bytes()
        assert (len(content), zlib.crc32(content)) == (size, crc), name


def test_failure_in_any_writing_thread_fails_the_save(tmp_path, one_rank):
    """An error in any writing thread makes the save fail.

    torch's writer ignores what its second thread raises, and would publish a checkpoint that lacks half of
    the data.
    """
    from torch.distributed.checkpoint import filesystem

    _, built = built_for("align", trained=1)
    first = save(tmp_path, built, "align", 1)
    write = filesystem._write_item
    for thread in ("main", "other"):

        def failing(*args, thread=thread):
            if (threading.current_thread() is threading.main_thread()) == (thread == "main"):
                raise OSError(28, "No space left on device")
            return write(*args)

        with (
            unittest.mock.patch.object(filesystem, "_write_item", failing),
            unittest.mock.patch.object(threading, "excepthook"),
            pytest.raises(CheckpointError, match="No space"),
        ):
            save(tmp_path, built, "align", 2)
        assert find.newest_good(tmp_path) == first and not list(tmp_path.glob("saving_*"))


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_whatever_file_fails_is_named_and_what_stays_is_said_truly(tmp_path, one_rank, code, background):
    """Each file of a checkpoint fails in turn; the tracker fails after the checkpoint is published."""
    from megatron_evomoe.checkpoint import store

    _, built = built_for("align", trained=1)
    asked = {
        "modules": built.modules,
        "optimizer": built.optimizer,
        "scheduler": built.scheduler,
        "config_yaml": "{}\n",
    }
    first = save(tmp_path, built, "align", 1)
    names = sorted({p.name for p in first.iterdir() if not p.name.endswith(".distcp")} | {"__0_0.distcp"})
    assert len(names) >= 4
    for step, name in enumerate([*names, records.TRACKER], start=2):
        saver = store.Saver(CheckpointConfig(async_save=background, keep=0))
        with failing(matching(f"{name}*", code), tmp_path), pytest.raises(CheckpointError) as caught:
            saver.save(tmp_path, record=record_for("align", step), **asked)
            saver.poll(wait=True)
        said = str(caught.value)
        # The forked process of megatron-core's background writer reports less about its errors.
        forked = background and name.endswith(".distcp")
        assert "rank 0 (" in said and (f"[Errno {code}]" in said or (forked and "OSError" in said)), said
        assert name in said or forked, said
        published = tmp_path / f"iter_{step:07d}"
        if name.startswith(records.TRACKER):
            assert f"{published} is published and whole" in said and "Nothing" not in said
            assert find.newest_good(tmp_path) == published
        else:
            assert f"Nothing was published; {first} stays the newest" in said
            assert find.newest_good(tmp_path) == first
        assert not list(tmp_path.glob("saving_*"))


def test_files_that_vanish_during_a_save_are_missed_before_it_is_published(tmp_path, one_rank, monkeypatch):
    _, built = built_for("align", trained=1)
    first = save(tmp_path, built, "align", 1)
    original = publication.save_config
    for pattern in ("__0_0.distcp", "*"):

        def vanish(*args, pattern=pattern):
            for path in next(tmp_path.glob("saving_*")).glob(pattern):
                path.unlink()
            original(*args)

        monkeypatch.setattr(publication, "save_config", vanish)
        with pytest.raises(
            CheckpointError, match=r"No such file.*distcp'\. Nothing was published; .*iter_0000001 stays"
        ):
            save(tmp_path, built, "align", 2)
    monkeypatch.setattr(
        publication, "save_config", lambda *args: shutil.rmtree(next(tmp_path.glob("saving_*")))
    )
    with pytest.raises(CheckpointError, match=r"No such file.*run_config.yaml'\. Nothing was published"):
        save(tmp_path, built, "align", 2)
    assert find.newest_good(tmp_path) == first
