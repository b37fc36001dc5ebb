"""Exporting and importing again gives the checkpoint's tensors, bit for bit, in every stage and format."""

from __future__ import annotations

import pytest
import torch

from megatron_evomoe.checkpoint.stream import CheckpointReader
from megatron_evomoe.config import load_config
from megatron_evomoe.data.tokenizer import build_tokenizer, train_sentencepiece
from megatron_evomoe.hf.from_hf import importing, verify_import
from megatron_evomoe.hf.to_hf import exporting
from megatron_evomoe.hf.to_hf.origin import find_checkpoint
from megatron_evomoe.moe.router import ROUTERS
from tests.parity.export_models import CUSTOM, PHI, saved_model

pytest.importorskip("tokenizers")
pytestmark = pytest.mark.usefixtures("one_rank")

LINES = [
    "USER: <image>\nWhich digit is this? ASSISTANT: It is seven.",
    "A chat between a curious user and an assistant.",
] * 20
SIGLIP = {"model_type": "siglip", "feature_select": "cls_patch"}


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    return train_sentencepiece(LINES, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 300)


def is_model(key: str) -> bool:
    return (
        key.split(".")[0] in ("vision_model", "vision_projection", "language_model")
        and ".mlp.evolution." not in key
    )


CASES = [
    *(("route", {}, {"language": CUSTOM[name]}) for name in ("llama", "llama-biased", "qwen3", "phi")),
    *(("route", {}, {"moe": {"router": router}}) for router in ROUTERS),
    *(
        ("warmup", {}, {"language": language})
        for language in (CUSTOM["mistral"], CUSTOM["qwen2"], CUSTOM["stablelm"], PHI)
    ),
    ("warmup", {"format": "evomoe"}, {"vision": SIGLIP}),
    ("dense", {}, {"vision": SIGLIP, "language": CUSTOM["llama3-rope"]}),
    ("evolve", {}, {}),
    ("evolve", {"dense": True}, {}),
]


@pytest.mark.parametrize(("kind", "export", "model"), CASES)
def test_nothing_is_lost(tmp_path, tokenizer_path, kind, export, model):
    saved = saved_model(tmp_path / "run", tokenizer_path, kind, **model)
    exporting.export_model(
        exporting.Request(checkpoint=str(saved.folder), output=str(tmp_path / "hf"), **export)
    )
    imported = importing.import_model(
        importing.Request(model=str(tmp_path / "hf"), output=str(tmp_path / "back"))
    )
    before, after = CheckpointReader(find_checkpoint(saved.folder)), CheckpointReader(imported.checkpoint)
    wanted = {
        k: s
        for k, s in before.shapes.items()
        if is_model(k) and not (export.get("dense") and ".mlp.experts." in k)
    }
    assert {k: s[1:] for k, s in after.shapes.items()} == {k: s[1:] for k, s in wanted.items()}
    for key in wanted:
        ours, theirs = before.read(key), after.read(key)
        rows = saved.config.language.vocab_size if "word_embeddings" in key or "output_layer" in key else None
        assert torch.equal(ours[:rows], theirs[:rows]), key
        assert not theirs[rows:].any() or rows is None
    assert (imported.config.language, imported.config.vision) == (saved.config.language, saved.config.vision)
    assert imported.config.moe == saved.config.moe
    described = load_config(imported.checkpoint / "run_config.yaml").data
    assert described.conversation_template == saved.config.data.conversation_template
    assert [s["stage"] for s in after.record.lineage] == ["align", kind]
    vocabularies = [
        build_tokenizer(path).fingerprint().split(".")[0] for path in (imported.tokenizer, tokenizer_path)
    ]
    assert vocabularies[0] == vocabularies[1]


def test_an_import_can_be_exported_again(tmp_path, tokenizer_path):
    """The second export's weights file is the same as the first one's."""
    saved = saved_model(tmp_path / "run", tokenizer_path, "route")
    exporting.export_model(exporting.Request(checkpoint=str(saved.folder), output=str(tmp_path / "hf")))
    importing.import_model(importing.Request(model=str(tmp_path / "hf"), output=str(tmp_path / "back")))
    exporting.export_model(
        exporting.Request(checkpoint=str(tmp_path / "back"), output=str(tmp_path / "again"))
    )
    first, second = (tmp_path / name / "model.safetensors" for name in ("hf", "again"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("kind", "export"),
    [("route", {}), ("warmup", {}), ("warmup", {"format": "evomoe"})],
    ids=["custom code", "plain LLaVA", "dense in custom code"],
)
def test_an_export_s_import_can_be_verified(tmp_path, tokenizer_path, kind, export):
    """An import of an export can be verified when the vocabulary is not padded.

    The export's image token lies beyond the vocabulary, so it then has no row in megatron-core's embedding.
    """
    saved = saved_model(tmp_path / "run", tokenizer_path, kind, language={"make_vocab_size_divisible_by": 1})
    exporting.export_model(
        exporting.Request(checkpoint=str(saved.folder), output=str(tmp_path / "hf"), **export)
    )
    request = importing.Request(model=str(tmp_path / "hf"), output=str(tmp_path / "back"))
    rows = verify_import.compare(request, importing.import_model(request))
    assert [row.what.split(":")[0] for row in rows] == [
        "tensors",
        "logits, one image",
        "logits, positions up to 255",
    ]
    assert all(row.good for row in rows)
