"""Every preset, built without memory, has the published number of parameters.

The published counts are those of the models' files on Hugging Face; `test_dense_hf` derives them again from
transformers.
"""

from __future__ import annotations

import resource

import pytest
import torch

from megatron_evomoe.config import from_mapping
from megatron_evomoe.config.presets import DEFAULT_VISION, LANGUAGE_PRESETS, PRESETS, VISION_PRESETS
from megatron_evomoe.model.inventory import padded_vocab_size
from megatron_evomoe.model.language import build_language_model
from megatron_evomoe.model.projector import build_projector
from megatron_evomoe.model.transformer_config import shapes_only
from megatron_evomoe.model.vision import build_vision_model

pytestmark = pytest.mark.usefixtures("one_rank")

# The parameters of Mistral-7B, and two more tokens in two matrices.
# The model card's 1,644,417,024 leaves out the biases of 48 norms.
LANGUAGE_PARAMETERS = {
    "qwen2-0.5b": 494_032_768,
    "stablelm-2-1.6b": 1_644_515_328,
    "qwen-1.8b": 1_836_828_672,
    "phi-2": 2_779_683_840,
    "openchat-7b": 7_241_732_096 + 2 * 2 * 4096,
}

# Published count, norm after the last layer, other parameters that LLaVA does not use, one layer.
TOWER_PARAMETERS = {
    "clip-l-336": (303_507_456, 2 * 1024, 0, 12_596_224),
    "siglip-l-384": (316_283_904, 2 * 1024, 12_595_200, 12_596_224),  # without the pooling head
    "siglip-so400m-224": (427_680_704, 2 * 1152, 15_238_352, 15_239_504),
}


def count(module: torch.nn.Module, containing: str = "") -> int:
    """Number of parameters whose name contains `containing`; none may use memory."""
    parameters = dict(module.named_parameters())
    assert {p.device.type for p in parameters.values()} == {"meta"}
    return sum(p.numel() for n, p in parameters.items() if containing in n)


def padding(config) -> int:
    """Number of parameters in embedding rows beyond the vocabulary."""
    matrices = 1 if config.language.tie_word_embeddings else 2
    return (padded_vocab_size(config) - config.language.vocab_size) * config.language.hidden_size * matrices


def test_counts_are_known_for_all():
    assert (
        LANGUAGE_PARAMETERS.keys() == LANGUAGE_PRESETS.keys()
        and TOWER_PARAMETERS.keys() == VISION_PRESETS.keys()
    )
    assert len(PRESETS) == 1 + len(LANGUAGE_PRESETS) * len(VISION_PRESETS)


@pytest.mark.parametrize("name", LANGUAGE_PRESETS)
def test_language_parameters(name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = from_mapping({"preset": name})
    with shapes_only():
        model = build_language_model(config, stage_kind="dense")
    assert count(model) - padding(config) == LANGUAGE_PARAMETERS[name]
    assert padding(config) == (6 * 2 * 4096 if name == "openchat-7b" else 0)  # 32002 is padded to 32008
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


@pytest.mark.parametrize("tower", VISION_PRESETS)
def test_tower_and_projector_parameters(tower):
    """The tower lacks the last layer, the norm after it and the pooling head."""
    name = "qwen-1.8b" if tower == DEFAULT_VISION else f"qwen-1.8b+{tower}"
    config = from_mapping({"preset": name})
    published, last_norm, head, layer = TOWER_PARAMETERS[tower]
    with shapes_only():
        vision, projector = build_vision_model(config), build_projector(config)
    assert count(vision) == published - last_norm - head - layer
    width, hidden = config.vision.hidden_size, config.language.hidden_size
    assert count(projector) == width * hidden + hidden + hidden * hidden + hidden
    assert config.vision.tokens_per_image == (256 if tower == "siglip-so400m-224" else 576)


@pytest.mark.parametrize(("h", "r", "active"), [(16, 16, 1_877_821_824), (32, 32, 1_994_214_144)])
def test_qwen_mixture_parameters(h, r, active):
    """Each mixture adds N − 1 experts, two hypernetworks and φ, on every second layer.

    With h = r = 32 a token uses 2.0B parameters of the language model, the number that the paper gives for
    1.8B.
    """
    config = from_mapping({"preset": "qwen-1.8b", "moe": {"dtr_hidden_size": h, "dtr_rank": r}})
    with shapes_only():
        model = build_language_model(config, stage_kind="route")
        evolving = build_language_model(config, stage_kind="evolve")
    expert = 3 * 2048 * 5504
    router = 12 * (2 * (h * 2048 + h + (h + 1) * 3 * r * 2048) + 4 * 2048)
    assert count(model, ".router.") == router
    assert count(model, ".experts.") == 12 * 4 * expert
    assert count(model) == LANGUAGE_PARAMETERS["qwen-1.8b"] + 12 * 3 * expert + router
    assert count(model) - 12 * 3 * expert == active
    assert count(evolving) == LANGUAGE_PARAMETERS["qwen-1.8b"]


def test_a_section_goes_over_the_preset():
    config = from_mapping(
        {"preset": "qwen-1.8b", "vision": VISION_PRESETS["siglip-l-384"], "language": {"num_layers": 2}}
    )
    assert config.vision.model_type == "siglip" and config.language.num_layers == 2
    assert config.language.hidden_size == 2048


def test_tiny_is_the_defaults():
    config = from_mapping({"preset": "tiny"})
    assert (config.language.hidden_size, config.vision.tokens_per_image) == (128, 16)
