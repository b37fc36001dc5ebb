"""Our builders against transformers: tiny random models with the same weights, in fp32 on a CPU.

Norms and biases are randomised, because fresh ones (1 and 0) would hide most errors. Measured on torch 2.13
with transformers 5.23 and megatron-core 0.16.1 and 0.19.2, logits and features are bit-identical except for
Phi's, which differ by 2.7e-7 of the largest because its tanh GELU is written out. Gradients differ by at most
6e-7, because sums are in another order. The tolerance of 5e-6 leaves room for other BLAS builds and is well
below the effect of the smallest known mistake, 5e-5, which is exact GELU in place of tanh GELU
(`test_a_wrong_detail_shows`).
"""

from __future__ import annotations

import copy

import pytest
import torch

from megatron_evomoe.config import RunConfig, from_mapping
from megatron_evomoe.config.presets import VISION_PRESETS
from megatron_evomoe.model.inventory import padded_vocab_size
from megatron_evomoe.model.language import build_language_model
from megatron_evomoe.model.projector import build_projector
from megatron_evomoe.model.transformer_config import shapes_only
from megatron_evomoe.model.vision import build_vision_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [hf])")
pytestmark = pytest.mark.usefixtures("one_rank")

TOLERANCE = 5e-6  # relative to the largest value
VOCAB, LAYERS, HIDDEN, FFN, HEADS = 140, 3, 64, 96, 4

HF_BASE = {
    "vocab_size": VOCAB,
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_attention_heads": HEADS,
    "attn_implementation": "eager",
    "tie_word_embeddings": False,
}
OUR_BASE = {
    "vocab_size": VOCAB,
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": FFN,
    "num_attention_heads": HEADS,
    "make_vocab_size_divisible_by": 4,
    "tie_word_embeddings": False,
}

