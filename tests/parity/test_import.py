"""Imported transformers models give the same logits and the same greedy text in megatron-core.

They are loaded under several layouts, in fp32 on a CPU. All weights are random, including norms and biases.
Measured with torch 2.13, transformers 5.23 and megatron-core 0.16.1, the logits are bit-identical on one rank
and under PP 2, except for Phi's, which differ by 3.6e-7 of the largest because its tanh GELU is written out
there. Under TP 2, which sums in another order, they differ by at most 9.8e-7. The tolerance of 5e-6 leaves
room for other BLAS builds; the effect of the smallest mistake in `test_a_wrong_detail_shows` is far above it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_evomoe.config import ConfigError, VisionConfig, from_mapping
from megatron_evomoe.hf import verification
from megatron_evomoe.hf.from_hf import verify_import
from megatron_evomoe.hf.from_hf.importing import Request, import_model
from tests import programs
from tests.parity import hf_models
from tests.parity.hf_models import IMAGE_TOKEN, LANGUAGE, LLAVA, PATCHES, SIDE

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [hf])")

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 5e-6  # relative to the largest logit
LAYOUTS = {"TP 1": {}, "TP 2": {"tensor_model_parallel_size": 2}, "PP 2": {"pipeline_model_parallel_size": 2}}
QUICK = ("llava", "llama3", "phi")
NAMES = (*LLAVA, *LANGUAGE)


def question(tokens_per_image: int | None) -> dict[str, Any]:
    """Two rows of the same length, each with an image at another position, or of text alone."""
    g = torch.Generator().manual_seed(5)
    rows, length = 2, 24
    tokens = torch.randint(3, IMAGE_TOKEN, (rows, length), generator=g)
    types = torch.zeros(rows, length, dtype=torch.int64)
    if tokens_per_image:
        types[0, 2 : 2 + tokens_per_image] = types[1, 7 : 7 + tokens_per_image] = 1
        tokens[types == 1] = IMAGE_TOKEN
    pixels = torch.randint(
        0, 256, (rows if tokens_per_image else 0, 3, SIDE, SIDE), generator=g, dtype=torch.uint8
    )
    return {"tokens": tokens, "types": types, "pixels": pixels}


QUESTIONS = {"text": question(None), str(PATCHES): question(PATCHES), str(PATCHES + 1): question(PATCHES + 1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("import")


@pytest.fixture(scope="module")
def imported(folder):
    """A function from a model's name to transformers' model and the imported folder; each is made once."""
    made: dict[str, tuple[Any, Path]] = {}

    def get(name: str) -> tuple[Any, Path]:
        if name not in made:
            model = hf_models.llava(name) if name in LLAVA else hf_models.language_model(name)
            source = str(hf_models.save(model, folder / "hf" / name))
            request = {"model": source} if name in LLAVA else {"language_model": source}
            import_model(Request(output=str(folder / "imported" / name), **request))
            made[name] = (model, folder / "imported" / name)
        return made[name]

    return get


def asked_of(name: str) -> dict[str, Any]:
    if name in LANGUAGE:
        return QUESTIONS["text"]
    _, tower, arguments = LLAVA[name]
    keeps_class_token = tower == "clip" and arguments.get("vision_feature_select_strategy") == "full"
    return QUESTIONS[str(PATCHES + int(keeps_class_token))]


@torch.no_grad()
def wanted(model: Any, name: str) -> dict[str, Any]:
    """transformers' logits and greedy answers for the questions that the model can take."""
    from megatron_evomoe.config import RunConfig
    from megatron_evomoe.data.image import processor_for

    given = asked_of(name)
    inputs = {"input_ids": given["tokens"], "attention_mask": torch.ones_like(given["tokens"])}
    if name in LLAVA:
        config = RunConfig(vision=VisionConfig(model_type=LLAVA[name][1], image_size=SIDE))
        inputs["pixel_values"] = processor_for(config).normalize(given["pixels"], torch.float32)
    answers = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    return {"logits": model(**inputs).logits, "answers": answers[:, given["tokens"].shape[1] :].tolist()}


