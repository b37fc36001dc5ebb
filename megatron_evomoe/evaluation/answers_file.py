"""Keeps answers on disk, so that an evaluation that was killed continues, with any number of ranks.

OUTPUT/run.json                   the job that the answers belong to
OUTPUT/answers/rank-00000.jsonl   one line for each answer, appended
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_evomoe.data.files import write_atomically
from megatron_evomoe.evaluation.item import BenchmarkError
from megatron_evomoe.evaluation.published_files import field


class AnswersFile:
    """The answers of one output folder."""

    def __init__(self, output: Path) -> None:
        self._run, self._folder = output / "run.json", output / "answers"

    def open(self, job: Mapping[str, Any]) -> None:
        """Start a folder, or check that it was started with the same job. Only one rank calls this.

        Args:
            job: everything that the answers depend on.

        Raises:
            BenchmarkError: the folder holds the answers of another job, or cannot be written.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not self._run.exists():
                write_atomically(self._run, json.dumps(job, indent=1).encode())
                return
            before = json.loads(self._run.read_text())
        except (OSError, ValueError) as error:
            raise BenchmarkError(f"--output {self._run.parent} cannot be used: {error}") from None
        changed = [name for name, value in job.items() if before.get(name) != value]
        if changed:
            raise BenchmarkError(
                f"{self._run.parent} holds answers of another run: {', '.join(changed)} "
                f"{'differs' if len(changed) == 1 else 'differ'}; use another --output"
            )

    def read(self) -> dict[str, str]:
        """Read the answers from the files of all ranks: item id -> answer.

        A last line without a line end was being written when the process was killed, and is ignored.

        Raises:
            BenchmarkError: any other line is not an answer.
        """
        found = {}
        for path in sorted(self._folder.glob("rank-*.jsonl")):
            whole, _, _ = path.read_bytes().rpartition(b"\n")
            for number, line in enumerate(whole.splitlines(), start=1):
                where = f"{path}:{number}"
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise BenchmarkError(f"{where} is not valid JSON: {error}") from None
                found[field(record, "id", str, where)] = field(record, "answer", str, where)
        return found

    def writer(self, rank: int) -> AnswerWriter:
        """The writer for the answers of this rank."""
        return AnswerWriter(self._folder / f"rank-{rank:05d}.jsonl")


class AnswerWriter:
    """A context in which answers are appended, each batch in one write."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> AnswerWriter:
        self._file = open(self._path, "ab")
        data = self._path.read_bytes()
        self._file.truncate(data.rfind(b"\n") + 1)  # an incomplete line would run into the next one
        return self

    def __exit__(self, *args: Any) -> None:
        self._file.close()

    def add(self, answers: Mapping[str, str]) -> None:
        """Append answers and flush them, so that they remain if this process is killed."""
        lines = [
            json.dumps({"id": name, "answer": answer}, ensure_ascii=False) + "\n"
            for name, answer in answers.items()
        ]
        self._file.write("".join(lines).encode())
        self._file.flush()
