"""A save in which one file operation, or every one from some point on, fails in any way.

The error names the true cause, and the newest valid checkpoint remains.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_evomoe.checkpoint import find
from megatron_evomoe.checkpoint.record import CheckpointError
from tests.faults import failing
from tests.unit.checkpoint.test_store import built_for, save

CODES = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.EROFS,
    errno.ESTALE,
    errno.EACCES,
    errno.EPERM,
    errno.ENOMEM,
)
CALLS = ("fsync", "replace", "rename", "mkdir")


class Calls:
    """Counts the calls that change files, and fails the call of a given number, or all from that one on."""

    def __init__(self, first: int, *, stays: bool, error: Callable[[], Exception]) -> None:
        self.count, self.first, self.stays, self.error, self.met = 0, first, stays, error, False

    def pass_by(self, *_: object) -> int:
        self.count += 1
        if self.count == self.first or (self.stays and self.count > self.first):
            self.met = True
            raise self.error()
        return 0


@contextlib.contextmanager
def counted(calls: Calls, below: Path) -> Iterator[None]:
    real = {name: getattr(os, name) for name in CALLS}

    def wrapped(name: str) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            # a folder that exists already is not created, so this call is not counted
            if name != "mkdir" or not os.path.isdir(args[0]):
                calls.pass_by()
            return real[name](*args, **kwargs)

        return call

    with failing(calls.pass_by, below):
        try:
            for name in CALLS:
                setattr(os, name, wrapped(name))
            yield
        finally:
            for name in CALLS:
                setattr(os, name, real[name])


def error_of(draw: random.Random) -> Callable[[], Exception]:
    code = draw.choice(CODES)
    of_disk = OSError(code, os.strerror(code))
    return draw.choice([lambda: of_disk, lambda: MemoryError("injected"), lambda: RuntimeError("injected")])


# torch's second writing thread reports an injected error in this way
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_saving(tally, tmp_path, one_rank):
    _, built = built_for("align", trained=1)
    save(tmp_path, built, "align", 1)
    probe = Calls(0, stays=False, error=Exception)
    with counted(probe, tmp_path):
        newest = save(tmp_path, built, "align", 2, keep=2)
    for step, draw in enumerate(tally.draws(25), start=3):
        # the last calls publish the checkpoint, so half of the draws choose one of them
        number = draw.choice([draw.randint(1, probe.count), probe.count - draw.randint(0, 7)])
        calls = Calls(number, stays=draw.random() < 0.5, error=error_of(draw))
        final = tmp_path / f"iter_{step:07d}"
        try:
            with counted(calls, tmp_path):
                saved = save(tmp_path, built, "align", step, keep=2)
        except CheckpointError as error:
            said = str(error)
            assert calls.met and "rank 0 (" in said and ("Errno" in said or "injected" in said), said
            if "is published and whole" in said:
                newest = final
            else:
                assert f"Nothing was published; {newest} stays the newest" in said and not final.exists(), (
                    said
                )
            tally.add("named")
        else:
            assert saved == final and not calls.met, "a failure went unsaid"
            newest = final
            tally.add("right")
        assert find.newest_good(tmp_path) == newest
