"""Gives the tensors of Hugging Face files the names of `hf/tensor_map.py`.

transformers has renamed LLaVA's tensors several times; the canonical names are those of transformers 4.

| written by | language model | output layer | tower |
|---|---|---|---|
| 4.x, 5.0-5.3 | `language_model.model.` | `language_model.lm_head.` | `vision_tower.vision_model.` |
| 5.4-5.5 | `model.language_model.model.` | `language_model.lm_head.` | `model.vision_tower.vision_model.` |
| 5.6 on | `language_model.model.` | `language_model.lm_head.` | `vision_tower.` |
| LLaVA's own code | `model.` | `lm_head.` | `model.vision_tower.vision_tower.vision_model.` |
| a language model alone | `model.` | `lm_head.` | |
| a tower alone | | | `vision_model.`, or nothing (5.x) |
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from megatron_evomoe.checkpoint.record import CheckpointError

_DECODER = r"(?P<rest>(?:layers|embed_tokens|norm|final_layernorm)\..*)"
_TOWER = r"(?P<rest>(?:embeddings|encoder|pre_layrnorm|post_layernorm|head)\..*)"
_RULES = [
    (re.compile(pattern), prefix)
    for pattern, prefix in (
        (rf"^(?:model\.)?language_model\.(?:model\.)?{_DECODER}$", "language_model.model."),
        (rf"^(?:model\.)?{_DECODER}$", "language_model.model."),
        (r"^(?:(?:model\.)?language_model\.)?(?P<rest>lm_head\..*)$", "language_model."),
        (rf"^(?:model\.)?(?:vision_tower\.)*(?:vision_model\.)?{_TOWER}$", "vision_tower.vision_model."),
        (r"^(?:model\.)?(?P<rest>multi_modal_projector\..*)$", ""),
    )
]
_LLAVA_PROJECTOR = {"0": "linear_1", "2": "linear_2"}

_COMPUTED = re.compile(r"\.(rotary_emb\.inv_freq|embeddings\.position_ids)$")
_TOWER_UNREAD = re.compile(r"^vision_tower\.vision_model\.(post_layernorm|head)\.")
_TOWER_LAYER = re.compile(r"^vision_tower\.vision_model\.encoder\.layers\.(\d+)\.")
_CLIPS_OTHER_HALF = re.compile(
    r"^(text_model\.|text_projection\.|visual_projection\.|logit_scale$|logit_bias$)"
)


def canonical(names: Iterable[str], where: object) -> dict[str, str]:
    """Canonical name -> name in the file. A name that no rule matches is its own canonical name.

    Args:
        where: the file or directory, for messages.

    Raises:
        CheckpointError: two names stand for the same tensor.
    """
    out: dict[str, str] = {}
    for name in names:
        new = _canonical(name)
        if new in out:
            raise CheckpointError(f"{where}: {out[new]} and {name} both stand for {new}; remove one of them")
        out[new] = name
    return out


def _canonical(name: str) -> str:
    if match := re.match(r"^model\.mm_projector\.([02])\.(.*)$", name):
        return f"multi_modal_projector.{_LLAVA_PROJECTOR[match[1]]}.{match[2]}"
    for pattern, prefix in _RULES:
        if match := pattern.match(name):
            return prefix + match["rest"]
    return name


def is_unread(name: str, tower_layers: int) -> bool:
    """Whether LLaVA does not use the tensor with this canonical name.

    It does not use buffers that follow from the configuration, the tower's layers from `tower_layers` on and
    everything after them, and CLIP's text model.
    """
    if _COMPUTED.search(name) or _TOWER_UNREAD.match(name) or _CLIPS_OTHER_HALF.match(name):
        return True
    layer = _TOWER_LAYER.match(name)
    return layer is not None and int(layer[1]) >= tower_layers