def run(jobs: dict[str, Path], layout: str, folder: Path) -> dict[str, Any]:
    """Run `import_worker` on as many processes as the layout has ranks."""
    world = 1 if layout == "TP 1" else 2
    tag = layout.replace(" ", "") + "-" + str(len(jobs))
    asked, answered, questions = (folder / f"{tag}.{x}" for x in ("json", "results", "questions"))
    torch.save(QUESTIONS, questions)
    asked.write_text(
        json.dumps(
            {
                "questions": str(questions),
                "parallel": LAYOUTS[layout],
                "jobs": {name: str(path) for name, path in jobs.items()},
            }
        )
    )
    programs.run("-m", "tests.parity.import_worker", str(asked), str(answered), ranks=world)
    return torch.load(answered, weights_only=True)


def agree(names: tuple[str, ...], layout: str, imported: Any, folder: Path) -> None:
    pairs = {name: imported(name) for name in names}
    results = run({name: path for name, (_, path) in pairs.items()}, layout, folder)
    problems = []
    for name, (model, _) in pairs.items():
        theirs, ours = wanted(model, name), results[name]
        error = ((ours["logits"] - theirs["logits"]).abs().max() / theirs["logits"].abs().max()).item()
        print(f"{layout}  {name:28} {error:.1e}")
        if not error < TOLERANCE:
            problems.append(f"{name}: logits differ by {error:.1e} of the largest")
        if ours["answers"] != theirs["answers"]:
            problems.append(f"{name}: {ours['answers']} is not {theirs['answers']}")
        if len({tuple(row) for row in theirs["answers"]}) == 1:
            problems.append(f"{name}: all answers are alike, which proves nothing")
    assert not problems, problems


@pytest.mark.parametrize(
    ("name", "change"), [("llama3", {"rope_scaling_type": None}), ("llama", {"norm_epsilon": 1e-4})]
)
def test_a_wrong_detail_shows(name, change, imported, folder, tmp_path):
    """The comparison detects each change of the configuration, which is the only difference."""
    model, good = imported(name)
    bad = tmp_path / "bad"
    shutil.copytree(good, bad)
    sections = yaml.safe_load((bad / "model.yaml").read_text())
    sections["language"] |= change
    (bad / "model.yaml").write_text(yaml.safe_dump(sections))
    ours, theirs = run({name: bad}, "TP 1", tmp_path)[name]["logits"], wanted(model, name)["logits"]
    assert (ours - theirs).abs().max() / theirs.abs().max() > 100 * TOLERANCE


def rows_of(request: Request) -> list[Any]:
    return verify_import.compare(request, import_model(request))


def test_more_ranks_than_groups_are_refused(imported):
    """Without Transformer Engine, two key/value heads cannot be divided among four tensor-parallel ranks."""
    from megatron_evomoe.model.transformer_config import language_transformer_config

    _, path = imported("llama3")
    config = from_mapping(
        {
            **yaml.safe_load((path / "model.yaml").read_text()),
            "data": {"seq_length": 64},
            "train": {"transformer_impl": "local"},
            "parallel": {"tensor_model_parallel_size": 4},
        }
    )
    with pytest.raises(
        ConfigError, match="num_query_groups 2 is not a multiple of tensor_model_parallel_size 4"
    ):
        language_transformer_config(config)


@pytest.mark.parametrize("expert_init", ["none", "replicate"])
def test_verify_agrees(one_rank, imported, folder, tmp_path, expert_init):
    imported("llava")
    rows = rows_of(
        Request(model=str(folder / "hf" / "llava"), output=str(tmp_path / "out"), expert_init=expert_init)
    )
    assert [row.what.split(":")[0] for row in rows] == [
        "tensors",
        "logits, one image",
        "logits, positions up to 127",
    ]
    assert all(row.good for row in rows)


