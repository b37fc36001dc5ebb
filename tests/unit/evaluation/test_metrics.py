"""Every metric is compared with cases worked out by hand; comments show the working."""

from __future__ import annotations

import pytest

from megatron_evomoe.evaluation import gqa, mmbench, mme, pope, scienceqa, textvqa, vqav2
from megatron_evomoe.evaluation.scores import leave_one_out

from .helpers import item


@pytest.mark.parametrize(
    ("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_leave_one_out(matches, expected):
    # k of 10 references agree. Leaving one out, k cases see k - 1 matches and 10 - k cases see k matches, so
    # the score is (k min(1, (k-1)/3) + (10-k) min(1, k/3)) / 10.
    # k = 1: (0 + 9/3) / 10 = 0.3; k = 2: (2/3 + 8 * 2/3) / 10 = 0.6; k = 3: (3 * 2/3 + 7) / 10 = 0.9.
    # From k = 4 on the score is 1.
    assert leave_one_out("x", ["x"] * matches + ["y"] * (10 - matches)) == pytest.approx(expected)


def test_pope():
    labels = ["yes", "yes", "yes", "no", "no"]
    items = [item(str(n), category="random", answer=label) for n, label in enumerate(labels)]
    answers = {"0": "Yes", "1": "yes, it is", "2": "No", "3": "no.", "4": "Yes."}
    # TP 2, FN 1, TN 1, FP 1: accuracy 3/5; precision 2/3; recall 2/3; F1 4 / (4 + 1 + 1) = 2/3; yes 3/5
    expected = {"accuracy": 60, "precision": 200 / 3, "recall": 200 / 3, "f1": 200 / 3, "yes_ratio": 60}
    assert pope.score(items, answers)["by_category"]["random"] == pytest.approx(expected)


def test_pope_mean_over_categories_and_no_yes_at_all():
    items = [item("a", category="random", answer="yes"), item("b", category="popular", answer="yes")]
    metrics = pope.score(items, {"a": "yes", "b": "no"})
    # random: every metric is 100. popular: every metric is 0 (no positives: precision 0). The mean is 50.
    assert metrics["f1"] == metrics["accuracy"] == metrics["yes_ratio"] == 50
    assert metrics["by_category"]["popular"]["precision"] == 0


def mme_items(category: str) -> list:
    return [
        item(f"{category}/{image}/{q}", f"{category}/{image}", category=category, answer=answer)
        for image in "xy"
        for q, answer in enumerate(("yes", "no"))
    ]


def test_mme_category():
    items = mme_items("count")
    answers = dict(zip([i.id for i in items], ["Yes", "No", "Yes", "maybe"], strict=True))
    # 3 of 4 are right: acc 75. Only x has both right: acc+ 50. The score is 125. There is no total, because
    # the other categories are missing.
    assert mme.score(items, answers) == {"by_category": {"count": {"acc": 75, "acc_plus": 50, "score": 125}}}


def test_mme_totals():
    items = [i for category in (*mme.PERCEPTION, *mme.COGNITION) for i in mme_items(category)]
    answers = {i.id: i.metadata["answer"] for i in items}
    metrics = mme.score(items, answers)
    # There are 10 and 4 categories of 100 + 100 each.
    assert (metrics["perception"], metrics["cognition"]) == (2000, 800)
    answers["code_reasoning/x/0"] = "No"
    # The score of code reasoning falls to 75 + 50.
    assert mme.score(items, answers)["cognition"] == 725


def test_textvqa():
    items = [
        item("1", answer=["Nokia"] * 2 + ["nokia phone"] * 8),
        item("2", answer=["2"] * 10),
        item("3", answer=None),
    ]
    # "NOKIA." normalises to nokia; 2 of 10 agree: 0.6. "Two" becomes 2: 1. The third item has no public
    # answer. The mean is 0.8.
    assert textvqa.score(items, {"1": "NOKIA.", "2": "Two", "3": "x"}) == pytest.approx({"accuracy": 80})
    assert textvqa.score(items[2:], {"3": "x"}) == {}


def vqa_item(name: str, answers: list[str], kind: str) -> object:
    return item(name, answer=answers, answer_type=kind, question_type="what")


def test_vqav2():
    items = [
        vqa_item("1", ["yes"] * 7 + ["no"] * 3, "yes/no"),
        vqa_item("2", ["3"] * 1 + ["4"] * 9, "number"),
        vqa_item("3", ["a dog"] * 3 + ["dog"] * 2 + ["cat"] * 5, "other"),
    ]
    # "No": 3 agree, 0.9. "three" becomes 3; 1 agrees, 0.3. "Dog": 5 references normalise to dog, 1. The mean
    # is 2.2 / 3.
    metrics = vqav2.score(items, {"1": "No", "2": "three", "3": "Dog"})
    assert metrics["accuracy"] == pytest.approx(220 / 3)
    assert metrics["by_answer_type"] == pytest.approx({"yes/no": 90, "number": 30, "other": 100})
    assert metrics["by_question_type"] == pytest.approx({"what": 220 / 3})


def test_vqav2_unanimous_references_stay_as_they_are():
    # The official script does not normalise unanimous references, so the answer "t shirt" differs from
    # "t-shirt"; "yes" equals "yes".
    items = [vqa_item("1", ["t-shirt"] * 10, "other"), vqa_item("2", ["yes"] * 10, "yes/no")]
    assert vqav2.score(items, {"1": "T-shirt", "2": "Yes."})["accuracy"] == 50


def test_vqav2_without_annotations():
    assert vqav2.score([item("1", answer=None)], {"1": "x"}) == {}


def gqa_item(name: str, answer: str, structural: str, group: str | None, balanced: bool = True) -> object:
    return item(
        name, answer=answer, structural=structural, semantic="attr", global_group=group, balanced=balanced
    )


def test_gqa():
    items = [
        *(
            gqa_item(name, answer, "query", "color")
            for name, answer in (("1", "red"), ("2", "blue"), ("3", "red"))
        ),
        gqa_item("4", "yes", "verify", None),
        gqa_item("5", "no", "logical", None),
        gqa_item("6", "x", "query", None, False),
    ]
    metrics = gqa.score(items, {"1": "Red.", "2": "red", "3": "green", "4": "Yes", "5": "yes", "6": "x"})
    # Of the five balanced items 1 and 4 are right. open: 1 of 3; binary: 1 of 2.
    assert metrics["accuracy"] == 40
    assert metrics["open"] == pytest.approx(100 / 3)
    assert metrics["binary"] == 50
    assert metrics["by_structural_type"] == pytest.approx({"query": 100 / 3, "verify": 100, "logical": 0})
    assert metrics["by_semantic_type"] == {"attr": 40}
    # One group. Reference answers: red 2, blue 1; given answers: red 2, green 1. (2-2)²/2 + (0-1)²/1 = 1.
    assert metrics["distribution"] == 1


def test_scienceqa():
    def question(name: str, answer: str, subject: str, grade: int, text: bool, image: bool) -> object:
        return item(
            name, answer=answer, choices=3, subject=subject, grade=grade, has_text=text, has_image=image
        )

    items = [
        question("1", "A", "natural science", 2, False, True),
        question("2", "B", "natural science", 8, True, True),
        question("3", "C", "social science", 6, False, False),
        question("4", "A", "language science", 7, True, False),
    ]
    metrics = scienceqa.score(items, {"1": "A", "2": "The answer is A.", "3": "C. right", "4": "D"})
    # Items 1 and 3 are right; "D" is not among three choices.
    assert metrics == {
        "accuracy": 50,
        "natural": 50,
        "social": 100,
        "language": 0,
        "text": 0,
        "image": 50,
        "no_context": 100,
        "grade_1_6": 100,
        "grade_7_12": 0,
    }


def test_mmbench_circular():
    def row(index: int, answer: str, category: str) -> object:
        return item(
            str(index),
            str(index % 1_000_000),
            answer=answer,
            options={"A": "dog", "B": "cat"},
            category=category,
            l2_category="",
            split="",
        )

    items = [
        row(1, "A", "colour"),
        row(1_000_001, "B", "colour"),
        row(2, "A", "shape"),
        row(1_000_002, "B", "shape"),
    ]
    metrics = mmbench.score(items, {"1": "A", "1000001": "B.", "2": "A", "1000002": "A"})
    # Question 1 is right in both rotations, question 2 only unrotated: circular 1 of 2, vanilla 2 of 2.
    assert metrics == {"accuracy": 50, "vanilla": 100, "by_category": {"colour": 100, "shape": 0}}
    assert mmbench.score([item("1", "1", answer=None)], {"1": "A"}) == {}
