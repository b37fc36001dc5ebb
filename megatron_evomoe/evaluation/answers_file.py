"""Answers on disk as they come, so that a killed evaluation goes on where it was, with any number of ranks.

OUTPUT/run.json                 what the answers belong to
OUTPUT/answers/rank-00000.jsonl one line per answer, appended
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_evomoe.data.shards import write_atomically
from megatron_evomoe.evaluation.item import BenchmarkError
from megatron_evomoe.evaluation.published_files import field


class AnswersFile:
    """The answers of one output folder."""

    def __init__(self, output: Path) -> None:
        self._run, self._folder = output / "run.json", output / "answers"

    def open(self, job: Mapping[str, Any]) -> None:
        """Begin a folder, or see that it was begun with the same job. One rank calls it.

        Raises:
            BenchmarkError: the folder holds another job's answers, or cannot be written.
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
        """Item id -> answer from every rank's file.

        A last line without an end is one that a kill tore, and is left out.

        Raises:
            BenchmarkError: another line is no answer.
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
        """Where this rank appends."""
        return AnswerWriter(self._folder / f"rank-{rank:05d}.jsonl")


class AnswerWriter:
    """Context: appends answers, one batch in one write."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> AnswerWriter:
        self._file = open(self._path, "ab")
        data = self._path.read_bytes()
        self._file.truncate(data.rfind(b"\n") + 1)  # a torn line would swallow the next one
        return self

    def __exit__(self, *args: Any) -> None:
        self._file.close()

    def add(self, answers: Mapping[str, str]) -> None:
        """Append and hand over to the system, which keeps it if this process is killed."""
        lines = [
            json.dumps({"id": name, "answer": answer}, ensure_ascii=False) + "\n"
            for name, answer in answers.items()
        ]
        self._file.write("".join(lines).encode())
        self._file.flush()
