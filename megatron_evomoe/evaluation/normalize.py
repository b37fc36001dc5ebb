"""Turns a model's answer into the form that a benchmark's official evaluation compares."""

from __future__ import annotations

import re
from collections.abc import Mapping

# The contractions in the VQA evaluation, correctly spelled. It corrects a missing apostrophe. (Its table also
# has I'm, I've and I'd've, but with a capital I, while only lower-case words are looked up.)
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
"""
_NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_WITH_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the official script hands re.UNICODE, which is 32, to the parameter that is the count


def _misspellings() -> dict[str, str]:
    found = {"somebody'd": "somebodyd"}  # sic, in the official table
    for word in _CONTRACTIONS.split():
        apostrophes = [i for i, letter in enumerate(word) if letter == "'"]
        found |= {word[:i] + word[i + 1 :]: word for i in apostrophes}
    return found


_SPELLING = _misspellings()


def vqa_answer(text: str) -> str:
    """Normalise punctuation, digits, articles and contractions as the official VQA evaluation does.

    Source: ``processPunctuation`` and ``processDigitArticle`` of GT-Vision-Lab/VQA, vqaEvaluation/vqaEval.py.
    """
    words = _without_punctuation(_one_line(text)).lower().split()
    words = [_NUMBERS.get(word, word) for word in words]
    return " ".join(_SPELLING.get(word, word) for word in words if word not in _ARTICLES)


def evalai_answer(text: str) -> str:
    """Normalise an answer as TextVQA's evaluation does, and LLaVA-1.5 before it submits VQAv2 answers.

    Commas and question marks are removed and a possessive becomes a word of its own; then the VQA rules
    apply. Source: ``EvalAIAnswerProcessor`` of facebookresearch/mmf.
    """
    return vqa_answer(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """Remove or replace punctuation marks.

    A mark beside a space is removed, and every mark if the text has a number such as 1,000. Other marks
    become spaces.
    """
    has_number = _NUMBER_WITH_COMMA.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        at_edge = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if at_edge or has_number else " ")
    return _PERIOD.sub("", out, count=_MOST_PERIODS)


def pope_yes_no(text: str) -> str:
    """``no`` if the first sentence has the word no, No or not, else ``yes``.

    Source: evaluate.py of AoiDragon/POPE.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def mme_yes_no(text: str) -> str:
    """``yes``, ``no`` or ``other``, by the first four characters.

    Source: MME's eval_tool/calculation.py.
    """
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def gqa_answer(text: str) -> str:
    """Lower case without the final period.

    LLaVA-1.5 passes such answers to GQA's eval.py, which compares exactly.
    """
    return text.strip().rstrip(".").lower()


def scienceqa_letter(text: str) -> str | None:
    """The letter in ``B``, ``B. …`` or a single ``The answer is B.``; None otherwise.

    Source: eval_science_qa.py of LLaVA.
    """
    text = text.strip()
    if text in set("ABCDE"):
        return text
    if len(text) >= 3 and text[0] in "ABCDE" and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else None


_MMBENCH_MARKS = str.maketrans({mark: " " for mark in ".()[],:;!*#{}"})


def mmbench_letter(text: str, options: Mapping[str, str]) -> str | None:
    """The option that an answer names, by its letter near the end or else by its text.

    None if it names no option or several.

    Source: ``can_infer`` of open-compass/VLMEvalKit (matching_util.py) with exact matching, which asks no
        judge
    model.
    """
    words = text.translate(_MMBENCH_MARKS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    spoken = re.search(r"answer\s+is\s+\**([ABCD])\**", text, re.IGNORECASE)
    if spoken and spoken[1].upper() in options:
        return spoken[1].upper()
    if len(text) > 2 * sum(map(len, options.values())):
        return None
    quoted = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return quoted[0] if len(quoted) == 1 else None
