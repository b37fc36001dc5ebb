"""Lists the files that an export with custom code copies from this folder, and the classes in them.

This file itself is not copied.
"""

from __future__ import annotations

from pathlib import Path

from megatron_evomoe.data import picture

_MODEL = "modeling_evomoe.EvoMoeForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "configuration_evomoe.EvoMoeConfig",
    "AutoModel": _MODEL,  # which evaluation programs load to generate
    "AutoModelForImageTextToText": _MODEL,
    "AutoModelForCausalLM": _MODEL,
}
IMAGE_AUTO_MAP = {"AutoImageProcessor": "image_processing_evomoe.EvoMoeImageProcessor"}


def source_files() -> dict[str, Path]:
    """Name in an export -> Python file to copy."""
    files = {file.name: file for file in sorted(Path(__file__).parent.glob("*_evomoe.py"))}
    return {**files, "picture_evomoe.py": Path(picture.__file__)}
