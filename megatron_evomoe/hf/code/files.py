"""What a custom-code export copies from this folder, and how transformers finds its classes there. Not copied itself."""

from __future__ import annotations

from pathlib import Path

_MODEL = "modeling_evomoe.EvoMoeForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "configuration_evomoe.EvoMoeConfig",
    "AutoModel": _MODEL,  # evaluation programs look here for something that generates
    "AutoModelForImageTextToText": _MODEL,
    "AutoModelForCausalLM": _MODEL,
}


def source_files() -> list[Path]:
    """The Python files of the model."""
    return sorted(Path(__file__).parent.glob("*_evomoe.py"))
