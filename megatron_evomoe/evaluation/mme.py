"""MME: two yes/no questions about each image, in 14 categories of perception and cognition."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_evomoe.evaluation.item import Answers, Benchmark, BenchmarkError, Item, Metrics, Source
from megatron_evomoe.evaluation.normalize import mme_yes_no
from megatron_evomoe.evaluation.prompts import short_answer
from megatron_evomoe.evaluation.published_files import find_image, one_of, read_text
from megatron_evomoe.evaluation.scores import grouped, mean_percent

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_YES_NO = "Please answer yes or no."


def read(source: Source) -> list[Item]:
    """Read the release's folder.

    It has ``<category>/questions_answers_YN/*.txt`` beside ``<category>/images/``, or both in
    ``<category>/``.

    A text file has the name of its image and two lines ``question TAB Yes|No``.
    """
    if not source.questions.is_dir():
        raise BenchmarkError(
            f"{source.questions} is not a folder; give the folder with MME's <category>/*.txt"
        )
    source = replace(source, images=source.images or source.questions)
    items = [item for category in (*PERCEPTION, *COGNITION) for item in _category(category, source)]
    if not items:
        raise BenchmarkError(
            f"{source.questions} holds none of MME's categories ({', '.join(PERCEPTION[:3])}, …)"
        )
    return items


def _category(category: str, source: Source) -> Iterator[Item]:
    folder = source.questions / category
    nested = folder / "questions_answers_YN"
    for path in sorted((nested if nested.is_dir() else folder).glob("*.txt")):
        names = tuple(
            f"{category}/{below}{path.stem}{end}"
            for below in ("images/", "")
            for end in (".jpg", ".png", ".jpeg")
        )
        image = find_image(source, names, str(path))
        for number, (question, answer) in enumerate(_questions(path)):
            group = f"{category}/{path.stem}"
            yield Item(
                f"{group}/{number}",
                short_answer(question.replace(_YES_NO, "")),
                (image,),
                {"category": category, "answer": answer},
                group,
            )


def _questions(path: Path) -> list[tuple[str, str]]:
    found = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        question, tab, answer = line.rpartition("\t")
        if not tab:
            raise BenchmarkError(f"{path}:{number} is not 'question TAB Yes|No'")
        found.append((question, one_of(answer, ("yes", "no"), f"{path}:{number}", "the answer")))
    if len(found) != 2:
        raise BenchmarkError(f"{path} has {len(found)} questions; MME has two for each image")
    return found


def score(items: Sequence[Item], answers: Answers) -> Metrics:
    """For each category accuracy, acc+ (both questions of an image right) and their sum; and the totals.

    The totals of perception and cognition are given if all their categories are present. Source: MME's
    eval_tool/calculation.py.
    """
    right = grouped(
        (i.metadata["category"], (i.group, mme_yes_no(answers[i.id]) == i.metadata["answer"])) for i in items
    )
    by_category = {category: _category_score(found) for category, found in right.items()}
    totals = {
        name: sum(by_category[c]["score"] for c in parts)
        for name, parts in (("perception", PERCEPTION), ("cognition", COGNITION))
        if set(parts) <= set(by_category)
    }
    return {**totals, "by_category": by_category}


def _category_score(found: Sequence[tuple[str | None, bool]]) -> dict[str, float]:
    acc = mean_percent([right for _, right in found])
    acc_plus = mean_percent([all(both) for both in grouped(found).values()])
    return {"acc": acc, "acc_plus": acc_plus, "score": acc + acc_plus}


MME = Benchmark("mme", read, score)
