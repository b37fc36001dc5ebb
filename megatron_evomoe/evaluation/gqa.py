"""GQA: compositional questions generated from scene graphs, with one answer each."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_evomoe.data.files import write_atomically
from megatron_evomoe.evaluation.item import Answers, Benchmark, BenchmarkError, Item, Metrics, Source
from megatron_evomoe.evaluation.normalize import gqa_answer
from megatron_evomoe.evaluation.prompts import short_answer
from megatron_evomoe.evaluation.published_files import field, find_image, read_json
from megatron_evomoe.evaluation.scores import grouped, mean_by, mean_percent


def read(source: Source) -> list[Item]:
    """Read ``testdev_balanced_questions.json``.

    It maps a question id to question, imageId, isBalanced, answer, types and groups. The test and challenge
    splits have no answer.
    """
    questions = read_json(source.questions)
    if not isinstance(questions, dict):
        raise BenchmarkError(
            f"{source.questions}: expected an object of question id to question, got a "
            f"{type(questions).__name__}"
        )
    return [_item(question_id, record, source) for question_id, record in questions.items()]


def _item(question_id: str, record: dict, source: Source) -> Item:
    where = f"{source.questions}: {question_id!r}"
    name = f"{field(record, 'imageId', str, where)}.jpg"
    metadata: dict = {"answer": None}
    if "answer" in record:
        types = field(record, "types", dict, where)
        metadata = {
            "answer": field(record, "answer", str, where),
            "balanced": bool(record.get("isBalanced", True)),
            "structural": field(types, "structural", str, f"{where}.types"),
            "semantic": field(types, "semantic", str, f"{where}.types"),
            "global_group": (record.get("groups") or {}).get("global"),
        }
    return Item(
        question_id,
        short_answer(field(record, "question", str, where)),
        (find_image(source, (name, f"images/{name}"), where),),
        metadata,
    )


def score(items: Sequence[Item], answers: Answers) -> Metrics:
    """Exact accuracy in percent over the balanced questions: all, binary, open, and by type.

    `distribution` is the distance of the answers' distribution from the true one.

    Source: GQA's eval.py. Its consistency, validity, plausibility and grounding need more files and are left
    out.
    """
    known = [item for item in items if item.metadata["answer"] is not None and item.metadata["balanced"]]
    if not known:
        return {}
    right = [(i.metadata, float(gqa_answer(answers[i.id]) == i.metadata["answer"])) for i in known]
    return {
        "accuracy": mean_percent([s for _, s in right]),
        **mean_by(("open" if m["structural"] == "query" else "binary", s) for m, s in right),
        **_distribution(known, answers),
        "by_structural_type": mean_by((m["structural"], s) for m, s in right),
        "by_semantic_type": mean_by((m["semantic"], s) for m, s in right),
    }


def _distribution(items: Sequence[Item], answers: Answers) -> Metrics:
    """Chi-square distance of given from true answers, a mean over groups weighted by size; 0 is best."""
    groups = grouped((i.metadata["global_group"], i) for i in items if i.metadata["global_group"] is not None)
    if not groups:
        return {}
    total = 0.0
    for members in groups.values():
        true = Counter(i.metadata["answer"] for i in members)
        given = Counter(gqa_answer(answers[i.id]) for i in members)
        total += len(members) * sum((given[answer] - count) ** 2 / count for answer, count in true.items())
    return {"distribution": total / sum(map(len, groups.values()))}


def submission(items: Sequence[Item], answers: Answers, folder: Path) -> list[Path]:
    """Write ``submission.json`` with questionId and prediction, for the server and for eval.py."""
    path = folder / "submission.json"
    rows = [{"questionId": item.id, "prediction": gqa_answer(answers[item.id])} for item in items]
    write_atomically(path, json.dumps(rows).encode())
    return [path]


GQA = Benchmark("gqa", read, score, submission)
