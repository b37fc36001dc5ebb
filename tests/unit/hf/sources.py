"""Hand-made Hugging Face directories: random tensors and a configuration of transformers 4.x."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_evomoe.config import from_mapping
from megatron_evomoe.hf.from_hf.config_sections import llava_sections
from megatron_evomoe.hf.tensor_map import NameMap

TEXT = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
LLAVA = {"model_type": "llava", "text_config": TEXT, "vision_config": TOWER}


def tensors(config: dict[str, Any] = LLAVA) -> dict[str, torch.Tensor]:
    """Random tensors under canonical names, including the end of the tower that LLaVA does not use."""
    language, vision = llava_sections(config)
    run = from_mapping(
        {"language": language, "vision": {**vision, "feature_layer": -1}, "data": {"seq_length": 64}}
    )
    g = torch.Generator().manual_seed(3)
    shapes = NameMap(run, "pretrained").hf_shapes()
    shapes |= {
        f"vision_tower.vision_model.post_layernorm.{x}": (vision["hidden_size"],) for x in ("weight", "bias")
    }
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def write(
    folder: Path,
    config: dict[str, Any] = LLAVA,
    content: dict[str, torch.Tensor] | None = None,
    rename: Callable[[str], str] = lambda name: name,
) -> Path:
    """Write a directory of `content` (by default `tensors(config)`) after renaming its tensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {rename(k): v for k, v in (tensors(config) if content is None else content).items()},
        folder / "model.safetensors",
    )
    return folder


def part(prefix: str, content: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors whose names begin with `prefix`."""
    return {k: v for k, v in content.items() if k.startswith(prefix)}
