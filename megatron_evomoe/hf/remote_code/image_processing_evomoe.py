"""LLaVA's image processor for pictures of any mode, which it converts to RGB as training does.

transformers' own processor drops transparency before version 5, clips 16-bit grey at 255, and ignores the
orientation in EXIF data.
"""

from __future__ import annotations

import base64
import io
import os
from typing import Any

from PIL import Image

from .picture_evomoe import as_rgb

try:  # transformers 5: the processor that works with Pillow and numpy has a name of its own
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil as _Base
except ImportError:
    from transformers.models.llava.image_processing_llava import LlavaImageProcessor as _Base


class EvoMoeImageProcessor(_Base):
    """Applies `as_rgb`, then pads to a square (`do_pad`) or crops, resizes and normalises.

    `as_rgb` is applied to Pillow images, not to arrays and tensors.
    """

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        """Convert the pictures to RGB, and preprocess them as LLaVA does."""
        return super().preprocess(self.fetch_images(images), *args, **kwargs)

    def fetch_images(self, images: Any) -> Any:
        """Open pictures and convert them to RGB.

        Args:
            images: a Pillow image, a path or base64 text, or a (nested) list of these.

        Raises:
            ValueError: a text is a URL, or neither a file nor a picture in base64. transformers would drop
                the transparency of a picture at a URL.
        """
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        if isinstance(images, str):
            images = _open(images)
        return as_rgb(images) if isinstance(images, Image.Image) else super().fetch_images(images)


def _open(source: str) -> Image.Image:
    if os.path.isfile(source):
        return Image.open(source)
    if source.startswith(("http://", "https://")):
        raise ValueError(
            f"{source[:200]} is a URL; download the picture and give its path or the opened image"
        )
    data = source.split(",", 1)[1] if source.startswith("data:image/") else source
    try:
        return Image.open(io.BytesIO(base64.b64decode(data)))
    except (ValueError, OSError) as error:
        raise ValueError(f"{source[:200]!r} is neither a file nor a picture in base64: {error}") from None


__all__ = ["EvoMoeImageProcessor"]