def test_verify_of_parts(one_rank, imported, folder, tmp_path):
    imported("qwen3")
    hf_models.save(hf_models.tower("siglip"), tmp_path / "tower")
    rows = rows_of(
        Request(
            language_model=str(folder / "hf" / "qwen3"),
            vision_model=str(tmp_path / "tower"),
            output=str(tmp_path / "out"),
        )
    )
    assert [row.what.split(":")[0] for row in rows] == [
        "tensors",
        "logits, text",
        "logits, positions up to 127",
        "tower's features",
    ]
    assert all(row.good for row in rows)


def test_verify_sees_a_changed_source(one_rank, imported, folder, tmp_path):
    """Verification detects that one weight of the source was changed after the import."""
    from safetensors.torch import load_file, save_file

    imported("llama")
    source = tmp_path / "hf"
    shutil.copytree(folder / "hf" / "llama", source)
    request = Request(language_model=str(source), output=str(tmp_path / "out"))
    done = import_model(request)
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"][3, 5] += 1.0
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    tensors, logits, _ = verify_import.compare(request, done)
    assert not tensors.good and tensors.found.endswith("model.layers.1.self_attn.k_proj.weight")
    assert not logits.good


# RoPE scalings of models extended from 1024 and 8192 positions; all other fields are the same
STRETCHED = {
    "linear": ({"rope_type": "linear", "factor": 3.0}, 3072),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        65536,
    ),
}


def stretched(kind: str, folder: Path) -> str:
    rope, length = STRETCHED[kind]
    config = transformers.LlamaConfig(
        **{**hf_models.TEXT, "max_position_embeddings": length, "rope_scaling": rope}
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return str(hf_models.save(hf_models.randomised(model), folder / kind))


@pytest.mark.parametrize("kind", STRETCHED)
def test_verify_looks_where_rope_is_stretched(one_rank, tmp_path, kind):
    request = Request(language_model=stretched(kind, tmp_path), output=str(tmp_path / "out"))
    rows = rows_of(request)
    print(verification.table(rows))
    assert rows[-1].what.startswith(f"logits, positions up to {STRETCHED[kind][1] - 1}") and all(
        row.good for row in rows
    )


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("linear", {"rope_scaling_factor": 3.05}),
        ("llama3", {"rope_scaling_factor": 8.5}),
        ("llama3", {"rope_scaling_type": None}),
        ("linear", {"rotary_base": 10100}),
    ],
)
def test_verify_sees_another_stretch(one_rank, tmp_path, kind, change):
    """A small change of the RoPE scaling is detected only at long positions."""
    request = Request(language_model=stretched(kind, tmp_path), output=str(tmp_path / "out"))
    done = import_model(request)
    done.config = replace(done.config, language=replace(done.config.language, **change))
    tensors, short, far = verify_import.compare(request, done)
    print(verification.table([tensors, short, far]))
    assert tensors.good and not far.good
    assert short.good == (change == {"rope_scaling_factor": 8.5})


def test_verify_of_a_grown_embedding(one_rank, tmp_path):
    """Old embedding rows are compared with the source's model, new rows with their initialisation rule."""
    from megatron_evomoe.data.tokenizer import train_sentencepiece
    from tests.unit.data import helpers

    source = hf_models.save(hf_models.llava("llava"), tmp_path / "hf")
    train_sentencepiece(helpers.LINES * 5, source / "tokenizer.model", 400)
    rows = rows_of(Request(model=str(source), output=str(tmp_path / "out"), resize_embeddings=True))
    assert len(rows) == 3 and all(row.good for row in rows)


@pytest.mark.parametrize("layout", ["TP 1", "TP 2"])
def test_imported_models_agree(layout, imported, folder):
    agree(QUICK, layout, imported, folder)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_imported_model_agrees(layout, imported, folder):
    splits = tuple(name for name in NAMES if layout != "PP 2" or name != "llama-one-layer")
    agree(splits, layout, imported, folder)
