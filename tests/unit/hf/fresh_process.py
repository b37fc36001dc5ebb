"""Load an exported directory in a new process, as its users do, and report what it computes.

    python fresh_process.py DIRECTORY installed|remote|plain OUTPUT.pt

`installed`: megatron_evomoe's classes are registered, and trust_remote_code is not given. `remote`:
transformers alone runs the directory's code; megatron_evomoe cannot be imported. `plain`: transformers' own
LLaVA without remote code; megatron_evomoe cannot be imported.
"""

from __future__ import annotations

import importlib.abc
import sys
from typing import Any

import torch

IMAGE = [-1] * 4
"""Positions of one image in `BATCH`."""
BATCH = [
    [1, *IMAGE, 5, 6, 7],
    [1, 9, *IMAGE, 10, *IMAGE, 11, 12, 13, 14],
    [1, 20, 21, 22],
    [1, 30, 31, 32, 33, *IMAGE, 34],
]
"""One image, two, none, one."""
IMAGES = 4
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "suppress_tokens": None}


def pixels(number: int, size: int = 32) -> torch.Tensor:
    """Normalised random pixels [1, 3, S, S] of image `number`."""
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(number))


def left_padded(rows: list[list[int]], image_token: int, pad: int = 0) -> dict[str, torch.Tensor]:
    """Ids and attention mask of the rows, padded on the left."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + [image_token if i < 0 else i for i in row] for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def images_of(rows: list[list[int]], first: int = 0) -> dict[str, torch.Tensor]:
    """Pixels of the rows' images, or nothing; `first` numbers the first image."""
    count = sum(row.count(-1) for row in rows) // len(IMAGE)
    return {"pixel_values": torch.cat([pixels(first + i) for i in range(count)])} if count else {}


@torch.no_grad()
def answer_of(model: Any, *, routed: bool, image_token: int) -> dict[str, torch.Tensor]:
    """Logits [positions, V] of the real positions, and each mixture's choice [positions, N].

    The batch is padded on the left.
    """
    batch = left_padded(BATCH, image_token)
    extra = {"output_router_logits": True} if routed else {}
    output = model(**batch, **images_of(BATCH), **extra)
    real = batch["attention_mask"].bool()
    out = {"logits": output.logits[real]}
    if routed:
        for i, logits in enumerate(output.router_logits):
            top = logits.topk(model.config.text_config.num_experts_per_tok).indices
            out[f"experts.{i}"] = torch.zeros_like(logits).scatter(1, top, 1).bool()[real.flatten()]
    return out


@torch.no_grad()
def generation(model: Any, image_token: int) -> dict[str, bool]:
    """Named properties of `generate`, each of which must be true."""
    batch = {**left_padded(BATCH, image_token), **images_of(BATCH)}
    length = batch["input_ids"].shape[1]
    cached, again = model.generate(**batch, **GREEDY), model.generate(**batch, use_cache=False, **GREEDY)
    out = {"cache equals no cache": torch.equal(cached, again)}
    first = 0
    for i, row in enumerate(BATCH):
        alone = model.generate(**left_padded([row], image_token), **images_of([row], first), **GREEDY)
        out[f"row {i} alone"] = torch.equal(alone[0, len(row) :], cached[i, length:])
        first += row.count(-1) // len(IMAGE)
    # transformers' own LLaVA repeats each image once per beam, which mixes up images in rows that have
    # several.
    rows = BATCH if hasattr(model, "embed") else [BATCH[0]]
    few = {**left_padded(rows, image_token), **images_of(rows)}
    beams = [model.generate(**few, num_beams=3, use_cache=use, **GREEDY) for use in (True, False)]
    alone = model.generate(
        **left_padded([BATCH[1]], image_token), **images_of([BATCH[1]], 1), num_beams=3, **GREEDY
    )
    out["beam search"] = torch.equal(*beams) and (
        len(rows) == 1 or torch.equal(beams[0][1, few["input_ids"].shape[1] :], alone[0, len(BATCH[1]) :])
    )
    torch.manual_seed(0)
    out["sampling"] = model.generate(**batch, **{**GREEDY, "do_sample": True}).shape == cached.shape
    return out


def load(directory: str, mode: str) -> tuple[Any, dict[str, Any]]:
    """The model and transformers' report on its tensors."""
    if mode == "installed":
        import megatron_evomoe.hf

        megatron_evomoe.hf.register()
    else:
        sys.meta_path.insert(0, _NotInstalled())
    import transformers

    loader = (
        transformers.LlavaForConditionalGeneration
        if mode == "plain"
        else transformers.AutoModelForImageTextToText
    )
    model, report = loader.from_pretrained(
        directory,
        dtype="auto",
        output_loading_info=True,
        **({"trust_remote_code": True} if mode == "remote" else {}),
    )
    return model.eval(), {key: sorted(map(str, found)) for key, found in report.items()}


class _NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "megatron_evomoe":
            raise ImportError("megatron_evomoe is not installed in this process")


@torch.no_grad()
def through_processor(directory: str, model: Any, mode: str) -> dict[str, Any]:
    """Ids, pixels and answers for conversations and pictures that go through AutoProcessor."""
    import numpy as np
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(
        directory, **({"trust_remote_code": True} if mode == "remote" else {})
    )
    pictures = [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (3 + i, 5, 3), dtype=np.uint8)).resize(
            (40 + 30 * i, 70 - 10 * i), Image.BICUBIC
        )
        for i in range(3)
    ]
    # In plain mode transparency is left out: transformers 4's own image processor drops it.
    if mode != "plain":
        pictures[1].putalpha(Image.linear_gradient("L").resize(pictures[1].size))
    parts = {"image": {"type": "image"}, "text": {"type": "text", "text": "Which digit is this?"}}
    conversations = [
        [{"role": "user", "content": [parts[x] for x in kinds]}]
        for kinds in (["image", "text"], ["image", "image", "text"], ["text"])
    ]
    texts = [
        processor.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in conversations
    ]
    batch = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    tokens = model.generate(**batch.to(dtype=model.dtype), max_new_tokens=4)
    return {
        **{name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")},
        "pictures": [np.asarray(p) for p in pictures],
        "answers": processor.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True),
    }


def main(directory: str, mode: str, output: str) -> None:
    """Load the directory in the given mode and save all results (see the module's docstring)."""
    import transformers

    torch.set_num_threads(1)
    model, report = load(directory, mode)
    config = model.config
    routed = getattr(config.text_config, "router", "none") != "none"
    torch.save(
        {
            "report": report,
            "class": type(model).__module__,
            "version": transformers.__version__,
            "dtype": str(model.dtype),
            "vision": type(model.config.vision_config).__name__,
            "answer": answer_of(model, routed=routed, image_token=config.image_token_index),
            "generation": generation(model, config.image_token_index),
            "processor": through_processor(directory, model, mode),
        },
        output,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
