"""TextVQA 0.5.1: questions about text in images, with the answers of ten people each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_evomoe.data.files import write_atomically
from megatron_evomoe.evaluation.item import Answers, Benchmark, Item, Metrics, Source
from megatron_evomoe.evaluation.normalize import evalai_answer
from megatron_evomoe.evaluation.prompts import SHORT_ANSWER, short_answer
from megatron_evomoe.evaluation.published_files import field, find_image, read_json
from megatron_evomoe.evaluation.scores import leave_one_out, mean_percent


def read(source: Source) -> list[Item]:
    """Read ``TextVQA_0.5.1_val.json``: ``data`` is a list of question_id, image_id, question and answers.

    The test split has no answers. With `ocr_tokens`, the tokens of each image follow its question, as in the
    evaluation of LLaVA-1.5.
    """
    tokens = _ocr_tokens(source.ocr_tokens) if source.ocr_tokens else None
    items = []
    for number, record in enumerate(field(read_json(source.questions), "data", list, str(source.questions))):
        where = f"{source.questions}: data[{number}]"
        image = field(record, "image_id", str, where)
        question = field(record, "question", str, where)
        references = field(record, "answers", list, where) if "answers" in record else None
        folders = ("", "train_images/", "test_images/", "train_val_images/train_images/")
        items.append(
            Item(
                id=str(field(record, "question_id", int, where)),
                prompt=short_answer(question)
                if tokens is None
                else _with_tokens(question, tokens.get(image, [])),
                images=(find_image(source, tuple(f"{folder}{image}.jpg" for folder in folders), where),),
                metadata={"answer": references or None},
            )
        )
    return items


def _ocr_tokens(path: Path) -> Mapping[str, list[str]]:
    """Image id -> OCR tokens, from ``TextVQA_Rosetta_OCR_v0.2_val.json``."""
    records = field(read_json(path), "data", list, str(path))
    names = [f"{path}: data[{number}]" for number in range(len(records))]
    return {
        field(r, "image_id", str, where): field(r, "ocr_tokens", list, where)
        for r, where in zip(records, names, strict=True)
    }


def _with_tokens(question: str, tokens: Sequence[str]) -> str:
    return f"{question.strip()}\nReference OCR token: {', '.join(tokens)}\n{SHORT_ANSWER}"


def score(items: Sequence[Item], answers: Answers) -> Metrics:
    """Mean soft accuracy of the normalised answers in percent.

    Source: TextVQAAccuracyEvaluator of facebookresearch/mmf.
    """
    known = [item for item in items if item.metadata["answer"]]
    if not known:
        return {}
    return {"accuracy": mean_percent([_soft(answers[i.id], i.metadata["answer"]) for i in known])}


def _soft(answer: str, references: Sequence[str]) -> float:
    return leave_one_out(evalai_answer(answer), [evalai_answer(reference) for reference in references])


def submission(items: Sequence[Item], answers: Answers, folder: Path) -> list[Path]:
    """Write ``submission.json`` for EvalAI: a list of question_id and normalised answer."""
    path = folder / "submission.json"
    rows = [{"question_id": int(item.id), "answer": evalai_answer(answers[item.id])} for item in items]
    write_atomically(path, json.dumps(rows).encode())
    return [path]


TEXTVQA = Benchmark("textvqa", read, score, submission)
