"""LLaVA's image processor, given pictures as training sees them.

transformers' own drops transparency before 5.x, clips 16-bit grey at 255 and never turns a picture as its
EXIF says.
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
    """Pads to a square (`do_pad`) or crops, resizes and normalises, after `as_rgb`. Arrays and tensors are
    taken as they are.
    """

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        """LLaVA's preprocessing, of pictures that `as_rgb` has made RGB."""
        return super().preprocess(self.fetch_images(images), *args, **kwargs)

    def fetch_images(self, images: Any) -> Any:
        """Opened pictures, paths or base64, one or nested lists of them, as RGB pictures.

        Raises:
            ValueError: an address. transformers would drop the transparency of what it loads from there.
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
            f"{source[:200]} is an address; load it, and give the picture that Image.open makes of it"
        )
    data = source.split(",", 1)[1] if source.startswith("data:image/") else source
    try:
        return Image.open(io.BytesIO(base64.b64decode(data)))
    except (ValueError, OSError) as error:
        raise ValueError(f"{source[:200]!r} is neither a file nor a picture in base64: {error}") from None


__all__ = ["EvoMoeImageProcessor"]
