"""The instructions that LLaVA-1.5 adds to a question, on which its published scores depend.

Source: docs/Evaluation.md of haotian-liu/LLaVA.
"""

from __future__ import annotations

from collections.abc import Sequence

SHORT_ANSWER = "Answer the question using a single word or phrase."
OPTION_LETTER = "Answer with the option's letter from the given choices directly."
OPTION_LETTER_CHINESE = "请直接回答选项字母。"
LETTERS = "ABCDEFGHIJ"


def short_answer(question: str) -> str:
    """The question with the instruction to answer in a word or phrase."""
    return f"{question.strip()}\n{SHORT_ANSWER}"


def option_lines(options: Sequence[str]) -> str:
    """The options as lines: ``A. first``, ``B. second`` …"""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
