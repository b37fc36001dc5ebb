"""MMBench: multiple choice over 20 abilities.

A question counts if it is answered right for all rotations of its options.
"""

from __future__ import annotations

import base64
import binascii
import csv
import importlib.util
import io
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_evomoe.data.files import write_atomically
from megatron_evomoe.evaluation.item import Answers, Benchmark, BenchmarkError, Item, Metrics, Source
from megatron_evomoe.evaluation.normalize import mmbench_letter
from megatron_evomoe.evaluation.prompts import LETTERS, OPTION_LETTER, OPTION_LETTER_CHINESE, option_lines
from megatron_evomoe.evaluation.published_files import field, read_text
from megatron_evomoe.evaluation.scores import grouped, mean_by, mean_percent

_ROTATION = 1_000_000  # row n + k·10⁶ is row n with its options rotated k times
_LONGEST_REFERENCE = 64  # a shorter image field is the index of the row that has the picture
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")  # XML, and so a workbook, cannot hold these
_NOTHING = {"", "nan", "none"}


def read(source: Source) -> list[Item]:
    """Read a published TSV file.

    Its columns are index, question, hint, A … D, image (base64), answer, category, l2-category and split.

    Hint, answer and categories may be missing. If a file has answers but no rotated rows, the rotations are
    added, so that every file can be scored by circular evaluation.
    """
    rows = {int(index): (where, row) for index, where, row in _rows(source.questions)}
    if rows and max(rows) < _ROTATION and all(_text(row, "answer") for _, row in rows.values()):
        rows = {
            index: (where, row) for at, (where, row) in rows.items() for index, row in _rotations(at, row)
        }
    return [_item(index, row, rows, where) for index, (where, row) in rows.items()]


def _rows(path: Path) -> Iterator[tuple[str, str, dict[str, str]]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter="\t")
    lacking = {"index", "question", "A", "B", "image"} - set(reader.fieldnames or ())
    if lacking:
        raise BenchmarkError(
            f"{path}:1 is not a header of MMBench: column {', '.join(sorted(lacking))} is missing"
        )
    try:
        for row in reader:
            where, index = f"{path}:{reader.line_num}", str(row["index"])
            if not index.isdecimal():
                raise BenchmarkError(f"{where}: index must be a number, got {index!r:.80}")
            yield index, where, row
    except csv.Error as error:
        raise BenchmarkError(f"{path}:{reader.line_num} is not a tab-separated row: {error}") from None


def _text(row: Mapping[str, str | None], column: str) -> str:
    """The field; empty if the file says nan or has no such column."""
    value = (row.get(column) or "").strip()
    return "" if value.lower() in _NOTHING else value


def _options(row: Mapping[str, str | None]) -> dict[str, str]:
    """Letter -> text of the options before the first empty one."""
    found = {}
    for letter in LETTERS:
        if not _text(row, letter):
            break
        found[letter] = _text(row, letter)
    return found


def _rotations(index: int, row: dict[str, str]) -> Iterator[tuple[int, dict[str, str]]]:
    options = _options(row)
    letters, texts = list(options), list(options.values())
    right = letters.index(_text(row, "answer")) if _text(row, "answer") in letters else None
    for k in range(len(letters)):
        turned = dict(zip(letters, texts[k:] + texts[:k], strict=True))
        answer = letters[(right - k) % len(letters)] if right is not None else row["answer"]
        yield index + k * _ROTATION, {**row, **turned, "answer": answer}


def _item(
    index: int, row: dict[str, str], rows: Mapping[int, tuple[str, dict[str, str]]], where: str
) -> Item:
    options, answer = _options(row), _text(row, "answer") or None
    if len(options) < 2:
        raise BenchmarkError(f"{where}: fewer than two options")
    if answer is not None and answer not in options:
        raise BenchmarkError(f"{where}: answer {answer!r:.20} is none of {', '.join(options)}")
    question = field(row, "question", str, where)
    return Item(
        id=str(index),
        prompt=_prompt(question, _text(row, "hint"), list(options.values())),
        images=(_image(row, rows, where),),
        metadata={
            "answer": answer,
            "question": question,
            "options": options,
            "split": _text(row, "split"),
            "category": _text(row, "category"),
            "l2_category": _text(row, "l2-category"),
        },
        group=str(index % _ROTATION),
    )


