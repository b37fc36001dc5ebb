"""All naming schemes of LLaVA files map to the same canonical names."""

from __future__ import annotations

import pytest

from megatron_evomoe.checkpoint.record import CheckpointError
from megatron_evomoe.hf.from_hf.canonical_names import canonical, is_unread

LM, HEAD, TOWER = "language_model.model.", "language_model.lm_head.weight", "vision_tower.vision_model."
CANONICAL = {
    f"{LM}embed_tokens.weight",
    f"{LM}layers.0.self_attn.q_proj.weight",
    f"{LM}layers.11.mlp.experts.3.gate_proj.weight",
    f"{LM}layers.11.mlp.router.text.weight2_down",
    f"{LM}norm.weight",
    HEAD,
    f"{TOWER}embeddings.class_embedding",
    f"{TOWER}pre_layrnorm.weight",
    f"{TOWER}encoder.layers.2.layer_norm1.bias",
    f"{TOWER}post_layernorm.weight",
    "multi_modal_projector.linear_1.weight",
    "multi_modal_projector.linear_2.bias",
}
TEXT = {name for name in CANONICAL if name.startswith("language_model.")}
VISION = {name for name in CANONICAL if name.startswith("vision_tower.")}
NAMINGS = {
    "transformers 4.x": (lambda n: n, CANONICAL),
    "transformers 5.4": (lambda n: n if n == HEAD else "model." + n, CANONICAL),
    "transformers 5.6": (lambda n: n.replace(TOWER, "vision_tower."), CANONICAL),
    "in memory": (
        lambda n: "lm_head.weight" if n == HEAD else "model." + n.replace(LM, "language_model."),
        CANONICAL,
    ),
    "LLaVA's own": (
        lambda n: (
            n.replace(LM, "model.")
            .replace("language_model.lm", "lm")
            .replace("multi_modal_projector.linear_1", "model.mm_projector.0")
            .replace("multi_modal_projector.linear_2", "model.mm_projector.2")
            .replace(TOWER, "model.vision_tower.vision_tower.vision_model.")
        ),
        CANONICAL,
    ),
    "language model alone": (lambda n: n.replace(LM, "model.").replace("language_model.lm", "lm"), TEXT),
    "decoder without its head": (lambda n: n.replace(LM, ""), TEXT - {HEAD}),
    "tower alone, 4.x": (lambda n: n.replace("vision_tower.", ""), VISION),
    "tower alone, 5.x": (lambda n: n.replace(TOWER, ""), VISION),
}


@pytest.mark.parametrize("name", NAMINGS)
def test_names_become_canonical(name):
    written, expected = NAMINGS[name]
    assert canonical([written(n) for n in expected], "here") == {n: written(n) for n in expected}


def test_unknown_names_stay_and_become_leftovers():
    assert canonical(["model.image_newline", "score.weight"], "here") == {
        n: n for n in ("model.image_newline", "score.weight")
    }


def test_two_names_for_one_tensor():
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight and language_model\.lm_head\.weight both stand for"
    ):
        canonical(["lm_head.weight", "language_model.lm_head.weight"], "here")


@pytest.mark.parametrize(
    ("name", "unread"),
    [
        (f"{TOWER}encoder.layers.1.mlp.fc1.weight", False),
        (f"{TOWER}encoder.layers.2.mlp.fc1.weight", True),
        (f"{TOWER}post_layernorm.bias", True),
        (f"{TOWER}head.probe", True),
        (f"{TOWER}embeddings.position_ids", True),
        (f"{TOWER}embeddings.position_embedding.weight", False),
        (f"{LM}layers.7.self_attn.rotary_emb.inv_freq", True),
        (f"{LM}layers.7.self_attn.q_proj.weight", False),
        ("text_model.encoder.layers.0.mlp.fc1.weight", True),
        ("logit_scale", True),
        (f"{LM}norm.weight", False),
    ],
)
def test_what_llava_does_not_read(name, unread):
    assert is_unread(name, tower_layers=2) is unread
