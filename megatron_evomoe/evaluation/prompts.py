"""The instructions LLaVA-1.5 puts under a question (docs/Evaluation.md of haotian-liu/LLaVA), which its
numbers depend on.
"""

from __future__ import annotations

from collections.abc import Sequence

SHORT_ANSWER = "Answer the question using a single word or phrase."
OPTION_LETTER = "Answer with the option's letter from the given choices directly."
OPTION_LETTER_CHINESE = "请直接回答选项字母。"
LETTERS = "ABCDEFGHIJ"


def short_answer(question: str) -> str:
    """A question that is answered in a word."""
    return f"{question.strip()}\n{SHORT_ANSWER}"


def option_lines(options: Sequence[str]) -> str:
    """``A. first`` and so on, one per line."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
