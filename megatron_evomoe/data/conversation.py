"""LLaVA conversations to token ids, token types and labels.

A conversation is written as a list of *pieces*. Each is known to be prompt or answer before it is encoded,
and the label mask follows from that. Nothing is searched for in decoded text, which gave silently wrong masks
in LLaVA (#1166, #1706, #1710). The prompt for generation is the same list of pieces, cut before an answer,
and is therefore a prefix of the training sequence.

The forms follow LLaVA and MoE-LLaVA. What stands in [] is supervised; END is the template's end-of-turn
token:

    plain              <image> [caption \\n END]       what the human says beside the image is dropped
    v1 phi stablelm    SYSTEM USER: q ASSISTANT:[ a END]USER: …       they differ in END only
    qwen               <|im_start|>system\\nSYSTEM<|im_end|>\\n<|im_start|>user\\nq<|im_end|>\\n
                       <|im_start|>assistant\\n[a END]                 on one line
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_evomoe.config import ConfigError
from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.data.errors import SampleError
from megatron_evomoe.data.media import IMAGE_TOKEN, check_placeholders, short
from megatron_evomoe.data.tokenizer import Tokenizer

IGNORE_INDEX = -100

_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_TOOL_ROLES = frozenset(
    [
        "tool",
        "tools",
        "tool_call",
        "tool_calls",
        "tool_response",
        "tool_result",
        "function",
        "function_call",
        "function_response",
        "observation",
        "ipython",
        "environment",
    ]
)
# characters of a position; the longest pieces of vocabularies in use are shorter, except for runs of spaces
_MAX_CHARACTERS = 64
_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}


@dataclass
class EncodedSample:
    """One sequence of s positions.

    Attributes:
        tokens: the input ids; pad_id at the positions of images.
        labels: the id to predict at each position i: tokens[i + 1] where that is part of an answer, else
            -100.
        token_types: TEXT or VISION.
    """

    tokens: list[int]
    labels: list[int]
    token_types: list[TokenType]

    @property
    def num_supervised(self) -> int:
        """The number of positions that have a label."""
        return sum(label != IGNORE_INDEX for label in self.labels)


@dataclass(frozen=True)
class Template:
    """How the turns of a conversation are written as text."""

    style: Literal["plain", "roles", "chatml"]
    system: str = ""
    end: str | None = None
    """The end-of-turn token; a tokenizer that lacks it uses its own end-of-text token."""
    markup: tuple[str, ...] = ()
    """Texts that must be single tokens of the tokenizer."""


TEMPLATES: dict[str, Template] = {
    "plain": Template(style="plain"),
    "v1": Template(style="roles", system=_VICUNA, end="</s>"),
    "phi": Template(style="roles", system=_VICUNA, end="<|endoftext|>"),
    "stablelm": Template(style="roles", system=_VICUNA, end="<|endoftext|>"),
    "qwen": Template(
        style="chatml",
        system="You are a helpful assistant.",
        end="<|im_end|>",
        markup=("<|im_start|>", "<|im_end|>"),
    ),
}


@dataclass(frozen=True)
class Turn:
    """One message, without whitespace at its ends."""

    role: Literal["human", "gpt", "system"]
    text: str


@dataclass(frozen=True)
class Piece:
    """A piece of a sequence: plain text, a special token by name, the end-of-turn token, or an image."""

    kind: Literal["text", "special", "end", "image"]
    text: str = ""
    answer: bool = False
    first_of_answer: bool = False


def parse_turns(conversations: Any, num_images: int | None = None) -> list[Turn]:
    """Check a LLaVA ``conversations`` list and return it as [system,] human, gpt, human, gpt … [, human].

    As in LLaVA, a gpt turn before the first human turn is dropped, and a single ``<image>`` at either end of
    a turn is moved to its front, on a line of its own. Several of them, or one inside the text, stay where
    they are.

    Args:
        num_images: the number of images that the text must have places for; None accepts any.

    Raises:
        SampleError: no-conversation, bad-turn (not a role and a text), tool-turn, bad-text,
            media-placeholder, turn-order, empty-answer, image-count.
    """
    if not isinstance(conversations, list) or not conversations:
        raise SampleError(
            "no-conversation", f"conversations is {short(conversations)}; a list of turns is expected"
        )
    turns = [_parse_turn(turn) for turn in conversations]
    system = [turns.pop(0)] if turns[0].role == "system" else []
    if turns and turns[0].role == "gpt":
        turns.pop(0)
    if not turns:
        raise SampleError("no-conversation", "no human turn")
    for i, turn in enumerate(turns):
        if turn.role != ("human", "gpt")[i % 2]:
            raise SampleError("turn-order", f"turn {i} is {turn.role!r}; human and gpt must alternate")
        if turn.role == "gpt" and not turn.text:
            raise SampleError("empty-answer", f"gpt turn {i} is empty")
    found = sum(turn.text.count(IMAGE_TOKEN) for turn in turns if turn.role == "human")
    if num_images is not None and found != num_images:
        raise SampleError(
            "image-count", f"{found} {IMAGE_TOKEN} in the text, {num_images} images in the sample"
        )
    return system + turns


def _parse_turn(turn: Any) -> Turn:
    name, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
    if isinstance(name, str) and name.lower() in _TOOL_ROLES:
        raise SampleError("tool-turn", f"a turn of {short(name)}; conversations with tools are not read")
    if not isinstance(name, str) or name not in _ROLES or not isinstance(text, str):
        raise SampleError(
            "bad-turn", f'{short(turn)} is not {{"from": "human"|"gpt"|"system", "value": text}}'
        )
    _check_text(text)
    role, text = _ROLES[name], text.strip()
    check_placeholders(text, role)
    if (
        role == "human"
        and text.count(IMAGE_TOKEN) == 1
        and (text.startswith(IMAGE_TOKEN) or text.endswith(IMAGE_TOKEN))
    ):
        text = f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()
    return Turn(role, text)  # type: ignore[arg-type]


def _check_text(text: str) -> None:
    if "\0" in text:
        raise SampleError("bad-text", f"NUL in {short(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleError(
            "bad-text", f"{text[error.start]!r} in {short(text)} is half of a character"
        ) from None


def check_length(turns: Sequence[Turn], length: int) -> None:
    """Refuse, without tokenizing it, a conversation that cannot fit into `length` positions.

    Raises:
        SampleError: too-long; there are more answers than positions, or more than 64 characters for each
            position.
    """
    if least_length(turns) > length:
        answers, characters = _answers_and_characters(turns)
        raise SampleError(
            "too-long", f"{characters} characters and {answers} answers cannot fit into seq_length {length}"
        )


def least_length(turns: Sequence[Turn]) -> int:
    """The smallest length that `check_length` accepts for a conversation."""
    answers, characters = _answers_and_characters(turns)
    return max(answers, -(-characters // _MAX_CHARACTERS))


def _answers_and_characters(turns: Sequence[Turn]) -> tuple[int, int]:
    return sum(turn.role == "gpt" for turn in turns), sum(len(turn.text) for turn in turns)


def encode(
    conversations: Any,
    num_images: int,
    tokenizer: Tokenizer,
    template: str,
    tokens_per_image: int,
    *,
    max_length: int | None = None,
) -> EncodedSample:
    """Encode a conversation as a training sequence; each gpt turn and its end-of-turn token is supervised.

    Args:
        max_length: refuse conversations that are far longer than this, before they cost time
            (`check_length`); the result can still be longer.

    Raises:
        SampleError: what `parse_turns` and `check_length` raise, and no-conversation when there is no gpt
            turn.
        ConfigError: the template is unknown, or needs tokens that the tokenizer lacks.
    """
    turns = turns_to_learn(conversations, num_images, max_length=max_length)
    return _encode_pieces(
        list(pieces_of(turns, template_named(template))),
        tokenizer,
        template_named(template),
        tokens_per_image,
    )


def turns_to_learn(conversations: Any, num_images: int, *, max_length: int | None = None) -> list[Turn]:
    """The checked turns of a training sample.

    Raises:
        SampleError: as for `encode`.
    """
    turns = parse_turns(conversations, num_images)
    if max_length is not None:
        check_length(turns, max_length)
    if not any(turn.role == "gpt" for turn in turns):
        raise SampleError("no-conversation", "no gpt turn, so nothing to learn from")
    return turns


def encode_prompt(
    conversations: Any, num_images: int, tokenizer: Tokenizer, template: str, tokens_per_image: int
) -> EncodedSample:
    """Encode a conversation up to the start of its last answer; no position is supervised.

    The last answer is the last turn if that is a gpt turn, and otherwise the answer that is yet to be
    written.

    Args:
        num_images: the images of the given turns.

    Raises:
        SampleError: what `parse_turns` raises.
        ConfigError: as for `encode`.
    """
    turns = parse_turns(conversations, num_images)
    pieces = list(pieces_of(turns, template_named(template)))
    if turns[-1].role == "gpt":
        pieces = pieces[: max(i for i, piece in enumerate(pieces) if piece.first_of_answer)]
    sample = _encode_pieces(pieces, tokenizer, template_named(template), tokens_per_image)
    return EncodedSample(sample.tokens, [IGNORE_INDEX] * len(sample.tokens), sample.token_types)


def stop_ids(tokenizer: Tokenizer, template: str) -> set[int]:
    """The token ids that end an answer in generation."""
    return {end_id(tokenizer, template), tokenizer.eos_id}


def end_id(tokenizer: Tokenizer, template: str) -> int:
    """The id of the end-of-turn token."""
    return _end_id(tokenizer, template_named(template))


def check_template(tokenizer: Tokenizer, template: str) -> None:
    """Check that a template can be written with a tokenizer.

    Raises:
        ConfigError: the tokenizer lacks a special token of the template.
    """
    lacking = [piece for piece in template_named(template).markup if tokenizer.special_id(piece) is None]
    if lacking:
        raise ConfigError(
            f"conversation template {template!r} needs the special tokens {', '.join(lacking)}, which this "
            "tokenizer lacks; use template v1, or a tokenizer that has them"
        )


def template_named(name: str) -> Template:
    """The template of a name. Raises `ConfigError` if there is none."""
    if name not in TEMPLATES:
        raise ConfigError(f"unknown conversation template {name!r}; known: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def pieces_of(turns: Sequence[Turn], template: Template) -> Iterator[Piece]:
    """The pieces of a conversation, for training and generation alike."""
    system = template.system
    if turns[0].role == "system":
        system, turns = turns[0].text, turns[1:]
    if template.style == "roles":
        yield Piece("text", f"{system} " if system else "")
    elif template.style == "chatml" and system:
        yield from (
            Piece("special", "<|im_start|>"),
            Piece("text", f"system\n{system}"),
            Piece("special", "<|im_end|>"),
        )
    for i, turn in enumerate(turns):
        if turn.role == "human":
            yield from _human(turn.text, template, newline=bool(system) or i > 0)
        else:
            text = {"plain": f"{turn.text}\n", "roles": f" {turn.text}", "chatml": turn.text}[template.style]
            yield Piece("text", text, answer=True, first_of_answer=True)
            yield Piece("end", answer=True)


def _human(text: str, template: Template, *, newline: bool) -> Iterator[Piece]:
    if template.style == "plain":
        yield from (Piece("image") for _ in range(text.count(IMAGE_TOKEN)))
    elif template.style == "roles":
        yield from _with_images(f"USER: {text} ASSISTANT:")
    else:
        if newline:
            yield Piece("text", "\n")
        yield Piece("special", "<|im_start|>")
        yield from _with_images(f"user\n{text}")
        yield from (Piece("special", "<|im_end|>"), Piece("text", "\n"))
        yield from (Piece("special", "<|im_start|>"), Piece("text", "assistant\n"))


def _with_images(text: str) -> Iterator[Piece]:
    for part in re.split(f"({re.escape(IMAGE_TOKEN)})", text):
        if part == IMAGE_TOKEN:
            yield Piece("image")
        elif part:
            yield Piece("text", part)


def _encode_pieces(
    pieces: Sequence[Piece], tokenizer: Tokenizer, template: Template, tokens_per_image: int
) -> EncodedSample:
    tokens: list[int] = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    token_types, supervised = [TokenType.TEXT] * len(tokens), [False] * len(tokens)
    for piece in merged(pieces, tokenizer):
        if piece.kind == "image":
            ids = [tokenizer.pad_id] * tokens_per_image
        elif piece.kind == "end":
            ids = [_end_id(tokenizer, template)]
        elif piece.kind == "special":
            ids = [_special_id(tokenizer, piece.text)]
        else:
            ids = tokenizer.encode(piece.text)
        tokens += ids
        token_types += [TokenType.VISION if piece.kind == "image" else TokenType.TEXT] * len(ids)
        supervised += [piece.answer] * len(ids)
    following = zip(tokens[1:], supervised[1:], strict=True)
    labels = [token if answer else IGNORE_INDEX for token, answer in following]
    return EncodedSample(tokens, [*labels, IGNORE_INDEX] if tokens else [], token_types)


def merged(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[Piece]:
    """The pieces with neighbouring texts of the prompt as one text each; answers stay separate.

    Each text that comes out is one call of the tokenizer.
    """
    # a tokenizer that puts a space before every text was pretrained with one at the start only
    prefix, pending = getattr(tokenizer, "text_prefix", ""), ""
    for piece in pieces:
        if piece.kind == "text" and not piece.answer:
            pending += piece.text
            continue
        if pending:
            yield Piece("text", prefix + pending)
            prefix, pending = "", ""
        yield replace(piece, text=prefix + piece.text) if prefix and piece.kind == "text" else piece
        prefix = ""
    if pending:
        yield Piece("text", prefix + pending)


def _end_id(tokenizer: Tokenizer, template: Template) -> int:
    if template.end in template.markup:
        return _special_id(tokenizer, str(template.end))
    found = tokenizer.special_id(template.end) if template.end else None
    return tokenizer.eos_id if found is None else found


def _special_id(tokenizer: Tokenizer, piece: str) -> int:
    found = tokenizer.special_id(piece)
    if found is None:
        raise ConfigError(
            f"the conversation template needs the special token {piece}, which this tokenizer lacks; use "
            "template v1"
        )
    return found
