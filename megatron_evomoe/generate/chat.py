"""A conversation over standard input and output, answered word by word."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_evomoe.generate.dialogue import Conversation
from megatron_evomoe.generate.loading import LoadedModel, ModelError

HELP = "/image PATH adds an image to your next message, /reset forgets the conversation, /quit leaves"


def chat(model: LoadedModel, conversation: Conversation, settings: dict[str, Any]) -> None:
    """Read lines and answer them until ``/quit`` or the end of the input. A line that cannot be answered is
    told and forgotten.

    Args:
        settings: arguments of transformers' ``generate``.
    """
    print(HELP, file=sys.stderr)
    for line in _lines():
        try:
            if line == "/quit":
                return
            if line.startswith("/"):
                _command(line, conversation)
            elif line:
                conversation.ask(line)
                _answer(model, conversation, settings)
        except ModelError as error:
            print(f"error: {error}", file=sys.stderr)


def _lines() -> Iterator[str]:
    """What the user types, stripped; the prompt is shown to people only."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            return


def _command(line: str, conversation: Conversation) -> None:
    name, _, rest = line.partition(" ")
    if name == "/image" and rest.strip():
        conversation.attach(Path(rest.strip()).expanduser())
    elif line == "/reset":
        conversation.reset()
    else:
        print(HELP, file=sys.stderr)


def _answer(model: LoadedModel, conversation: Conversation, settings: dict[str, Any]) -> None:
    try:
        conversation.answered(
            reply(model, conversation, settings, print_text=lambda text: print(text, end="", flush=True))
        )
    except ModelError:
        conversation.withdraw()
        raise
    except KeyboardInterrupt:  # stops the answer, not the conversation
        conversation.withdraw()
        print("\nstopped; the question is forgotten", file=sys.stderr)


def reply(
    model: LoadedModel,
    conversation: Conversation,
    settings: dict[str, Any],
    print_text: Callable[[str], None],
) -> str:
    """Answer the last question, printing words as they are chosen (all at the end under beam search, which
    revises them).

    Raises:
        ModelError: the conversation has no room for an answer.
    """
    batch = model.encode([conversation.messages], conversation.images)
    if settings.get("num_beams", 1) > 1:
        answer = model.answer(batch, **settings)[0]
        print_text(answer + "\n")
        return answer
    return model.answer(batch, streamer=_streamer(model, print_text), **settings)[0]


def _streamer(model: LoadedModel, print_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Printer(TextStreamer):
        begun = False

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            text = (
                text if self.begun else text.lstrip()
            )  # the space many tokenizers put before the first word
            self.begun = self.begun or bool(text)
            print_text(text + ("\n" if stream_end else ""))

    return Printer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
