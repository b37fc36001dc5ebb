"""Decodes images strictly, resizes them in torch as Pillow does, and normalises them on the device.

Shapes: H, W of the file; S the side of the model's input; n images of a batch. Pixels stay uint8 until
`ImageProcessor.normalize`, which takes a quarter of the bandwidth of float32 (measured in docs/data.md).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn import functional as F

from megatron_evomoe.config import ConfigError, RunConfig
from megatron_evomoe.data.errors import SampleError
from megatron_evomoe.data.picture import as_rgb

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN, SIGLIP_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # not all of Pillow's: its EPS reader starts Ghostscript
_ORIENTATION = 0x0112
_MAX_ASPECT = (
    200  # a longer strip is hardly a photograph, and padding it to a square takes ratio x area pixels
)
# of a JPEG; each scan decodes the whole image, so a small file with thousands of scans would take minutes.
# Cameras write up to 14.
_MAX_SCANS = 200
_CROP_ASPECT = 8  # of what is left of a strip before it is resized and cropped to a square
_PAD_SIDE = 8192  # pixels; a longer image is shortened before it is padded


def decode_image(data: bytes, max_pixels: int = 50_000_000) -> np.ndarray:
    """Decode a file to RGB uint8 [H, W, 3], upright (the EXIF orientation is applied once).

    The size is read from the header, so a large image is refused before it is decoded. simplejpeg decodes
    JPEG, because it raises on corrupt bytes where other decoders return wrong pixels. Pillow decodes other
    formats, which it knows by their content, and the JPEGs that simplejpeg does not know (CMYK).
    `data/picture.py` converts transparency (to white), palettes and 16 bits. Of an animation the first frame
    is taken.

    Args:
        data: the content of the file.
        max_pixels: the largest H·W that is decoded.

    Raises:
        SampleError: corrupt-image, image-too-large, image-shape (longer than 200 : 1).
    """
    with warnings.catch_warnings():
        # Pillow warns of large files, palettes and EXIF; what matters is refused here
        warnings.simplefilter("ignore")
        try:
            header = _header(data, max_pixels)
            is_jpeg = data[:3] == b"\xff\xd8\xff"
            if is_jpeg and (scans := data.count(b"\xff\xda")) > _MAX_SCANS:
                raise SampleError("corrupt-image", f"{scans} scans; at most {_MAX_SCANS} are decoded")
            if is_jpeg and header.mode in ("RGB", "L"):
                pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
                return _upright(pixels, header.getexif().get(_ORIENTATION, 1))
            return np.asarray(as_rgb(header))
        except SampleError:
            raise
        except Image.DecompressionBombError as error:
            raise SampleError("image-too-large", str(error)) from None
        except Exception as error:  # a damaged file can raise any of a dozen classes
            raise SampleError("corrupt-image", str(error) or type(error).__name__) from None


def _header(data: bytes, max_pixels: int) -> Image.Image:
    """The opened but not decoded file, its size within the limits.

    Raises:
        SampleError: the file is of no known format, too large, or too long.
        Exception: whatever Pillow raises for a damaged header.
    """
    try:
        header = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        raise SampleError(
            "corrupt-image", f"{len(data)} bytes that are not a file of {', '.join(_FORMATS)}"
        ) from None
    width, height = header.size
    if width * height > max_pixels:
        raise SampleError("image-too-large", f"{width} x {height} is more than max_image_pixels {max_pixels}")
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise SampleError("image-shape", f"{width} x {height} is longer than {_MAX_ASPECT} : 1")
    return header


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo one of the eight EXIF orientations of uint8 [H, W, 3]."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


class ImageProcessor:
    """Turns an image of any size into the square that the vision tower takes.

    `pad` pads to a square with the mean colour and then resizes (LLaVA's ``expand2square``); `square` resizes
    the shorter side and crops the centre (as CLIP does). Both resize bicubically with antialiasing and differ
    from Pillow by 0.02 of 255 on average.

    Raises:
        ConfigError: the aspect ratio is unknown, or the size or a deviation is not positive.
    """

    def __init__(
        self,
        size: int,
        aspect_ratio: Literal["pad", "square"] = "pad",
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ) -> None:
        if aspect_ratio not in ("pad", "square"):
            raise ConfigError(f"image_aspect_ratio {aspect_ratio!r} must be 'pad' or 'square'")
        if size < 1 or min(std) <= 0:
            raise ConfigError(f"image size {size} and std {tuple(std)} must be positive")
        self.size, self.aspect_ratio, self.mean, self.std = size, aspect_ratio, tuple(mean), tuple(std)

    def __call__(self, pixels: np.ndarray) -> torch.Tensor:
        """uint8 [H, W, 3] to uint8 [3, S, S], contiguous."""
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(f"expected uint8 [H, W, 3], got {pixels.dtype} {pixels.shape}")
        if not pixels.flags.writeable:  # torch warns of read-only memory, although nothing writes to it
            pixels = pixels.copy()
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # [1, 3, H, W], channels last as decoded
        image = self._pad_and_resize(image) if self.aspect_ratio == "pad" else self._resize_and_crop(image)
        return image[0].contiguous()

    def normalize(self, batch: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """uint8 [n, 3, S, S] to (x / 255 - mean) / std in `dtype`, on the device of the batch; n may be 0."""
        mean = torch.tensor(self.mean, device=batch.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=batch.device).view(1, 3, 1, 1)
        return ((batch.float() / 255 - mean) / std).to(dtype)

    def _pad_and_resize(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[2:]
        side = canvas_height = canvas_width = max(height, width)
        # Bicubic resizing is separable, and its horizontal pass comes first. A wide image is therefore
        # narrowed before it is padded, which gives the same bits and spares that pass for rows of one colour.
        # A tall image is shortened first only if its square would take hundreds of megabytes, because that
        # swaps the passes and rounds differently.
        if width > height:
            canvas_width = self.size
        elif side > _PAD_SIDE:
            canvas_height = self.size
        image = _resize(
            image, canvas_height if height == side else height, canvas_width if width == side else width
        )
        colour = torch.tensor([int(m * 255) for m in self.mean], dtype=torch.uint8).view(1, 3, 1, 1)
        canvas = colour.expand(1, 3, canvas_height, canvas_width).clone(memory_format=torch.channels_last)
        top, left = (canvas_height - image.shape[2]) // 2, (canvas_width - image.shape[3]) // 2
        canvas[:, :, top : top + image.shape[2], left : left + image.shape[3]] = image
        return _resize(canvas, self.size, self.size)

    def _resize_and_crop(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[2:]
        limit = _CROP_ASPECT * min(height, width)  # the far ends of a strip are cropped away in any case
        for dim, side in ((2, height), (3, width)):
            if side > limit:
                image = image.narrow(dim, (side - limit) // 2, limit)
        height, width = image.shape[2:]
        short = min(height, width)
        new_height, new_width = (int(self.size * side / short) for side in (height, width))
        image = _resize(image, new_height, new_width)
        top, left = (new_height - self.size) // 2, (new_width - self.size) // 2
        return image[:, :, top : top + self.size, left : left + self.size]


def processor_for(config: RunConfig) -> ImageProcessor:
    """The processor of a run: the size of its tower, and the mean and deviation of the tower's family."""
    mean, std = (SIGLIP_MEAN, SIGLIP_STD) if config.vision.model_type == "siglip" else (CLIP_MEAN, CLIP_STD)
    return ImageProcessor(config.vision.image_size, config.data.image_aspect_ratio, mean, std)


def _resize(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 [1, 3, h, w] to uint8 [1, 3, height, width], as Pillow's BICUBIC does."""
    if image.shape[2:] == (height, width):
        return image
    return F.interpolate(image, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
