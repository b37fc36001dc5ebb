"""Makes transformers know EvoMoE's classes."""

from __future__ import annotations

import contextlib


def register() -> None:
    """Register EvoMoE's classes with transformers.

    ``AutoConfig``, ``AutoImageProcessor``, ``AutoModel``, ``AutoModelForImageTextToText`` and
    ``AutoModelForCausalLM`` know them afterwards.

    Afterwards an exported directory loads without ``trust_remote_code``, and no code in the directory is run.
    Further calls change nothing.

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
    # A torchvision that does not fit torch raises here. Text works without it, and whatever handles images
    # reports the problem when it is used.
    with contextlib.suppress(RuntimeError):
        from megatron_evomoe.hf.remote_code.image_processing_evomoe import EvoMoeImageProcessor

        AutoImageProcessor.register(
            EvoMoeConfig, slow_image_processor_class=EvoMoeImageProcessor, exist_ok=True
        )
