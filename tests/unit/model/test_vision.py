"""The tower and the projector: shapes, batches without images, and full attention of patches."""

from __future__ import annotations

import pytest
import torch

from megatron_evomoe.config import from_mapping
from megatron_evomoe.model.projector import build_projector
from megatron_evomoe.model.vision import build_vision_model

pytestmark = pytest.mark.usefixtures("one_rank")


def config_of(**vision):
    return from_mapping({"vision": vision})


@pytest.mark.parametrize(
    ("vision", "tokens", "layers"),
    [
        ({}, 16, 2),
        ({"feature_select": "cls_patch"}, 17, 2),
        ({"feature_layer": -1}, 16, 3),
        ({"feature_layer": 1}, 16, 1),
        ({"model_type": "siglip"}, 16, 2),
        ({"model_type": "siglip", "feature_select": "cls_patch", "image_size": 16}, 4, 2),
    ],
)
def test_shapes(vision, tokens, layers):
    config = config_of(**vision)
    tower = build_vision_model(config)
    side = config.vision.image_size
    assert config.vision.tokens_per_image == tokens and len(tower.decoder.layers) == layers
    features = tower(torch.randn(3, 3, side, side))
    assert features.shape == (3, tokens, 64)
    assert build_projector(config)(features).shape == (3, tokens, 128)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("trains", [True, False])
def test_no_images(kind, trains):
    """Without images the output is empty, and every trained parameter gets a zero gradient."""
    config = config_of(model_type=kind)
    tower, projector = build_vision_model(config).requires_grad_(trains), build_projector(config)
    out = projector(tower(torch.empty(0, 3, 32, 32)))
    assert out.shape == (0, 16, 128) and out.requires_grad
    words = torch.randn(4, 128).masked_scatter(torch.zeros(4, 1, dtype=torch.bool), out)
    words.sum().backward()
    for module, expected in ((projector, True), (tower, trains)):
        for name, parameter in module.named_parameters():
            assert (parameter.grad is not None) == expected, name
            assert parameter.grad is None or not parameter.grad.any(), name


def test_no_images_without_autograd():
    with torch.no_grad():
        assert build_vision_model(config_of())(torch.empty(0, 3, 32, 32)).shape == (0, 16, 64)


def test_attention_is_not_causal():
    tower = build_vision_model(config_of()).eval()
    pixels = torch.randn(1, 3, 32, 32)
    changed = pixels.clone()
    changed[..., -8:, -8:] += 1  # only the last patch differs
    with torch.no_grad():
        assert not torch.isclose(tower(pixels)[0, 0], tower(changed)[0, 0]).all()


def test_precision_follows_the_configuration():
    config = from_mapping({"train": {"bf16": True}})
    tower, projector = build_vision_model(config), build_projector(config)
    assert {p.dtype for m in (tower, projector) for p in m.parameters()} == {torch.bfloat16}
    assert projector(tower(torch.randn(1, 3, 32, 32))).dtype == torch.bfloat16


def test_initialisation():
    """Embeddings start near 0.02, and the projector with the spread of torch.nn.Linear at any width."""
    torch.manual_seed(0)
    config = config_of(hidden_size=256)
    tower, projector = build_vision_model(config), build_projector(config)
    assert tower.position_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for linear in (projector.encoder.linear_fc1, projector.encoder.linear_fc2):
        reference = torch.nn.Linear(linear.input_size, linear.output_size).weight.std().item()
        assert linear.weight.std().item() == pytest.approx(reference, rel=0.1)


def test_saved_under_transformer_engines_names():
    tower = build_vision_model(config_of())
    keys = {v.key for v in tower.sharded_state_dict("vision_model.").values()}
    assert "vision_model.decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in keys
    assert "vision_model.decoder.layers.1.mlp.linear_fc1.layer_norm_bias" in keys
    assert {"vision_model.class_token", "vision_model.conv1.weight", "vision_model.ln_pre.weight"} <= keys
    assert not any("ln_post" in k for k in keys)
