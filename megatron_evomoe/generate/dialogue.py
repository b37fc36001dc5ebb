"""A conversation with pictures, as chat templates take it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_evomoe.data.errors import SampleError
from megatron_evomoe.data.image import decode_image
from megatron_evomoe.generate.loading import Message, ModelError, user_message


class Conversation:
    """Turns so far, and the images that go with the next one."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.images: list[np.ndarray] = []
        self._waiting: list[np.ndarray] = []

    def attach(self, path: Path) -> None:
        """Put an image before the next question.

        Raises:
            ModelError: there is no such image, or it is none.
        """
        try:
            self._waiting.append(decode_image(path.read_bytes()))
        except OSError as error:
            raise ModelError(f"image {path} cannot be read: {error.strerror or error}") from None
        except SampleError as error:
            raise ModelError(f"image {path}: {error.message or error.reason}") from None

    def ask(self, text: str) -> None:
        """Add a question, with the images that wait."""
        self.messages.append(user_message(text, len(self._waiting)))
        self.images += self._waiting
        self._waiting = []

    def answered(self, text: str) -> None:
        """Add the model's answer to the last question."""
        self.messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})

    def withdraw(self) -> None:
        """Take the last question back, its images too, as if it had not been asked."""
        content = self.messages.pop()["content"]
        asked_with = sum(part["type"] == "image" for part in content)
        self.images = self.images[: len(self.images) - asked_with]

    def reset(self) -> None:
        """Forget everything."""
        self.__init__()  # type: ignore[misc]
