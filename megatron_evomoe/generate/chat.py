"""A chat with a model on standard input and output, with answers printed word by word."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_evomoe.generate.dialogue import Dialogue
from megatron_evomoe.generate.loading import LoadedModel, ModelError

HELP = "/image PATH adds an image to your next message, /reset starts a new conversation, /quit ends the chat"


def chat(model: LoadedModel, dialogue: Dialogue, settings: dict[str, Any]) -> None:
    """Read lines and answer them until ``/quit`` or the end of the input.

    A line that cannot be answered is reported and removed from the conversation.

    Args:
        settings: arguments of transformers' ``generate``.
    """
    print(HELP, file=sys.stderr)
    for line in _lines():
        try:
            if line == "/quit":
                return
            if line.startswith("/"):
                _command(line, dialogue)
            elif line:
                dialogue.ask(line)
                _answer(model, dialogue, settings)
        except ModelError as error:
            print(f"error: {error}", file=sys.stderr)


def _lines() -> Iterator[str]:
    """The lines of standard input, stripped. A prompt is shown if it is a terminal."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            return


def _command(line: str, dialogue: Dialogue) -> None:
    name, _, rest = line.partition(" ")
    if name == "/image" and rest.strip():
        dialogue.attach(Path(rest.strip()).expanduser())
    elif line == "/reset":
        dialogue.reset()
    else:
        print(HELP, file=sys.stderr)


def _answer(model: LoadedModel, dialogue: Dialogue, settings: dict[str, Any]) -> None:
    try:
        dialogue.answered(
            reply(model, dialogue, settings, print_text=lambda text: print(text, end="", flush=True))
        )
    except ModelError:
        dialogue.withdraw()
        raise
    except KeyboardInterrupt:  # ends the answer, not the chat
        dialogue.withdraw()
        print("\nstopped; the question is removed from the conversation", file=sys.stderr)


def reply(
    model: LoadedModel,
    dialogue: Dialogue,
    settings: dict[str, Any],
    print_text: Callable[[str], None],
) -> str:
    """Answer the last question and print the answer.

    Words are printed as they are generated; under beam search, which revises them, all at the end.

    Args:
        settings: arguments of transformers' ``generate``.
        print_text: is called with each piece of the answer.

    Returns:
        The answer.

    Raises:
        ModelError: the conversation is too long for an answer.
    """
    batch = model.encode([dialogue.messages], dialogue.images)
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
                text if self.begun else text.lstrip()  # many tokenizers put a space before the first word
            )
            self.begun = self.begun or bool(text)
            print_text(text + ("\n" if stream_end else ""))

    return Printer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
