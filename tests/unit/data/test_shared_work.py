"""Processes make a file together: each piece once, whoever dies, and nothing is left over."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest

from megatron_evomoe.data import shared_work
from megatron_evomoe.data.shared_work import build_together, parts_folder
from tests.faults import failing, matching

PIECES = 12
FORK = multiprocessing.get_context("fork")


def result(piece: int) -> bytes:
    return f"{piece};".encode()


WHOLE = b"".join(map(result, range(PIECES)))


def join(parts, path):
    path.write_bytes(b"".join(part.read_bytes() for part in parts))


def build(target, log=None, *, slow=0.02, stop_at=None):
    """Make `target`; append the number of each piece to `log`, and die in the piece `stop_at`."""

    def work(piece):
        if log is not None:
            with open(log, "a") as file:
                file.write(f"{piece}\n")
        if piece == stop_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(slow)
        return result(piece)

    build_together(target, PIECES, work, join)


def pieces_in(log):
    return sorted(map(int, log.read_text().split()))


def together(*calls):
    """Run calls of `build` in a process each; their exit codes."""
    processes = [FORK.Process(target=build, args=args, kwargs=kwargs) for args, kwargs in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_each_piece_is_done_once_and_nothing_is_left(tmp_path):
    target, log = tmp_path / "target", tmp_path / "log"
    assert together(*[((target, log), {})] * 4) == [0] * 4
    assert target.read_bytes() == WHOLE and pieces_in(log) == list(range(PIECES))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "target"]
    build(target, log)
    assert pieces_in(log) == list(range(PIECES)), "a target that is there is not made again"


def test_the_piece_of_a_dead_process_is_taken_over_and_its_results_are_kept(tmp_path):
    target, log = tmp_path / "target", tmp_path / "log"
    codes = together(*[((target, log), {"stop_at": 5})] * 2)
    assert codes == [-signal.SIGKILL] * 2, "the second dies of the same piece"
    kept = {int(p.stem) for p in parts_folder(target, PIECES).glob("*.part")}
    log.unlink()
    build(target, log)
    assert target.read_bytes() == WHOLE
    assert pieces_in(log) == sorted(set(range(PIECES)) - kept)


def test_a_claim_of_another_host_counts_until_it_no_longer_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_work, "_STILL", 1.0)
    target = tmp_path / "target"
    folder = parts_folder(target, PIECES)
    folder.mkdir()
    claim = folder / "3.claim"
    claim.write_text('{"host": "elsewhere", "pid": 1, "beat": 0}')
    seen = []

    def progress(done, _):
        # eleven pieces are there: this process only waits for the claimed one
        if done == PIECES - 1:
            seen.append(time.monotonic())
            if len(seen) <= 10:
                claim.write_text(f'{{"host": "elsewhere", "pid": 1, "beat": {len(seen)}}}')

    build_together(target, PIECES, result, join, progress=progress)
    assert target.read_bytes() == WHOLE
    # ten looks while the claim was changing, and five or more of 0.2 s until it counted as dead
    assert len(seen) >= 14 and not folder.exists()


@pytest.mark.parametrize("content", [b"", b"\xff{", b"[]", b'{"host": 1}', b'{"host": %s, "pid": "x"}'])
def test_a_claim_that_says_nothing_only_delays(tmp_path, monkeypatch, content):
    monkeypatch.setattr(shared_work, "_STILL", 0.3)
    target = tmp_path / "target"
    folder = parts_folder(target, PIECES)
    folder.mkdir()
    (folder / "0.claim").write_bytes(content.replace(b"%s", f'"{os.uname().nodename}"'.encode()))
    build(target, slow=0)
    assert target.read_bytes() == WHOLE


def test_what_work_raises_frees_the_piece(tmp_path):
    target = tmp_path / "target"

    def work(piece):
        if piece == 7:
            raise ValueError("piece 7")
        return result(piece)

    with pytest.raises(ValueError, match="piece 7"):
        build_together(target, PIECES, work, join)
    assert not list(parts_folder(target, PIECES).glob("*.claim"))
    build(target, slow=0)
    assert target.read_bytes() == WHOLE


def test_progress_counts_and_may_end_the_work(tmp_path):
    counts = []

    def progress(done, total):
        counts.append((done, total))
        if done == 5 and counts.count((5, total)) == 1:
            raise KeyboardInterrupt

    target = tmp_path / "target"
    with pytest.raises(KeyboardInterrupt):
        build_together(target, PIECES, result, join, progress=progress)
    build_together(target, PIECES, result, join, progress=progress)
    assert counts == [(n, PIECES) for n in (*range(6), *range(5, 13))]


@pytest.mark.parametrize("what", ["*.part.*", "*target*.tmp"])
def test_a_full_disk_loses_nothing(tmp_path, what):
    target, log = tmp_path / "target", tmp_path / "log"
    with failing(matching(what), tmp_path), pytest.raises(OSError, match="No space left"):
        build(target, log, slow=0)
    assert not target.exists()
    left = {p.name for p in parts_folder(target, PIECES).iterdir()}
    assert all(name.endswith(".part") for name in left)
    build(target, log, slow=0)
    assert target.read_bytes() == WHOLE
    assert len(pieces_in(log)) == (PIECES + 1 if what.startswith("*.part") else PIECES)


def test_a_target_that_is_not_right_is_replaced(tmp_path):
    target = tmp_path / "target"
    target.write_bytes(b"old")
    build_together(target, PIECES, result, join, is_current=lambda: target.read_bytes() == WHOLE)
    assert target.read_bytes() == WHOLE
