"""Writes the model card of an export: its origin, and how to load it."""

from __future__ import annotations

import inspect
from typing import Any

from megatron_evomoe.config.kinds import MIXTURE_KINDS, StageKind
from megatron_evomoe.data.picture import as_rgb

_LOAD = """\
```python
from PIL import Image
{imports}from transformers import AutoModelForImageTextToText, AutoProcessor
{registration}
processor = AutoProcessor.from_pretrained(PATH{trust})
model = AutoModelForImageTextToText.from_pretrained(PATH, dtype="auto"{trust})
question = [{{"type": "image"}}, {{"type": "text", "text": "What is in this picture?"}}]
messages = [{{"role": "user", "content": question}}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=prompt, images={picture}, return_tensors="pt")
inputs = inputs.to(model.device, model.dtype)
output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```
"""


def model_card(own: dict[str, Any], form: str, dtype: str, size: int) -> str:
    """The contents of ``README.md``.

    Args:
        own: from `config_files.own_sections`.
        form: `evomoe` or `llava`.
        dtype: of the weights.
        size: bytes of the weights.
    """
    lm, vision, moe, kind = own["language"], own["vision"], own["moe"], own["kind"]
    mixtures = kind in MIXTURE_KINDS
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\ntags: [evomoe, llava, "
        "vision-language" + (", moe" if mixtures else "") + "]\n---\n",
        f"# EvoMoE, stage {own['stage']['name']}\n",
        "A LLaVA-style vision-language model trained with megatron_evomoe "
        + (
            "(EvoMoE, arXiv 2505.23830)."
            if mixtures
            else "as the dense beginning of EvoMoE (arXiv 2505.23830)."
        )
        + "\n",
        "| | |\n|---|---|\n"
        f"| language model | {lm['num_layers']} layers, {lm['hidden_size']} wide, vocabulary "
        f"{lm['vocab_size']} |\n"
        f"| vision tower | {vision['model_type']}, {vision['image_size']} pixels in patches of "
        f"{vision['patch_size']} |\n"
        + (_mixture_row(lm, moe, kind) if mixtures else "")
        + f"| conversation template | {own['data']['conversation_template']} |\n| weights | {dtype}, "
        f"{size / 1e9:.3g} GB |\n",
        "## Stages\n",
        _stage_table(own["stage"]),
        "## Loading\n",
        _loading(form),
    ]
    if mixtures:
        parts.append(_notes(kind, moe))
    return "\n".join(parts)


def _mixture_row(lm: dict[str, Any], moe: dict[str, Any], kind: str) -> str:
    freq, layers = moe["moe_layer_freq"], lm["num_layers"]
    count = sum(freq) if isinstance(freq, list) else layers // freq
    how = (
        f"top-{moe['moe_router_topk']}, {moe['router']} router"
        if kind == StageKind.ROUTE
        else "no router yet: expert 1 computes"
    )
    return f"| mixtures | {count} layers of {moe['num_experts']} experts, {how} |\n"


def _stage_table(stage: dict[str, Any]) -> str:
    rows = [*stage["lineage"], {"stage": stage["name"], "kind": stage["kind"], "step": stage["step"]}]
    return "| stage | kind | steps |\n|---|---|---|\n" + "".join(
        f"| {r['stage']} | {r['kind']} | {r['step']} |\n" for r in rows
    )


def _loading(form: str) -> str:
    if form == "llava":
        return (
            "transformers' own `LlavaForConditionalGeneration`, 4.56 or later:\n\n"
            + _LOAD.format(imports="", registration="", trust="", picture='as_rgb(Image.open("picture.jpg"))')
            + "\n`as_rgb` makes of a picture what training saw. Without it transformers 4 drops transparency "
            "(5 puts it on "
            "white, as training did), and both clip 16-bit grey and leave a picture as the camera was "
            "held:\n\n"
            + "```python\nimport numpy as np\nfrom PIL import Image, ImageOps\n\n"
            + inspect.getsource(as_rgb)
            + "```\n"
        )
    picture = 'Image.open("picture.jpg")'
    return (
        "With transformers 4.56 or later alone, which then runs the code in this directory:\n\n"
        + _LOAD.format(imports="", registration="", trust=", trust_remote_code=True", picture=picture)
        + "\nWith megatron_evomoe installed no code of this directory is run:\n\n"
        + _LOAD.format(
            imports="import megatron_evomoe.hf\n",
            registration="\nmegatron_evomoe.hf.register()",
            trust="",
            picture=picture,
        )
        + "\nThe image processor turns a picture as its EXIF says, puts transparency on white and keeps the "
        "high byte of 16 "
        "bits, as training did.\n"
    )


def _notes(kind: str, moe: dict[str, Any]) -> str:
    notes = [
        "## Notes\n",
        "* Image tokens and text tokens are routed differently, so a program that feeds embeddings must give "
        "`image_mask` too. Servers that cannot (transformers backends of vLLM and SGLang) are refused.",
    ]
    if kind == StageKind.ROUTE and moe["moe_expert_capacity_factor"]:
        notes.append(
            f"* Trained with an expert capacity factor of {moe['moe_expert_capacity_factor']}; here no token "
            "is dropped."
        )
    return "\n".join(notes) + "\n"
