"""Converts an image of any mode to RGB: the one rule for training, `evaluate` and exports.

This file imports only Pillow and numpy: an export with custom code contains it as ``picture_evomoe.py``, and
    the
model card of a plain LLaVA export prints `as_rgb`.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB: upright as its EXIF says, and white where it is transparent."""
    image = ImageOps.exif_transpose(image)
    transparent = image.info.get("transparency")
    # 16-bit grey, which convert("RGB") would clip at 255, is reduced to its high byte, as 16-bit RGB is
    if image.mode.startswith("I"):
        values = np.asarray(image).clip(0, 65535)
        grey = (values >> 8).astype(np.uint8)
        if transparent is not None:
            grey[values == transparent] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode in ("LA", "PA", "RGBA") or transparent is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")
