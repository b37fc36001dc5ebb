"""Hugging Face in and out.

Importing this makes transformers know EvoMoE's classes, so that an exported directory loads without
``trust_remote_code``. The converters live here too and need no transformers (seconds and 150 MB), so this
waits until something imports it.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType


def register() -> None:
    """Make ``AutoConfig``, ``AutoImageProcessor``, ``AutoModel``, ``AutoModelForImageTextToText`` and
    ``AutoModelForCausalLM`` know ``evomoe``.

    Raises:
        ImportError: transformers is not installed, or is older than 4.56.
    """
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    from megatron_evomoe.hf.remote_code.configuration_evomoe import EvoMoeConfig
    from megatron_evomoe.hf.remote_code.modeling_evomoe import EvoMoeForConditionalGeneration

    AutoConfig.register(EvoMoeConfig.model_type, EvoMoeConfig, exist_ok=True)
    for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForCausalLM):
        auto.register(EvoMoeConfig, EvoMoeForConditionalGeneration, exist_ok=True)
    with contextlib.suppress(
        RuntimeError
    ):  # a torchvision that does not fit torch; what has to do with pictures says so when used
        from megatron_evomoe.hf.remote_code.image_processing_evomoe import EvoMoeImageProcessor

        AutoImageProcessor.register(
            EvoMoeConfig, slow_image_processor_class=EvoMoeImageProcessor, exist_ok=True
        )


class _RegisterOnImport(importlib.abc.MetaPathFinder):
    """Finds transformers where Python would, and registers once it has been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == "transformers" else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            with contextlib.suppress(ImportError):  # too old a transformers has other users
                register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "transformers" in sys.modules:
    with contextlib.suppress(ImportError):
        register()
else:
    sys.meta_path.insert(0, _RegisterOnImport())
