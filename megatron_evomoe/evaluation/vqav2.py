"""VQAv2: open questions, with the answers of ten people each. Those of the test splits are not public."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_evomoe.evaluation.item import Answers, Benchmark, BenchmarkError, Item, Metrics, Source
from megatron_evomoe.evaluation.normalize import evalai_answer, vqa_answer
from megatron_evomoe.evaluation.prompts import short_answer
from megatron_evomoe.evaluation.published_files import field, find_image, read_json
from megatron_evomoe.evaluation.scores import leave_one_out, mean_by, mean_percent
from megatron_evomoe.evaluation.textvqa import submission


def read(source: Source) -> list[Item]:
    """Read the questions, and the annotations if they are given.

    The files are ``v2_OpenEnded_mscoco_<split>_questions.json`` and ``v2_mscoco_<split>_annotations.json``.

    ``data_subtype`` (val2014, test2015, test-dev2015) is part of the images' names, for example
    ``COCO_val2014_000000000042.jpg``.
    """
    path = str(source.questions)
    document = read_json(source.questions)
    split = field(document, "data_subtype", str, path).replace("test-dev", "test")
    known = _annotations(source.annotations) if source.annotations else None
    items = []
    for number, record in enumerate(field(document, "questions", list, path)):
        where = f"{path}: questions[{number}]"
        question_id = field(record, "question_id", int, where)
        name = f"COCO_{split}_{field(record, 'image_id', int, where):012d}.jpg"
        if known is not None and question_id not in known:
            raise BenchmarkError(f"{where}: question_id {question_id} is not in {source.annotations}")
        items.append(
            Item(
                id=str(question_id),
                prompt=short_answer(field(record, "question", str, where)),
                images=(find_image(source, (name, f"{split}/{name}"), where),),
                metadata={"answer": None} if known is None else known[question_id],
            )
        )
    return items


def _annotations(path: Path) -> Mapping[int, dict[str, Any]]:
    found = {}
    for number, record in enumerate(field(read_json(path), "annotations", list, str(path))):
        where = f"{path}: annotations[{number}]"
        references = [
            field(answer, "answer", str, f"{where}.answers")
            for answer in field(record, "answers", list, where)
        ]
        found[field(record, "question_id", int, where)] = {
            "answer": references,
            "answer_type": field(record, "answer_type", str, where),
            "question_type": field(record, "question_type", str, where),
        }
    return found


def score(items: Sequence[Item], answers: Answers) -> Metrics:
    """Soft accuracy in percent: overall, by answer type and by question type.

    The answers are scored in the form in which `submission` writes them, so the server would give the same
    score. Source: vqaEval.py of GT-Vision-Lab/VQA.
    """
    if any(not item.metadata["answer"] for item in items):
        return {}
    scores = [_soft(evalai_answer(answers[item.id]), item.metadata["answer"]) for item in items]
    return {
        "accuracy": mean_percent(scores),
        "by_answer_type": mean_by((i.metadata["answer_type"], s) for i, s in zip(items, scores, strict=True)),
        "by_question_type": mean_by(
            (i.metadata["question_type"], s) for i, s in zip(items, scores, strict=True)
        ),
    }


def _soft(answer: str, references: Sequence[str]) -> float:
    """The official script normalises answer and references only if the references differ."""
    references = [reference.replace("\n", " ").replace("\t", " ").strip() for reference in references]
    if len(set(references)) > 1:
        answer, references = vqa_answer(answer), [vqa_answer(reference) for reference in references]
    return leave_one_out(answer, references)


VQAV2 = Benchmark("vqav2", read, score, submission)