def _image(row: Mapping[str, str], rows: Mapping[int, tuple[str, dict[str, str]]], where: str) -> bytes:
    text = (row["image"] or "").strip()
    if len(text) <= _LONGEST_REFERENCE and text.isdecimal() and int(text) in rows:
        text = rows[int(text)][1]["image"]
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if not data:
        raise BenchmarkError(f"{where}: image is neither base64 nor the index of another row")
    return data


def _prompt(question: str, hint: str, options: Sequence[str]) -> str:
    instruction = OPTION_LETTER_CHINESE if re.search("[\u4e00-\u9fff]", question) else OPTION_LETTER
    return "\n".join([*([hint] if hint else []), question, option_lines(options), instruction])


def score(items: Sequence[Item], answers: Answers) -> Metrics:
    """Circular accuracy in percent, overall and by both levels of category; `vanilla` ignores rotations.

    A file with several splits is also scored by split. Source: the MMBench paper (arXiv 2307.06281, section
    4) and VLMEvalKit's mcq_circular_eval with its matching without a judge model.
    """
    groups = grouped((i.group, i) for i in items if i.metadata["answer"] is not None)
    if not groups:
        return {}
    right = {i.id: _is_right(i, answers[i.id]) for members in groups.values() for i in members}
    unrotated = [min(members, key=lambda item: int(item.id)) for members in groups.values()]
    circular = [(i.metadata, float(all(right[j.id] for j in groups[i.group]))) for i in unrotated]
    metrics: dict[str, Any] = {
        "accuracy": mean_percent([s for _, s in circular]),
        "vanilla": mean_percent([right[i.id] for i in unrotated]),
    }
    for name in ("l2_category", "category", "split"):
        if len({m[name] for m, _ in circular}) > 1:
            metrics[f"by_{name}"] = mean_by((m[name], s) for m, s in circular)
    return metrics


def _is_right(item: Item, answer: str) -> bool:
    return mmbench_letter(answer, item.metadata["options"]) == item.metadata["answer"]


def submission(items: Sequence[Item], answers: Answers, folder: Path) -> list[Path]:
    """Write ``submission.tsv``, and ``submission.xlsx`` if openpyxl is installed.

    The columns are index, question, A … D, answer if it is known, and prediction.
    """
    letters = [letter for letter in LETTERS if any(letter in item.metadata["options"] for item in items)]
    labelled = ["answer"] if any(item.metadata["answer"] for item in items) else []
    rows: list[list[object]] = [["index", "question", *letters, *labelled, "prediction"]]
    for item in items:
        known = [item.metadata["answer"] for _ in labelled]
        rows.append(
            [
                int(item.id),
                item.metadata["question"],
                *(item.metadata["options"].get(x, "") for x in letters),
                *known,
                answers[item.id].replace("\0", ""),
            ]
        )  # which csv cannot write on Python 3.10
    table = io.StringIO(newline="")
    csv.writer(table, delimiter="\t", lineterminator="\n").writerows(rows)
    paths = [folder / "submission.tsv"]
    write_atomically(paths[0], table.getvalue().encode())
    if importlib.util.find_spec("openpyxl"):
        paths.append(folder / "submission.xlsx")
        write_atomically(paths[1], _workbook(rows))
    return paths


def _workbook(rows: Sequence[Sequence[object]]) -> bytes:
    import openpyxl

    book, out = openpyxl.Workbook(write_only=True), io.BytesIO()
    sheet = book.create_sheet("Sheet1")
    for row in rows:
        sheet.append([_UNPRINTABLE.sub("", cell) if isinstance(cell, str) else cell for cell in row])
    book.save(out)
    return out.getvalue()


MMBENCH = Benchmark("mmbench", read, score, submission)