# name: (transformers' configuration class, its arguments, our arguments)
LANGUAGE = {
    "llama": ("LlamaConfig", {"rms_norm_eps": 1e-5}, {"norm_epsilon": 1e-5}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
    "qwen2": (
        "Qwen2Config",
        {"num_key_value_heads": 2, "rope_theta": 1e6},
        {"num_query_groups": 2, "rotary_base": 1000000, "add_qkv_bias": True},
    ),
    "qwen3": (
        "Qwen3Config",
        {"num_key_value_heads": 2, "head_dim": 24},
        {"num_query_groups": 2, "kv_channels": 24, "qk_layernorm": True},
    ),
    "mistral": (
        "MistralConfig",
        {"num_key_value_heads": 2, "sliding_window": 6},
        {"num_query_groups": 2, "window_size": 6},
    ),
    "stablelm": (
        "StableLmConfig",
        {"num_key_value_heads": 4, "use_qkv_bias": True, "layer_norm_eps": 1e-5},
        {"normalization": "LayerNorm", "norm_epsilon": 1e-5, "add_qkv_bias": True, "rotary_percent": 0.25},
    ),
    "phi": (
        "PhiConfig",
        {"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
        {
            "normalization": "LayerNorm",
            "norm_epsilon": 1e-5,
            "add_bias_linear": True,
            "parallel_residual": True,
            "lm_head_bias": True,
            "activation": "gelu_tanh",
            "gated_linear_unit": False,
            "rotary_percent": 0.5,
        },
    ),
}


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Scale matrices up, so that softmaxes are not flat, and move norms and biases away from 1 and 0."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(3.0)
    return module.eval()


def fuse_qkv(parts: list[torch.Tensor], groups: int) -> torch.Tensor:
    """Concatenate, for each key/value group, its queries, its key and its value."""
    return torch.cat([p.reshape(groups, -1, *p.shape[1:]) for p in parts], dim=1).reshape(
        -1, *parts[0].shape[1:]
    )


def core_language_weights(hf: dict[str, torch.Tensor], config: RunConfig) -> dict[str, torch.Tensor]:
    """transformers' weights under megatron-core's names; every weight in `hf` must be used."""
    left, out = dict(hf), {}
    groups = config.language.query_groups

    def move(target: str, *sources: str, fuse=torch.cat) -> None:
        for kind in ("weight", "bias"):
            if f"{sources[0]}.{kind}" in left:
                out[f"{target}.{kind}"] = fuse([left.pop(f"{source}.{kind}") for source in sources])

    move("embedding.word_embeddings", "model.embed_tokens")
    move("decoder.final_layernorm", "model.norm")
    move("decoder.final_layernorm", "model.final_layernorm")
    move("output_layer", "lm_head")
    for i in range(LAYERS):
        theirs, ours = f"model.layers.{i}", f"decoder.layers.{i}"
        move(f"{ours}.input_layernorm", f"{theirs}.input_layernorm")
        move(f"{ours}.pre_mlp_layernorm", f"{theirs}.post_attention_layernorm")
        move(
            f"{ours}.self_attention.linear_qkv",
            *(f"{theirs}.self_attn.{x}_proj" for x in "qkv"),
            fuse=lambda parts: fuse_qkv(parts, groups),
        )
        move(f"{ours}.self_attention.linear_proj", f"{theirs}.self_attn.o_proj")
        move(f"{ours}.self_attention.linear_proj", f"{theirs}.self_attn.dense")
        for x in "qk":
            move(f"{ours}.self_attention.{x}_layernorm", f"{theirs}.self_attn.{x}_norm")
        move(f"{ours}.mlp.linear_fc1", f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj")
        move(f"{ours}.mlp.linear_fc2", f"{theirs}.mlp.down_proj")
        for x in ("fc1", "fc2"):
            move(f"{ours}.mlp.linear_{x}", f"{theirs}.mlp.{x}")
    if config.language.tie_word_embeddings:
        out.pop("output_layer.weight", None)
    assert not left, f"not mapped: {sorted(left)}"
    return out


def load_all(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Load the weights; no key may be missing or unexpected, except megatron-core's empty extra states."""
    result = model.load_state_dict(weights, strict=False)
    missing = [k for k in result.missing_keys if "_extra_state" not in k]
    assert not missing and not result.unexpected_keys, (missing, result.unexpected_keys)
    return model.eval()


def language_pair(name: str, **ours):
    kind, hf_arguments, our_arguments = LANGUAGE[name]
    hf_config = getattr(transformers, kind)(**{**HF_BASE, **hf_arguments})
    hf = randomised(transformers.AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager"))
    config = from_mapping({"language": {**OUR_BASE, **our_arguments, **ours}})
    model = build_language_model(config, stage_kind="dense")
    weights = {k: v.detach().clone() for k, v in hf.state_dict().items()}
    return hf, load_all(model, core_language_weights(weights, config))


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


IDS = torch.randint(0, VOCAB, (2, 17), generator=torch.Generator().manual_seed(3))
POSITIONS = torch.arange(17).expand(2, -1)


@pytest.mark.parametrize("name", LANGUAGE)
def test_logits_and_gradients_agree(name):
    hf, model = language_pair(name)
    wanted, got = hf(input_ids=IDS).logits, model(IDS, POSITIONS, None)
    assert relative_error(got, wanted) < TOLERANCE
    out_gradient = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(5))
    wanted.backward(out_gradient)
    got.backward(out_gradient)
    embedding = hf.get_input_embeddings().weight.grad
    assert relative_error(model.embedding.word_embeddings.weight.grad, embedding) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "change", "at_least"),
    [
        ("llama", {"norm_epsilon": 1e-6}, 1e-4),
        ("mistral", {"window_size": None}, 1e-2),
        ("stablelm", {"rotary_percent": 0.5}, 1e-2),
        ("qwen2", {"rotary_base": 10000}, 1e-3),
        ("phi", {"activation": "gelu"}, 2e-5),
    ],
)
def test_a_wrong_detail_shows(name, change, at_least):
    """The comparison detects each of these single differences."""
    hf, model = language_pair(name, **change)
    with torch.no_grad():
        assert relative_error(model(IDS, POSITIONS, None), hf(input_ids=IDS).logits) > at_least


TOWERS = {
    "clip": ("CLIPVisionConfig", "CLIPVisionModel"),
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel"),
}


def core_tower_weights(hf: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    hf = {k.removeprefix("vision_model."): v for k, v in hf.items()}
    out = {
        "conv1.weight": hf["embeddings.patch_embedding.weight"],
        "position_embeddings.weight": hf["embeddings.position_embedding.weight"],
    }
    if "embeddings.class_embedding" in hf:
        out["class_token"] = hf["embeddings.class_embedding"][None, None]
        out["ln_pre.weight"], out["ln_pre.bias"] = hf["pre_layrnorm.weight"], hf["pre_layrnorm.bias"]
    else:
        out["conv1.bias"] = hf["embeddings.patch_embedding.bias"]
    names = {
        "input_layernorm": "layer_norm1",
        "pre_mlp_layernorm": "layer_norm2",
        "mlp.linear_fc1": "mlp.fc1",
        "mlp.linear_fc2": "mlp.fc2",
        "self_attention.linear_proj": "self_attn.out_proj",
    }
    for i in range(layers):
        theirs, ours = f"encoder.layers.{i}", f"decoder.layers.{i}"
        for kind in ("weight", "bias"):
            for our_name, their_name in names.items():
                out[f"{ours}.{our_name}.{kind}"] = hf[f"{theirs}.{their_name}.{kind}"]
            out[f"{ours}.self_attention.linear_qkv.{kind}"] = fuse_qkv(
                [hf[f"{theirs}.self_attn.{x}_proj.{kind}"] for x in "qkv"], HEADS
            )
    return out


@pytest.mark.parametrize(("kind", "select"), [("clip", "patch"), ("clip", "cls_patch"), ("siglip", "patch")])
@pytest.mark.parametrize("feature_layer", [-2, -1, 1])
def test_features_agree(kind, select, feature_layer):
    config_name, model_name = TOWERS[kind]
    hf_config = getattr(transformers, config_name)(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=32,
        patch_size=8,
        layer_norm_eps=1e-5,
        attn_implementation="eager",
    )
    hf = randomised(getattr(transformers, model_name)(hf_config))
    config = from_mapping(
        {
            "vision": {
                "model_type": kind,
                "image_size": 32,
                "patch_size": 8,
                "hidden_size": HIDDEN,
                "num_layers": LAYERS,
                "num_attention_heads": HEADS,
                "ffn_hidden_size": FFN,
                "feature_layer": feature_layer,
                "feature_select": select,
            }
        }
    )
    tower = load_all(
        build_vision_model(config), core_tower_weights(hf.state_dict(), config.vision.num_layers_used)
    )
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = hf(pixels, output_hidden_states=True).hidden_states[feature_layer]
        got = tower(pixels)
    if kind == "clip" and select == "patch":
        wanted = wanted[:, 1:]
    assert got.shape == wanted.shape == (2, config.vision.tokens_per_image, HIDDEN)
    assert relative_error(got, wanted) < TOLERANCE


def test_projector_is_llavas():
    """The projector uses exact GELU; megatron-core's fused bias+GELU, the tanh form, would differ by 5e-5."""
    config = from_mapping({"language": OUR_BASE})
    reference = randomised(
        torch.nn.Sequential(torch.nn.Linear(64, HIDDEN), torch.nn.GELU(), torch.nn.Linear(HIDDEN, HIDDEN))
    )
    projector = build_projector(config)
    load_all(
        projector,
        {
            f"encoder.linear_fc{i // 2 + 1}.{kind}": getattr(reference[i], kind)
            for i in (0, 2)
            for kind in ("weight", "bias")
        },
    )
    features = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(1)) * 3
    tanh = copy.deepcopy(reference)
    tanh[1] = torch.nn.GELU(approximate="tanh")
    with torch.no_grad():
        assert relative_error(projector(features), reference(features)) < TOLERANCE
        assert relative_error(projector(features), tanh(features)) > 2e-5


PUBLISHED = {
    "qwen2-0.5b": ("Qwen2Config", {"num_key_value_heads": 2}),
    "stablelm-2-1.6b": ("StableLmConfig", {"use_qkv_bias": True, "num_key_value_heads": 32}),
    # Qwen's own class is remote code; Qwen2's has the same parts
    "qwen-1.8b": ("Qwen2Config", {"num_key_value_heads": 16}),
    "phi-2": ("PhiConfig", {}),
    "openchat-7b": ("MistralConfig", {"num_key_value_heads": 8}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_transformers_parameter_counts(name):
    config = from_mapping({"preset": name})
    lm = config.language
    kind, arguments = PUBLISHED[name]
    hf_config = getattr(transformers, kind)(
        vocab_size=padded_vocab_size(config),
        num_hidden_layers=lm.num_layers,
        hidden_size=lm.hidden_size,
        intermediate_size=lm.ffn_hidden_size,
        num_attention_heads=lm.num_attention_heads,
        tie_word_embeddings=lm.tie_word_embeddings,
        **arguments,
    )
    with torch.device("meta"), shapes_only():
        theirs = transformers.AutoModelForCausalLM.from_config(hf_config)
        ours = build_language_model(config, stage_kind="dense")
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("name", VISION_PRESETS)
def test_towers_have_transformers_parameter_counts(name):
    """Our tower is transformers' tower without the last layer, the norm after it, and the pooling head."""
    config = from_mapping({"vision": VISION_PRESETS[name]})
    vision = config.vision
    config_name, model_name = TOWERS[vision.model_type]
    with torch.device("meta"), shapes_only():
        theirs = getattr(transformers, model_name)(
            getattr(transformers, config_name)(
                hidden_size=vision.hidden_size,
                intermediate_size=vision.ffn_hidden_size,
                num_hidden_layers=vision.num_layers,
                num_attention_heads=vision.num_attention_heads,
                image_size=vision.image_size,
                patch_size=vision.patch_size,
            )
        )
        ours = build_vision_model(config)
    unused = ("post_layernorm.", "head.", f"encoder.layers.{vision.num_layers - 1}.")
    wanted = sum(
        p.numel()
        for n, p in theirs.named_parameters()
        if not n.removeprefix("vision_model.").startswith(unused)
    )
    assert sum(p.numel() for p in ours.parameters()) == wanted
