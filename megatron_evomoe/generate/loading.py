"""Loads the model and the processor of a Hugging Face directory, for `generate` and `evaluate`.

EvoMoE exports load through this package's classes, plain LLaVA directories through transformers' own. Code in
a directory is never run.
"""

from __future__ import annotations

import json
import logging
import os
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_evomoe.errors import UserError
from megatron_evomoe.hf import register
from megatron_evomoe.hf.dtypes import DTYPES

DTYPE_CHOICES = ("auto", *DTYPES)
Message = dict[str, Any]
"""``{"role": "user" | "assistant", "content": [{"type": "image"}, {"type": "text", "text": …}]}``"""

_HARMLESS = ("position_ids", "inv_freq")  # buffers that old directories carry and new classes compute


def user_message(text: str, num_images: int = 0) -> Message:
    """A question with its images before it, where LLaVA has them."""
    return {
        "role": "user",
        "content": [*({"type": "image"} for _ in range(num_images)), {"type": "text", "text": text}],
    }


class ModelError(UserError):
    """A directory that cannot be loaded as it is, or an input the model cannot take."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode and the processor it was exported with."""

    model: Any
    processor: Any

    @property
    def tokenizer(self) -> Any:
        """The processor's."""
        return self.processor.tokenizer

    def encode(self, conversations: Sequence[Sequence[Message]], images: Sequence[np.ndarray]) -> Any:
        """A left-padded batch on the model's device, each conversation ending where the assistant begins.

        Args:
            images: uint8 [H, W, 3], in the order in which the conversations name them.

        Raises:
            ModelError: there is no room for one more token after the longest.
        """
        texts = [
            self.processor.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
            for messages in conversations
        ]
        bos = self.tokenizer.bos_token
        batch = self.processor(
            # as pictures: an array of 1 or 3 rows would be taken for one with its channels first
            text=texts,
            images=[Image.fromarray(image) for image in images] or None,
            return_tensors="pt",
            padding=True,
            # a template that writes the first token itself must not get a second one
            add_special_tokens=not (bos and all(text.startswith(bos) for text in texts)),
        )
        length, room = batch["input_ids"].shape[1], self.max_length
        if length >= room:
            raise ModelError(
                f"the prompt is {length} tokens long and the model takes {room}, its answer included"
            )
        batch = batch.to(self.model.device)
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].to(self.model.dtype)
        return batch

    @property
    def max_length(self) -> int:
        """Positions the language model was built for."""
        return self.model.config.get_text_config().max_position_embeddings

    def answer(self, batch: Any, **settings: Any) -> list[str]:
        """The continuations of an encoded batch, without special tokens and outer whitespace.

        Args:
            settings: arguments of transformers' ``generate``; no answer goes beyond the model's last
                position.
        """
        import torch

        settings["max_new_tokens"] = min(
            settings["max_new_tokens"], self.max_length - batch["input_ids"].shape[1]
        )
        with torch.inference_mode():
            tokens = self.model.generate(**batch, pad_token_id=self.tokenizer.pad_token_id, **settings)
        new = tokens[:, batch["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]


def greedy(max_new_tokens: int) -> dict[str, Any]:
    """Arguments of ``generate`` for the most likely token each time, whatever the directory's generation
    config says.
    """
    return {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "temperature": None,
        "top_p": None,
        "top_k": None,
    }


def check_directory(path: Path) -> None:
    """See that everything a loader needs is there, without reading weights.

    Raises:
        ModelError: it is no directory, or a file is missing.
    """
    if not path.is_dir():
        raise ModelError(f"--model {path} is no directory; give one that convert_to_hf wrote")
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json; is it a Hugging Face model directory?")
    missing = [name for name in _weight_files(path) if not (path / name).is_file()]
    if missing:
        raise ModelError(f"{path} lacks weights: {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}")
    for names, what in (
        (("tokenizer.json", "tokenizer.model"), "tokenizer"),
        (("preprocessor_config.json", "processor_config.json"), "image processor"),
    ):
        if not any((path / name).is_file() for name in names):
            raise ModelError(f"{path} has no {what} ({' or '.join(names)})")


def _weight_files(path: Path) -> list[str]:
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, OSError) as error:
        raise ModelError(f"{index} is no weight index: {error!r}") from None
    for name in names:
        if not isinstance(name, str) or "/" in name or not name.endswith(".safetensors"):
            raise ModelError(
                f"{index} names {reprlib.repr(name)} as a file of weights; files are *.safetensors beside "
                "the index"
            )
    return names


def load(path: str | Path, dtype: str = "auto", device: str | None = None) -> LoadedModel:
    """Load an exported directory, or any LLaVA-style one that transformers knows.

    Args:
        dtype: one of `DTYPE_CHOICES`; auto takes the directory's.
        device: a torch device; None takes this process's GPU where there is one.

    Raises:
        ModelError: files are missing or broken, code of its own would be needed, or tensors do not match the
            architecture.
    """
    path = Path(path)
    check_directory(path)
    model, processor = _load_model(path, dtype), _load_processor(path)
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    processor.tokenizer.padding_side = "left"  # so that every answer starts at the same position
    device = device or default_device()
    try:
        return LoadedModel(model.to(device).eval(), processor)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"{path} cannot be put on device {device}: {_first_line(error)}") from None


def default_device() -> str:
    """This rank's GPU (ranks beyond the GPUs share them), or ``cpu`` on a machine without one."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % gpus}" if gpus else "cpu"


def _load_model(path: Path, dtype: str) -> Any:
    transformers = _transformers()
    try:
        model, report = transformers.AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # half a dozen types, each for a directory that is not what it should be
        raise ModelError(f"{path} cannot be loaded: {_first_line(error)}") from None
    wrong = [
        f"{kind} {name}"
        for kind, names in (("missing", report["missing_keys"]), ("unexpected", report["unexpected_keys"]))
        for name in sorted(names)
        if not name.endswith(_HARMLESS)
    ]
    wrong += [f"of another shape {key!s}" for key in report["mismatched_keys"]]
    if wrong:  # transformers would warn and leave what is missing random
        raise ModelError(
            f"{path}: {len(wrong)} tensors do not match the architecture, first {wrong[0]}; was it written "
            "by a "
            f"newer transformers than {transformers.__version__}?"
        )
    return model


def _load_processor(path: Path) -> Any:
    transformers = _transformers()
    try:
        processor = transformers.AutoProcessor.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # as above
        raise ModelError(f"{path}: the processor cannot be loaded: {_first_line(error)}") from None
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise ModelError(
            f"{path} gives a {type(processor).__name__}, not a processor of text and images; "
            "processor_config.json must name its class"
        )
    if not (getattr(processor, "chat_template", None) or processor.tokenizer.chat_template):
        raise ModelError(f"{path} has no chat template (chat_template.jinja or .json)")
    return processor


def _transformers() -> Any:
    try:
        import transformers

        register()
    except ImportError:
        raise ModelError(
            "loading a model needs transformers 4.56 or later: pip install 'megatron_evomoe[hf]'"
        ) from None
    # What it warns of while loading is refused by `_load_model`, or does not matter here.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return transformers


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
