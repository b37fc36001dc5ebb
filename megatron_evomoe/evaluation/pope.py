"""POPE: questions whether an object is in an image, in one file for each sampling of absent objects."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_evomoe.evaluation.item import Answers, Benchmark, BenchmarkError, Item, Metrics, Source
from megatron_evomoe.evaluation.normalize import pope_yes_no
from megatron_evomoe.evaluation.prompts import short_answer
from megatron_evomoe.evaluation.published_files import field, find_image, one_of, read_json_lines
from megatron_evomoe.evaluation.scores import grouped, percent


def read(source: Source) -> list[Item]:
    """Read a file such as ``coco_pope_random.json``, or a folder of them.

    Each line is a JSON object with question_id, image, text and label.
    """
    files = [source.questions]
    if source.questions.is_dir():
        files = sorted(source.questions.glob("*_pope_*.json"))
        if not files:
            raise BenchmarkError(f"{source.questions} holds no *_pope_*.json")
    items = []
    for path in files:
        category = path.stem.split("_pope_")[-1]
        for where, record in read_json_lines(path):
            items.append(_item(record, category, where, source))
    return items


def _item(record: dict, category: str, where: str, source: Source) -> Item:
    name = field(record, "image", str, where)
    return Item(
        id=f"{category}/{field(record, 'question_id', (int, str), where)}",
        prompt=short_answer(field(record, "text", str, where)),
        images=(find_image(source, (name, f"val2014/{name}"), where),),
        metadata={
            "category": category,
            "answer": one_of(field(record, "label", str, where), ("yes", "no"), where, "label"),
        },
    )


def score(items: Sequence[Item], answers: Answers) -> Metrics:
    """Accuracy, precision, recall, F1 (yes is positive) and share of yes in percent, by category and mean.

    Source: evaluate.py of AoiDragon/POPE, which LLaVA's eval_pope.py follows.
    """
    pairs = grouped(
        (i.metadata["category"], (pope_yes_no(answers[i.id]), i.metadata["answer"])) for i in items
    )
    by_category = {category: _confusion(found) for category, found in pairs.items()}
    names = next(iter(by_category.values()))
    mean = {name: sum(m[name] for m in by_category.values()) / len(by_category) for name in names}
    return {**mean, "by_category": by_category}


def _confusion(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    tp, fp = pairs.count(("yes", "yes")), pairs.count(("yes", "no"))
    tn, fn = pairs.count(("no", "no")), pairs.count(("no", "yes"))
    return {
        "accuracy": percent(tp + tn, len(pairs)),
        "precision": percent(tp, tp + fp),
        "recall": percent(tp, tp + fn),
        "f1": percent(2 * tp, 2 * tp + fp + fn),
        "yes_ratio": percent(tp + fp, len(pairs)),
    }


POPE = Benchmark("pope", read, score)
