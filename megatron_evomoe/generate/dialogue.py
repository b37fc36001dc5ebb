"""A dialogue with images, in the form that chat templates expect."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_evomoe.data.errors import SampleError
from megatron_evomoe.data.image import decode_image
from megatron_evomoe.generate.loading import Message, ModelError, user_message


class Dialogue:
    """The messages and images so far, and the images for the next question."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.images: list[np.ndarray] = []
        self._waiting: list[np.ndarray] = []

    def attach(self, path: Path) -> None:
        """Add an image to the next question.

        Raises:
            ModelError: the file cannot be read, or is not an image.
        """
        try:
            self._waiting.append(decode_image(path.read_bytes()))
        except OSError as error:
            raise ModelError(f"image {path} cannot be read: {error.strerror or error}") from None
        except SampleError as error:
            raise ModelError(f"image {path}: {error.message or error.reason}") from None

    def ask(self, text: str) -> None:
        """Add a question, with the images that were attached."""
        self.messages.append(user_message(text, len(self._waiting)))
        self.images += self._waiting
        self._waiting = []

    def answered(self, text: str) -> None:
        """Add the model's answer to the last question."""
        self.messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})

    def withdraw(self) -> None:
        """Remove the last question and its images."""
        content = self.messages.pop()["content"]
        asked_with = sum(part["type"] == "image" for part in content)
        self.images = self.images[: len(self.images) - asked_with]

    def reset(self) -> None:
        """Remove all messages and images."""
        self.__init__()  # type: ignore[misc]
