from __future__ import annotations

import pytest

from megatron_evomoe.evaluation.answers_file import AnswersFile
from megatron_evomoe.evaluation.item import BenchmarkError


@pytest.fixture
def store(tmp_path):
    opened = AnswersFile(tmp_path / "out")
    opened.open({"model": "a"})
    return opened


def add(store, rank, **answers):
    with store.writer(rank) as writer:
        writer.add(answers)


def test_reads_every_rank(store):
    add(store, 0, a="x")
    add(store, 11, b="line\nbreak \u2028 é")  # neither line break may end a line of the file
    add(store, 0, c="z")
    assert store.read() == {"a": "x", "b": "line\nbreak \u2028 é", "c": "z"}


def test_a_torn_last_line_is_left_out_and_cut_off(store, tmp_path):
    add(store, 0, a="x")
    path = tmp_path / "out" / "answers" / "rank-00000.jsonl"
    path.write_bytes(path.read_bytes() + b'{"id": "b", "ans')
    assert store.read() == {"a": "x"}
    add(store, 0, b="y")
    assert store.read() == {"a": "x", "b": "y"}


def test_a_broken_line_in_the_middle_is_an_error(store, tmp_path):
    add(store, 0, a="x")
    path = tmp_path / "out" / "answers" / "rank-00000.jsonl"
    path.write_bytes(b"torn\n" + path.read_bytes())
    with pytest.raises(BenchmarkError, match=r"rank-00000.jsonl:1 is not valid JSON"):
        store.read()


def test_another_job_is_refused(store):
    store.open({"model": "a"})
    with pytest.raises(BenchmarkError, match="holds answers of another run: model differs"):
        store.open({"model": "b"})
