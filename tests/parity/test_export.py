"""Exports compute what megatron-core computes, in every way of loading them.

Compared are the logits and each token's expert in each layer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.data.tokenizer import train_sentencepiece
from megatron_evomoe.hf import register
from megatron_evomoe.hf.to_hf.exporting import Request, export_model
from tests.parity.export_models import CUSTOM, LANGUAGES, TOLERANCE, answer_of, core_answer, saved_model

pytest.importorskip(
    "transformers", minversion="4.56", reason="transformers 4.56 or later is not installed (extra [hf])"
)
pytestmark = pytest.mark.usefixtures("one_rank")
FRESH = Path(__file__).parents[1] / "unit" / "hf" / "fresh_process.py"
CLEAN_REPORT = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
LINES = [
    "USER: <image>\nWhich digit is this? ASSISTANT: It is seven.",
    "A chat between a curious user and an assistant.",
] * 20


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory) -> Path:
    return train_sentencepiece(LINES, tmp_path_factory.mktemp("export") / "tokenizer.model", 300)


@pytest.fixture
def make(tmp_path, tokenizer_path):
    """A function that saves a model of a stage kind and exports it; returns both.

    It takes the kind, the fields of the export's `Request`, and the fields of the model.
    """

    def build(kind, *, export=None, **model):
        saved = saved_model(tmp_path / "run", tokenizer_path, kind, **model)
        return saved, export_model(
            Request(checkpoint=str(saved.folder), output=str(tmp_path / "out"), **(export or {}))
        )

    return build


def load_here(path: Path):
    """The answer of an export that is loaded in this process."""
    model = loaded(path)
    routed = getattr(model.config.text_config, "router", "none") != "none"
    return answer_of(model, routed=routed, image_token=model.config.image_token_index)


def loaded(path: Path):
    """The model of an export, loaded through the classes that the package registers."""
    from transformers import AutoModelForImageTextToText

    register()
    model, report = AutoModelForImageTextToText.from_pretrained(path, dtype="auto", output_loading_info=True)
    assert {key: sorted(map(str, found)) for key, found in report.items()} == CLEAN_REPORT
    return model.eval()


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    size = wanted["logits"].shape[1]
    error = (got["logits"][:, :size] - wanted["logits"]).abs().max() / wanted["logits"].abs().max()
    assert error < TOLERANCE, f"logits differ by {error:.1e}"
    assert got.keys() == wanted.keys()
    for name in wanted.keys() - {"logits"}:
        assert torch.equal(got[name], wanted[name]), (
            f"{name}: {(got[name] != wanted[name]).any(-1).sum()} tokens differ"
        )


@pytest.mark.parametrize("name", CUSTOM)
def test_routed_models_of_every_language(make, name):
    saved, exported = make("route", language=CUSTOM[name])
    wanted = core_answer(saved, 0)
    assert {"experts.0", "experts.1"} < wanted.keys() and len(
        set(wanted["experts.0"].int().argmax(-1).tolist())
    ) > 1
    assert_same(load_here(exported.output), wanted)


@pytest.mark.parametrize(
    "moe",
    [
        {"router": "linear"},
        {"router": "modality-linear", "moe_router_topk": 2},
        {"router": "cosine", "moe_router_topk": 2},
        {"router_gate": "prob"},
        {"dtr_activation": "gelu", "moe_router_topk": 3},
    ],
    ids=lambda moe: "-".join(map(str, moe.values())),
)
def test_routers_and_gates(make, moe):
    saved, exported = make("route", moe=moe)
    assert_same(load_here(exported.output), core_answer(saved, 0))


def test_a_linear_router_with_a_bias(make):
    saved, exported = make("route", moe={"router": "linear"}, language=CUSTOM["phi"])
    assert_same(load_here(exported.output), core_answer(saved, 0))


@pytest.mark.parametrize(
    "vision", [{"model_type": "siglip"}, {"feature_layer": -1, "num_layers": 2}], ids=["siglip", "last"]
)
@pytest.mark.parametrize("kind", ["warmup", "route"])
def test_towers(make, vision, kind):
    saved, exported = make(kind, vision=vision)
    assert_same(load_here(exported.output), core_answer(saved, 0))


@pytest.mark.parametrize("name", LANGUAGES)
def test_dense_models_as_transformers_own(make, name):
    saved, exported = make("warmup", language=LANGUAGES[name])
    assert exported.format == "llava"
    assert_same(load_here(exported.output), core_answer(saved, 0))


@pytest.mark.parametrize("export", [{}, {"dense": True}], ids=["custom code", "dense"])
def test_evolving_models_compute_with_their_first_expert(make, export):
    saved, exported = make("evolve", export=export)
    assert exported.format == ("llava" if export else "evomoe")
    assert_same(load_here(exported.output), core_answer(saved, 0))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CUSTOM)
def test_packed_rows_as_transformers_packs_them(make, name, attention):
    """Samples whose positions start again in one row give the logits and routes that they give alone."""
    _, exported = make("route", language=CUSTOM[name])
    model = loaded(exported.output)
    model.set_attn_implementation(attention)
    samples = [torch.randint(5, 60, (1, n), generator=torch.Generator().manual_seed(n)) for n in (7, 1, 12)]
    alone = [model(s, use_cache=False, output_router_logits=True) for s in samples]
    row = torch.cat(samples, dim=1)
    positions = torch.cat([torch.arange(s.shape[1]) for s in samples])[None]
    packed = model(row, position_ids=positions, use_cache=False, output_router_logits=True)
    pairs = {"logits": (packed.logits, torch.cat([out.logits for out in alone], dim=1))}
    for i, logits in enumerate(packed.router_logits):
        pairs[f"router {i}"] = logits, torch.cat([out.router_logits[i] for out in alone])
    for what, (got, wanted) in pairs.items():
        # of the largest entry, as in `assert_same`; other lengths take other kernels
        assert (got - wanted).abs().max() < TOLERANCE * wanted.abs().max(), what
    wanted = pairs["logits"][1]
    assert (model(row, use_cache=False).logits - wanted).abs().max() > 1e-3 * wanted.abs().max()


def fresh(path: Path, mode: str, tmp_path: Path, python: str = sys.executable) -> dict:
    """The answer of `fresh_process.py`, whose environment has neither the checkout nor cached remote code."""
    root = str(FRESH.parents[3])
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "OMP_NUM_THREADS": "1",
        **({"PYTHONPATH": root} if mode == "installed" else {}),
    }
    out = tmp_path / f"{mode}.pt"
    done = subprocess.run(
        [python, str(FRESH), str(path), mode, str(out)], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=False)


@pytest.mark.parametrize(("kind", "modes"), [("route", ("installed", "remote")), ("warmup", ("plain",))])
def test_three_ways_of_loading(make, kind, modes, tmp_path):
    saved, exported = make(kind)
    wanted = core_answer(saved, 0)
    for mode in modes:
        check_fresh(fresh(exported.output, mode, tmp_path), wanted, saved.config, mode)


def check_fresh(found, wanted, config, mode):
    assert found["report"] == CLEAN_REPORT, mode
    origin = {
        "installed": "megatron_evomoe.hf.remote_code",
        "remote": "transformers_modules.",
        "plain": "transformers.models.llava",
    }[mode]
    assert found["class"].startswith(origin)
    assert_same(found["answer"], wanted)
    assert all(found["generation"].values()), (mode, found["generation"])
    check_processor(found["processor"], config)


def check_processor(found, config):
    """Token ids equal training's; pixels differ a little, because a different bicubic filter resizes them."""
    from megatron_evomoe.data.conversation import encode_prompt
    from megatron_evomoe.data.image import processor_for
    from megatron_evomoe.data.picture import as_rgb
    from megatron_evomoe.data.tokenizer import build_tokenizer

    tokenizer, images = build_tokenizer(config.data.tokenizer), processor_for(config)
    question = "Which digit is this?"
    for i, (text, count) in enumerate(
        [(f"<image>\n{question}", 1), (f"<image><image>{question}", 2), (question, 0)]
    ):
        sample = encode_prompt(
            [{"from": "human", "value": text}],
            count,
            tokenizer,
            config.data.conversation_template,
            config.vision.tokens_per_image,
        )
        wanted = [
            tokenizer.vocab_size if kind == TokenType.VISION else t
            for t, kind in zip(sample.tokens, sample.token_types, strict=True)
        ]
        assert found["input_ids"][i][found["attention_mask"][i].bool()].tolist() == wanted
    pictures = [np.asarray(as_rgb(Image.fromarray(p))) for p in found["pictures"]]
    ours = images.normalize(torch.stack([images(p) for p in pictures]), torch.float32)
    difference = (found["pixel_values"] - ours).abs() * torch.tensor(images.std).view(1, 3, 1, 1) * 255
    assert difference.mean() < 0.1 and difference.max() <= 3, (difference.mean(), difference.max())


def test_sharded_and_half_precision(make):
    saved, exported = make("route", export={"dtype": "bfloat16", "max_shard_bytes": 50_000})
    files = sorted(p.name for p in exported.output.glob("*.safetensors"))
    index = json.loads((exported.output / "model.safetensors.index.json").read_text())
    assert len(files) > 3 and set(index["weight_map"].values()) == set(files)
    got, wanted = load_here(exported.output), core_answer(saved, 0)
    assert (got["logits"].float() - wanted["logits"]).abs().mean() < 0.1 * wanted["logits"].abs().mean()
