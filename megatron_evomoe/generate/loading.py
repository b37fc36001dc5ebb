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

_COMPUTED = ("position_ids", "inv_freq")  # buffers that old directories hold and new classes compute


def user_message(text: str, num_images: int = 0) -> Message:
    """A question after its images, which is where LLaVA expects them."""
    return {
        "role": "user",
        "content": [*({"type": "image"} for _ in range(num_images)), {"type": "text", "text": text}],
    }


class ModelError(UserError):
    """A directory cannot be loaded, or an input does not fit the model."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode and its processor."""

    model: Any
    processor: Any

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    def encode(self, conversations: Sequence[Sequence[Message]], images: Sequence[np.ndarray]) -> Any:
        """Encode conversations for the model to answer.

        Args:
            conversations: the messages of each; the last one is the user's.
            images: uint8 [H, W, 3], in the order of their places in the conversations.

        Returns:
            A left-padded batch on the model's device.

        Raises:
            ModelError: the longest conversation leaves no position for an answer.
        """
        texts = [
            self.processor.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
            for messages in conversations
        ]
        bos = self.tokenizer.bos_token
        batch = self.processor(
            # Pillow images, because in an array with 1 or 3 rows these would be taken for channels.
            text=texts,
            images=[Image.fromarray(image) for image in images] or None,
            return_tensors="pt",
            padding=True,
            # Some templates write the first token themselves; there must not be a second one.
            add_special_tokens=not (bos and all(text.startswith(bos) for text in texts)),
        )
        length, room = batch["input_ids"].shape[1], self.max_length
        if length >= room:
            raise ModelError(
                f"the prompt has {length} tokens, but prompt and answer together can have {room}; shorten it"
            )
        batch = batch.to(self.model.device)
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].to(self.model.dtype)
        return batch

    @property
    def max_length(self) -> int:
        """Positions of the language model: the most tokens of prompt and answer."""
        return self.model.config.get_text_config().max_position_embeddings

    def answer(self, batch: Any, **settings: Any) -> list[str]:
        """Generate the answers of an encoded batch, without special tokens and outer whitespace.

        Args:
            batch: from `encode`.
            settings: arguments of transformers' ``generate``. `max_new_tokens` is reduced so that no answer
                exceeds the model's positions.
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
    """Arguments of ``generate`` for greedy decoding, which override the directory's generation config."""
    return {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "temperature": None,
        "top_p": None,
        "top_k": None,
    }


def check_directory(path: Path) -> None:
    """Check that a directory has all files that `load` needs, without reading the weights.

    Raises:
        ModelError: it is not a directory, or a file is missing.
    """
    if not path.is_dir():
        raise ModelError(f"--model {path} is not a directory; give one that convert-to-hf wrote")
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json; give the directory of a Hugging Face model")
    missing = [name for name in _weight_files(path) if not (path / name).is_file()]
    if missing:
        raise ModelError(
            f"{path} lacks weights: {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}; copy or "
            "export it again"
        )
    for names, what in (
        (("tokenizer.json", "tokenizer.model"), "tokenizer"),
        (("preprocessor_config.json", "processor_config.json"), "image processor"),
    ):
        if not any((path / name).is_file() for name in names):
            raise ModelError(f"{path} has no {what} ({' or '.join(names)}); copy or export it again")


def _weight_files(path: Path) -> list[str]:
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, OSError) as error:
        raise ModelError(f"{index} is not an index of weights: {error!r}") from None
    for name in names:
        if not isinstance(name, str) or "/" in name or not name.endswith(".safetensors"):
            raise ModelError(
                f"{index} names {reprlib.repr(name)} as a weight file; weight files must be *.safetensors "
                "files beside the index"
            )
    return names


def load(path: str | Path, dtype: str = "auto", device: str | None = None) -> LoadedModel:
    """Load an exported directory, or any other LLaVA-style one that transformers supports.

    Args:
        dtype: one of `DTYPE_CHOICES`; `auto` takes the directory's.
        device: a torch device; None takes `default_device`.

    Raises:
        ModelError: files are missing or damaged, the directory needs code of its own, or its tensors do not
            fit the architecture.
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
    """This rank's GPU, or ``cpu`` without one. More ranks than GPUs share them."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % gpus}" if gpus else "cpu"


def _load_model(path: Path, dtype: str) -> Any:
    transformers = _transformers()
    try:
        model, report = transformers.AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # transformers raises many types for damaged or unsuitable directories
        raise ModelError(f"{path} cannot be loaded: {_first_line(error)}") from None
    wrong = [
        f"{kind} {name}"
        for kind, names in (("missing", report["missing_keys"]), ("unexpected", report["unexpected_keys"]))
        for name in sorted(names)
        if not name.endswith(_COMPUTED)
    ]
    wrong += [f"wrong shape {key!s}" for key in report["mismatched_keys"]]
    if wrong:  # transformers only warns, and leaves missing tensors random
        raise ModelError(
            f"{path}: {len(wrong)} tensors do not fit the architecture, the first: {wrong[0]}; if a newer "
            f"transformers than {transformers.__version__} wrote it, upgrade transformers"
        )
    return model


def _load_processor(path: Path) -> Any:
    transformers = _transformers()
    try:
        processor = transformers.AutoProcessor.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # as for the model
        raise ModelError(f"{path}: the processor cannot be loaded: {_first_line(error)}") from None
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise ModelError(
            f"{path} has a {type(processor).__name__}, which is not a processor of text and images; "
            "processor_config.json must name the class of one"
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
