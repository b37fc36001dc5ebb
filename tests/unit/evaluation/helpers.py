"""A tiny stock LLaVA directory, and small files in each benchmark's published format."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from megatron_evomoe.evaluation.item import Item

TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() }}: "
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% "
    "endfor %} "
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def write_model(folder: Path, kind: str = "llava", positions: int = 1024) -> Path:
    """Write a randomly initialised model with a byte-level tokenizer and a processor.

    `kind` is llava (stock) or evomoe.
    """
    from transformers import CLIPImageProcessor, LlavaProcessor

    tokenizer = _tokenizer()
    torch.manual_seed(0)
    build = {"llava": _llava, "evomoe": _evomoe}[kind]
    build(len(tokenizer), tokenizer.convert_tokens_to_ids("<image>"), positions).save_pretrained(folder)
    pixels = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        pixels,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], unk_token="<unk>")
    )
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<image>", special=True, normalized=False)]}
    )
    return tokenizer


_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def _decoder(vocabulary: int, positions: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": positions,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "initializer_range": 0.3,
    }


def _llava(vocabulary: int, image_id: int, positions: int) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(**_TOWER, num_hidden_layers=2, projection_dim=16)
    text = LlamaConfig(**_decoder(vocabulary, positions))
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision.to_dict(),
            text_config=text.to_dict(),
            image_token_id=image_id,
            image_token_index=image_id,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            image_seq_length=4,
        )
    )


def _evomoe(vocabulary: int, image_id: int, positions: int) -> Any:
    from megatron_evomoe.hf.remote_code.configuration_evomoe import EvoMoeConfig
    from megatron_evomoe.hf.remote_code.modeling_evomoe import EvoMoeForConditionalGeneration

    vision = {**_TOWER, "num_hidden_layers": 1}
    text = {**_decoder(vocabulary, positions), "moe_layers": [1], "dtr_hidden_size": 4, "dtr_rank": 4}
    return EvoMoeForConditionalGeneration(
        EvoMoeConfig(vision, text, image_token_id=image_id, image_seq_length=4)
    )


def png(colour: int = 0) -> bytes:
    """A small PNG picture; `colour` picks one of 256."""
    out = io.BytesIO()
    Image.new("RGB", (20, 16), (colour, 255 - colour, 64)).save(out, "PNG")
    return out.getvalue()


def picture(path: Path, colour: int = 0) -> Path:
    """Write a picture file, and create its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(colour))
    return path


def write_json(path: Path, value: Any) -> Path:
    """Write one JSON document."""
    path.write_text(json.dumps(value))
    return path


def write_pope(folder: Path, questions: int, category: str = "random") -> tuple[Path, Path]:
    """Write a POPE question file and its image folder; labels alternate and begin with yes."""
    names = [f"COCO_val2014_{n:012d}.jpg" for n in range(questions)]
    for n, name in enumerate(names):
        picture(folder / "val2014" / name, n % 256)
    lines = [
        {
            "question_id": n,
            "image": name,
            "text": f"Is there a number {n} in the image?",
            "label": ("no", "yes")[n % 2],
        }
        for n, name in enumerate(names, start=1)
    ]
    path = folder / f"coco_pope_{category}.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path, folder / "val2014"


def write_mmbench(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a TSV whose columns are the union of the rows' columns."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def encoded(colour: int = 0) -> str:
    """A picture in base64, as MMBench stores it."""
    return base64.b64encode(png(colour)).decode()


def item(name: str, group: str | None = None, **metadata: Any) -> Item:
    """An item for scoring alone, with neither prompt nor images."""
    return Item(name, "", (), metadata, group)
