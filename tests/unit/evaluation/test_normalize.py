from __future__ import annotations

import pytest

from megatron_evomoe.evaluation import normalize


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        ("Two dogs", "2 dogs"),  # number words become digits
        ("The cat on a mat", "cat on mat"),  # articles are removed
        ("none", "0"),
        ("dont know", "don't know"),  # a missing apostrophe is restored
        ("couldnt've", "couldn't've"),
        ("twas", "'twas"),
        ("t-shirt", "t shirt"),  # a mark between letters becomes a space
        ("red - blue", "red blue"),  # a mark beside a space is removed; one space remains
        ("1,000-x", "1000x"),  # a number with a comma: every mark is removed
        ("3.5", "3.5"),  # a period before a digit stays
        ("u.s.", "us"),
        ("a\nb\tc", "b c"),
        ("", ""),
    ],
)
def test_vqa_answer(text, expected):
    assert normalize.vqa_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Dog's?", "dog 's"),
        ("1,000", "1000"),
        ("Nokia, Inc.", "nokia inc"),
        ("10:30", "10:30"),
    ],
)
def test_evalai_answer(text, expected):
    assert normalize.evalai_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("no", "no"),
        ("No, there is none.", "no"),
        ("There is not", "no"),
        ("yes. But no", "yes"),
        ("NO", "yes"),  # the official script knows only No and no
        ("nothing", "yes"),
    ],
)
def test_pope_yes_no(text, expected):
    assert normalize.pope_yes_no(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("No.", "no"),
        (" no", "no"),
        ("It is no", "other"),
        ("", "other"),
        ("Not so", "no"),
    ],
)
def test_mme_yes_no(text, expected):
    assert normalize.mme_yes_no(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("C. the third", "C"),
        ("The answer is D.", "D"),
        ("b", None),
        ("F", None),
        ("(A)", None),
        ("The answer is A. The answer is B.", None),
    ],
)
def test_scienceqa_letter(text, expected):
    assert normalize.scienceqa_letter(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(C) cat", "B"),
        ("The answer is A", "A"),
        ("a red dog", "A"),
        ("A or B", None),
        ("bird", None),
        ("A big grey animal that sleeps all day", None),  # here the letter is a word, far from the end
    ],
)
def test_mmbench_letter(text, expected):
    assert normalize.mmbench_letter(text, {"A": "dog", "B": "cat"}) == expected


def test_gqa_answer():
    assert normalize.gqa_answer("Traffic light. ") == "traffic light"
