"""What a custom-code export copies from this folder, and how transformers finds its classes there. Not copied
itself.
"""

from __future__ import annotations

from pathlib import Path

from megatron_evomoe.data import picture

_MODEL = "modeling_evomoe.EvoMoeForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "configuration_evomoe.EvoMoeConfig",
    "AutoModel": _MODEL,  # evaluation programs look here for something that generates
    "AutoModelForImageTextToText": _MODEL,
    "AutoModelForCausalLM": _MODEL,
}
IMAGE_AUTO_MAP = {"AutoImageProcessor": "image_processing_evomoe.EvoMoeImageProcessor"}


def source_files() -> dict[str, Path]:
    """Name in an export -> Python file: the model, its image processor, and the rule by which a picture
    becomes RGB.
    """
    files = {file.name: file for file in sorted(Path(__file__).parent.glob("*_evomoe.py"))}
    return {**files, "picture_evomoe.py": Path(picture.__file__)}
