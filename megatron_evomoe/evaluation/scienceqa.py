"""ScienceQA: multiple choice questions of school science, with and without an image."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from megatron_evomoe.evaluation.item import Answers, Benchmark, BenchmarkError, Item, Metrics, Source
from megatron_evomoe.evaluation.normalize import scienceqa_letter
from megatron_evomoe.evaluation.prompts import LETTERS, OPTION_LETTER
from megatron_evomoe.evaluation.published_files import field, find_image, read_json
from megatron_evomoe.evaluation.scores import mean_percent

_SUBJECTS = {"natural": "natural science", "social": "social science", "language": "language science"}


def read(source: Source) -> list[Item]:
    """Read ``problems.json`` and ``pid_splits.json`` of a folder; the path of the former may be given too.

    Images are at ``[<split>/]<pid>/image.png``.
    """
    problems_path = source.questions / "problems.json" if source.questions.is_dir() else source.questions
    splits_path = problems_path.with_name("pid_splits.json")
    problems, splits = read_json(problems_path), read_json(splits_path)
    if not isinstance(splits, dict) or source.split not in splits:
        raise BenchmarkError(f"{splits_path} has no split {source.split!r}; it has {', '.join(splits)}")
    return [
        _item(pid, field(problems, pid, dict, str(problems_path)), f"{problems_path}: {pid!r}", source)
        for pid in splits[source.split]
    ]


def _item(pid: str, problem: dict, where: str, source: Source) -> Item:
    choices, answer = field(problem, "choices", list, where), field(problem, "answer", int, where)
    if not 0 <= answer < len(choices):
        raise BenchmarkError(f"{where}: answer {answer} is none of its {len(choices)} choices")
    images: tuple = ()
    if problem.get("image"):
        name = f"{pid}/{field(problem, 'image', str, where)}"
        # minitest and minival are parts of test and val, whose folders hold the images
        folder = source.split.removeprefix("mini")
        images = (find_image(source, (f"{folder}/{name}", name), where),)
    hint = field(problem, "hint", str, where)
    return Item(
        pid,
        _prompt(field(problem, "question", str, where), hint, choices),
        images,
        {
            "answer": LETTERS[answer],
            "choices": len(choices),
            "subject": field(problem, "subject", str, where),
            "grade": int(field(problem, "grade", str, where).removeprefix("grade")),
            "has_text": bool(hint),
            "has_image": bool(images),
        },
    )


def _prompt(question: str, hint: str, choices: Sequence[str]) -> str:
    """The prompt in the CQM-A form, with which LLaVA was evaluated."""
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    text = f"Context: {hint.strip() or 'N/A'}\nQuestion: {question}\nOptions: {options}"
    return f"{text.replace('  ', ' ').strip()}\n{OPTION_LETTER}"


def score(items: Sequence[Item], answers: Answers) -> Metrics:
    """Accuracy in percent over all questions, and for the other columns of the paper.

    An answer that names no choice is wrong. Sources: eval_science_qa.py of LLaVA, evaluate_acc.py of
    lupantech/ScienceQA.
    """
    right = [(i.metadata, float(_is_right(i, answers[i.id]))) for i in items]
    columns: dict[str, Callable[[dict[str, Any]], bool]] = {
        **{name: functools.partial(_has_subject, subject) for name, subject in _SUBJECTS.items()},
        "text": lambda m: m["has_text"],
        "image": lambda m: m["has_image"],
        "no_context": lambda m: not m["has_text"] and not m["has_image"],
        "grade_1_6": lambda m: m["grade"] <= 6,
        "grade_7_12": lambda m: m["grade"] >= 7,
    }
    picked = {name: [s for m, s in right if belongs(m)] for name, belongs in columns.items()}
    return {
        "accuracy": mean_percent([s for _, s in right]),
        **{name: mean_percent(s) for name, s in picked.items() if s},
    }


def _has_subject(subject: str, metadata: dict[str, Any]) -> bool:
    return metadata["subject"] == subject


def _is_right(item: Item, answer: str) -> bool:
    letter = scienceqa_letter(answer)
    return (
        letter is not None
        and letter in LETTERS[: item.metadata["choices"]]
        and letter == item.metadata["answer"]
    )


SCIENCEQA = Benchmark("scienceqa", read, score)
