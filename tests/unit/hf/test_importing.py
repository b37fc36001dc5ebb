"""Imports of directories into checkpoints.

Every layout gives the same tensors; mixtures are made; bad input leaves nothing behind.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from megatron_evomoe.checkpoint.record import CheckpointError
from megatron_evomoe.checkpoint.stream import CheckpointReader
from megatron_evomoe.commands.convert_from_hf import describe
from megatron_evomoe.config import ConfigError, from_mapping, load_config
from megatron_evomoe.data.tokenizer import build_tokenizer, train_sentencepiece
from megatron_evomoe.hf.from_hf.importing import Request, import_model
from megatron_evomoe.moe.router import ROUTERS
from tests import programs
from tests.unit.data import helpers
from tests.unit.hf.sources import LLAVA, TEXT, TOWER, part, tensors, write
from tests.unit.hf.test_canonical_names import NAMINGS

ROOT = Path(__file__).resolve().parents[3]


def convert(tmp_path: Path, **arguments):
    return import_model(
        Request(
            output=str(tmp_path / "out"),
            **{k: v if isinstance(v, (bool, dict)) else str(v) for k, v in arguments.items()},
        )
    )


def contents(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(checkpoint)
    return {key: reader.read(key) for key in reader.shapes}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("reference")
    return contents(convert(folder, model=write(folder / "hf")).checkpoint)


@pytest.mark.parametrize("name", [n for n in NAMINGS if n.startswith(("transformers", "in memory"))])
def test_every_layout_gives_the_same_tensors(tmp_path, reference, name):
    imported = convert(tmp_path, model=write(tmp_path / "hf", rename=NAMINGS[name][0]))
    assert same(contents(imported.checkpoint), reference)
    assert len(imported.left_out) == 16 + 2 and imported.tensors + 18 == len(tensors())


ORIGINAL = {
    **TEXT,
    "model_type": "llava_llama",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/some-tower",
}


@pytest.mark.parametrize("holds_tower", [True, False])
def test_llavas_own_format(tmp_path, reference, holds_tower):
    """LLaVA's own format is read with and without the tower's weights in the file.

    Where the file has them, the tower's own directory gives only the sizes.
    """
    everything = tensors()
    kept = {k: v for k, v in everything.items() if holds_tower or not k.startswith("vision_tower.")}
    write(tmp_path / "hf", ORIGINAL, kept, NAMINGS["LLaVA's own"][0])
    clip = {"model_type": "clip", "vision_config": TOWER, "text_config": {}}
    weights = part("vision_tower.", everything)
    if holds_tower:
        weights = {k: torch.zeros_like(v) for k, v in weights.items()}
    weights |= {
        "text_model.encoder.layers.0.layer_norm1.weight": torch.ones(3),
        "logit_scale": torch.tensor(1.0),
    }
    write(tmp_path / "tower", clip, weights, lambda n: n.replace("vision_tower.", ""))
    imported = convert(tmp_path, model=tmp_path / "hf", vision_model=tmp_path / "tower")
    assert same(contents(imported.checkpoint), reference)


def test_llavas_own_format_asks_for_the_tower(tmp_path):
    write(
        tmp_path / "hf",
        ORIGINAL,
        {k: v for k, v in tensors().items() if "vision" not in k},
        NAMINGS["LLaVA's own"][0],
    )
    with pytest.raises(
        ConfigError, match=r"sizes of its vision tower, 'openai/some-tower'; give.*--vision-model"
    ):
        convert(tmp_path, model=tmp_path / "hf")


def test_parts_with_a_fresh_projector(tmp_path, reference):
    everything = tensors()
    write(tmp_path / "lm", TEXT, part("language_model.", everything), NAMINGS["language model alone"][0])
    write(tmp_path / "tower", TOWER, part("vision_tower.", everything), NAMINGS["tower alone, 5.x"][0])
    imported = convert(tmp_path, language_model=tmp_path / "lm", vision_model=tmp_path / "tower")
    assert (
        imported.parts
        == CheckpointReader(imported.checkpoint).record.parts
        == ["vision_model", "language_model"]
    )
    assert same(
        contents(imported.checkpoint),
        {k: v for k, v in reference.items() if not k.startswith("vision_projection.")},
    )
    assert "projector will start from new weights" in describe(imported)


def test_a_tied_output_layer_in_the_file(tmp_path):
    config = {**LLAVA, "text_config": {**TEXT, "tie_word_embeddings": True}}
    weights = tensors(config)
    embedding = weights["language_model.model.embed_tokens.weight"]
    write(tmp_path / "hf", config, {**weights, "language_model.lm_head.weight": embedding.clone()})
    imported = convert(tmp_path, model=tmp_path / "hf")
    assert "language_model.output_layer.weight" not in contents(imported.checkpoint)
    write(tmp_path / "bad", config, {**weights, "language_model.lm_head.weight": embedding + 1})
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings is true, but .*lm_head"):
        import_model(Request(output=str(tmp_path / "out2"), model=str(tmp_path / "bad")))


def test_dtypes(tmp_path, reference):
    half = {k: v.half() for k, v in tensors().items()}
    kept = contents(convert(tmp_path, model=write(tmp_path / "hf", content=half)).checkpoint)
    assert same(kept, {k: v.half() for k, v in reference.items()})
    cast = import_model(Request(output=str(tmp_path / "cast"), model=str(tmp_path / "hf"), dtype="bf16"))
    assert same(contents(cast.checkpoint), {k: v.half().bfloat16() for k, v in reference.items()})


GATE, UP = (f"language_model.model.layers.1.mlp.{x}_proj.weight" for x in ("gate", "up"))
Q, K = (f"language_model.model.layers.0.self_attn.{x}_proj.weight" for x in "qk")


def test_parts_of_one_tensor_may_differ_in_type(tmp_path, reference):
    """The written type holds every part exactly.

    It is the wider type of the parts, or float32 where neither holds the other.
    """
    content = tensors()
    content |= {GATE: content[GATE].half(), UP: content[UP].bfloat16(), Q: content[Q].bfloat16()}
    found = contents(convert(tmp_path, model=write(tmp_path / "hf", content=content)).checkpoint)
    fc1 = found["language_model.decoder.layers.1.mlp.linear_fc1.weight"]
    assert torch.equal(fc1, torch.cat([content[GATE].float(), content[UP].float()]))
    qkv = "language_model.decoder.layers.0.self_attention.linear_qkv.weight"
    assert found[qkv].dtype == torch.float32 and torch.equal(found[qkv].bfloat16(), reference[qkv].bfloat16())


@pytest.mark.parametrize("expert_init", ["replicate", "noise"])
def test_experts_of_parts_of_different_types(tmp_path, expert_init):
    content = tensors()
    content[GATE] = content[GATE].half()
    imported = convert(
        tmp_path, model=write(tmp_path / "hf", content=content), expert_init=expert_init, flags=FLAGS
    )
    fc1 = contents(imported.checkpoint)[
        "language_model.decoder.layers.1.mlp.experts.experts.linear_fc1.weight"
    ]
    assert fc1.dtype == torch.float32
    assert torch.allclose(fc1[2], torch.cat([content[GATE].float(), content[UP]]), atol=0.2)


@pytest.mark.parametrize(
    ("name", "value", "dtype", "message"),
    [
        (
            GATE,
            float("nan"),
            "keep",
            r"layers\.1\.mlp\.gate_proj\.weight in .*model\.safetensors: 1 of 1536 values are not finite",
        ),
        (K, float("-inf"), "fp32", r"k_proj\.weight in .*: 1 of 512 values are not finite.*in the source"),
        (
            UP,
            7e4,
            "fp16",
            r"up_proj\.weight in .*: 1 of (1536|3072) values exceed .*65504.*--dtype fp32 or bf16",
        ),
        (
            UP,
            7e4,
            "float16",
            r"up_proj\.weight in .*: 1 of (1536|3072) values exceed the largest float16",
        ),
    ],
)
def test_values_that_are_not_finite_are_named(tmp_path, name, value, dtype, message):
    content = tensors()
    content[name][3, 4] = value
    write(tmp_path / "hf", content=content)
    for expert_init in ("none", "replicate", "noise"):
        with pytest.raises(CheckpointError, match=message):
            convert(tmp_path, model=tmp_path / "hf", dtype=dtype, expert_init=expert_init, flags=FLAGS)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_what_is_left_out_may_be_anything(tmp_path, reference):
    content = tensors()
    content["vision_tower.vision_model.post_layernorm.weight"][0] = float("nan")
    assert same(
        contents(convert(tmp_path, model=write(tmp_path / "hf", content=content)).checkpoint), reference
    )


def test_what_is_emitted_configures_a_run(tmp_path):
    imported = convert(tmp_path, model=write(tmp_path / "hf"))
    run = load_config(
        None, {"preset": str(imported.output / "model.yaml"), "seq_length": 64, "vision_feature_layer": -2}
    )
    assert (run.language, run.vision) == (imported.config.language, imported.config.vision)
    assert run.preset is None, "the file may be gone when the run's configuration is read again"
    assert load_config(imported.checkpoint / "run_config.yaml").language == run.language
    assert run.language.vocab_size == CheckpointReader(imported.checkpoint).record.vocab_size == 61
    with pytest.raises(ConfigError, match="section in the preset file"):
        load_config(None, {"preset": str(imported.checkpoint / "run_config.yaml")})


def test_the_tokenizer_comes_along(tmp_path):
    pytest.importorskip("transformers")
    config = {**LLAVA, "text_config": {**TEXT, "vocab_size": 512}}
    helpers.save_hf_tokenizer(write(tmp_path / "hf", config), "gpt")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    imported = convert(tmp_path, model=tmp_path / "hf")
    names = {p.name for p in Path(imported.tokenizer).iterdir()}
    assert names == {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    assert imported.tokenizer in describe(imported) and "401 tokens" in describe(imported)
    assert load_config(imported.checkpoint / "run_config.yaml").data.tokenizer == str(
        tmp_path / "out" / "tokenizer"
    )
    assert build_tokenizer(imported.tokenizer).fingerprint() == build_tokenizer(tmp_path / "hf").fingerprint()


def test_no_tokenizer_is_said(tmp_path):
    imported = convert(tmp_path, model=write(tmp_path / "hf"))
    assert imported.tokenizer is None and not (tmp_path / "out" / "tokenizer").exists()
    assert "no tokenizer: " in describe(imported) and "give the run one with --tokenizer" in describe(
        imported
    )


EMBEDDING, OUTPUT = "language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"


@pytest.mark.parametrize("kind", ["untied", "tied", "phi"])
def test_a_tokenizer_larger_than_the_embedding(tmp_path, kind):
    """A tokenizer larger than the embedding needs --resize-embeddings, as the error says.

    Every new row is then the mean of the old rows, in the output layer and its bias too.
    """
    change = {
        "untied": {},
        "tied": {"tie_word_embeddings": True},
        "phi": {"model_type": "phi", "num_key_value_heads": 4},
    }[kind]
    content = part("language_model.", tensors({**LLAVA, "text_config": {**TEXT, **change}}))
    write(tmp_path / "hf", {**TEXT, **change}, content)
    model = train_sentencepiece(helpers.LINES * 5, tmp_path / "hf" / "tokenizer.model", 400)
    size = build_tokenizer(model).vocab_size
    with pytest.raises(
        ConfigError,
        match=rf"has {size} tokens but the embedding has 61 rows.*--resize-embeddings, which adds",
    ):
        convert(tmp_path, language_model=tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    imported = convert(tmp_path, language_model=tmp_path / "hf", resize_embeddings=True)
    found = contents(imported.checkpoint)
    assert (
        imported.config.language.vocab_size == CheckpointReader(imported.checkpoint).record.vocab_size == size
    )
    names = {
        EMBEDDING: "model.embed_tokens.weight",
        OUTPUT: "lm_head.weight",
        OUTPUT.replace("weight", "bias"): "lm_head.bias",
    }
    names = {
        key: content[f"language_model.{name}"]
        for key, name in names.items()
        if f"language_model.{name}" in content
    }
    assert len(names) == {"untied": 2, "tied": 1, "phi": 3}[kind]
    for key, old in names.items():
        assert torch.equal(found[key][:61], old)
        assert torch.allclose(found[key][61:size], old.mean(0).expand(size - 61, *old.shape[1:]), atol=1e-6)
        assert not found[key][size:].any()
    assert f"{size - 61} rows added to 61, each the mean of those" in describe(imported)
    again = import_model(
        Request(output=str(tmp_path / "again"), language_model=str(tmp_path / "hf"), resize_embeddings=True)
    )
    assert same(contents(again.checkpoint), found), "nothing is drawn"
    run = load_config(
        None,
        {"preset": str(imported.output / "model.yaml"), "seq_length": 64, "tokenizer": imported.tokenizer},
    )
    assert run.language.vocab_size == size


def test_a_larger_embedding_stays(tmp_path):
    write(tmp_path / "hf", {**LLAVA, "text_config": {**TEXT, "vocab_size": 4000}})
    train_sentencepiece(helpers.LINES * 5, tmp_path / "hf" / "tokenizer.model", 400)
    assert convert(tmp_path, model=tmp_path / "hf", resize_embeddings=True).config.language.vocab_size == 4000


def test_one_layer_is_a_model(tmp_path):
    """A one-layer model has no mixture by default, so its model.yaml sets moe_layer_freq to 1."""
    config = {**LLAVA, "text_config": {**TEXT, "num_hidden_layers": 1}}
    content = {k: v for k, v in tensors().items() if "model.layers.1." not in k or k.startswith("vision")}
    imported = convert(tmp_path, model=write(tmp_path / "hf", config, content))
    run = load_config(None, {"preset": str(imported.output / "model.yaml"), "seq_length": 64})
    assert run.language.num_layers == run.moe.moe_layer_freq == 1
    assert "moe" not in yaml.safe_load(
        (convert(tmp_path / "2", model=write(tmp_path / "hf2")).output / "model.yaml").read_text()
    )


@pytest.mark.parametrize(
    "own",
    [
        3,
        [],
        {"kind": "route"},
        {"kind": ["route"], "language": {}, "vision": {}, "moe": {}},
        {"kind": "route", "language": {"vocab_size": "x"}, "vision": {}, "moe": {}},
        {"kind": "dense", "language": {"vocab_size": 61}, "vision": {}, "moe": {}, "stage": {"name": 3}},
        {"kind": "dense", "language": {"vocab_size": 61}, "vision": {}, "moe": {}, "stage": "dense"},
        {
            "kind": "dense",
            "language": {"vocab_size": 61},
            "vision": {},
            "moe": {},
            "stage": {"name": "x", "kind": "dense", "step": 3, "lineage": 4},
        },
    ],
)
def test_an_export_of_ours_that_is_damaged_is_named(tmp_path, own):
    write(tmp_path / "hf", {**LLAVA, "evomoe_config": own})
    with pytest.raises(ConfigError, match=r"evomoe_config|stage"):
        convert(tmp_path, model=tmp_path / "hf")


@pytest.mark.parametrize("wanted", [3, ["x"], "x", {"AutoModel": ["x", None]}, {"AutoModel": {}}])
def test_code_asked_for_in_any_words_is_refused(tmp_path, wanted):
    write(tmp_path / "hf", {**LLAVA, "auto_map": wanted})
    with pytest.raises(ConfigError, match="asks to run its own code"):
        convert(tmp_path, model=tmp_path / "hf")


FLAGS = {"num_experts": 3, "moe_layer_freq": [0, 1], "dtr_hidden_size": 4, "dtr_rank": 2}


@pytest.mark.parametrize("router", ROUTERS)
def test_a_mixture_of_copies(tmp_path, reference, router):
    imported = convert(
        tmp_path, model=write(tmp_path / "hf"), expert_init="replicate", flags={**FLAGS, "router": router}
    )
    found = contents(imported.checkpoint)
    for name in ("linear_fc1", "linear_fc2"):
        dense = reference[f"language_model.decoder.layers.1.mlp.{name}.weight"]
        experts = found[f"language_model.decoder.layers.1.mlp.experts.experts.{name}.weight"]
        assert experts.shape[0] == 3 and all(torch.equal(e, dense) for e in experts)
    assert any(".mlp.router." in key for key in found)
    others = {k: v for k, v in found.items() if ".mlp.router." not in k and ".mlp.experts." not in k}
    assert same(
        others,
        {k: v for k, v in reference.items() if "layers.1.mlp.linear_fc" not in k or k.startswith("vision")},
    )


def stage(imported, kind: str, **moe):
    """The state of a stage that starts from an import."""
    from megatron_evomoe.checkpoint import find
    from megatron_evomoe.parallel import topology
    from megatron_evomoe.train.built import build_stage
    from megatron_evomoe.train.transition import start_from

    config = from_mapping(
        {
            **yaml.safe_load((imported.output / "model.yaml").read_text()),
            "data": {"seq_length": 64},
            "moe": {**FLAGS, **moe},
            "stages": [{"name": kind}],
        }
    )
    topology.seed_everything(5)
    built = build_stage(config.for_stage(kind), config.stages[0])
    start_from(find.resolve(imported.output), built, config, config.stages[0], fingerprint="any")
    return {k: v.clone() for k, v in built.modules[0].state_dict().items() if torch.is_tensor(v)}


def test_noise_is_that_of_a_stage_which_adds_it(one_rank, tmp_path):
    """Noise added by the import and noise added by the stage give the same bits."""
    write(tmp_path / "hf")
    dense = import_model(Request(output=str(tmp_path / "dense"), model=str(tmp_path / "hf"), flags=FLAGS))
    noisy = import_model(
        Request(output=str(tmp_path / "noisy"), model=str(tmp_path / "hf"), expert_init="noise", flags=FLAGS)
    )
    experts = {k: v for k, v in stage(dense, "route", expert_init="noise").items() if ".experts." in k}
    imported = stage(noisy, "route", expert_init="noise")
    assert experts and all(torch.equal(imported[k], v) for k, v in experts.items())
    first, second = (
        imported[f"language_model.decoder.layers.1.mlp.experts.local_experts.{i}.linear_fc1.weight"]
        for i in (0, 1)
    )
    assert not torch.equal(first, second)


@pytest.mark.parametrize("pattern", [[0, 0], [1, 0], [1, 1]])
def test_other_layers_may_become_mixtures_later(one_rank, tmp_path, pattern):
    """The norm before an FFN is found whichever layers the import designated as mixtures."""
    imported = convert(tmp_path, model=write(tmp_path / "hf"), flags={"moe_layer_freq": [0, 1]})
    state = stage(imported, "warmup", moe_layer_freq=pattern)
    for i in range(2):
        assert torch.equal(
            state[f"language_model.decoder.layers.{i}.pre_mlp_layernorm.weight"],
            tensors()[f"language_model.model.layers.{i}.post_attention_layernorm.weight"],
        )


BAD = {
    "a tensor is missing": (
        {},
        lambda t: t.pop("language_model.model.norm.weight"),
        CheckpointError,
        r"norm\.weight is missing",
    ),
    "a stranger": (
        {},
        lambda t: t.update({"model.image_newline": torch.ones(3)}),
        CheckpointError,
        r"image_newline is there and this model has no such tensor",
    ),
    "a shape": (
        {"text_config": {**TEXT, "vocab_size": 60}},
        None,
        CheckpointError,
        r"embed_tokens\.weight has shape \(61, 32\), the configuration says \(60, 32\)",
    ),
    "a bias the configuration denies": (
        {},
        lambda t: t.update({"language_model.model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
        CheckpointError,
        r"q_proj\.bias is there",
    ),
    "integers": (
        {},
        lambda t: t.update({"language_model.model.norm.weight": torch.ones(32).int()}),
        CheckpointError,
        r"norm\.weight has dtype torch\.int32.*unquantised",
    ),
    "no LLaVA": (
        {"model_type": "llama"},
        None,
        ConfigError,
        "'llama', which is not a LLaVA model.*--language-model",
    ),
    "remote code": (
        {"auto_map": {"AutoModel": "modeling_x.X"}},
        None,
        ConfigError,
        r"asks to run its own code \(modeling_x\.X\).*--allow-remote-code",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_leaves_nothing(tmp_path, name):
    change, spoil, error, message = BAD[name]
    content = tensors()
    if spoil:
        spoil(content)
    write(tmp_path / "hf", {**LLAVA, **change}, content)
    with pytest.raises(error, match=message):
        convert(tmp_path, model=tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_code_is_never_run(tmp_path, monkeypatch):
    """Code in the directory is never run, with or without `allow_remote_code`.

    With the flag, the directory is read as what its model_type says.
    """
    write(tmp_path / "hf", {**LLAVA, "auto_map": {"AutoModel": "modeling_x.X"}})
    (tmp_path / "hf" / "modeling_x.py").write_text(f"open({str(tmp_path / 'boom')!r}, 'w')\n")
    convert(tmp_path, model=tmp_path / "hf", allow_remote_code=True)
    assert not (tmp_path / "boom").exists()


def test_an_output_that_is_not_empty_is_left_alone(tmp_path):
    write(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty; choose another --output"):
        convert(tmp_path, model=tmp_path / "hf")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    (tmp_path / "out" / "thesis.txt").unlink()
    assert convert(tmp_path, model=tmp_path / "hf").checkpoint.is_dir()


def test_an_error_while_writing_leaves_nothing(tmp_path, monkeypatch):
    from megatron_evomoe.checkpoint import stream

    write(tmp_path / "hf")
    written = []

    def full_disk(tensor):
        written.append(tensor)
        if len(written) > 20:
            raise OSError(28, "No space left on device")
        return tensor.contiguous()

    monkeypatch.setattr(stream, "alone", full_disk)
    with pytest.raises(OSError, match="No space left"):
        convert(tmp_path, model=tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    write(tmp_path / "hf")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(
        CheckpointError, match=r"needs up to .* GiB and 0\.00 GiB are free; nothing was written"
    ):
        convert(tmp_path, model=tmp_path / "hf")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to import"),
        ({"model": "a", "language_model": "b"}, "both given"),
        ({"model": "nowhere"}, "is not a directory"),
        ({"dtype": "int8", "model": "hf"}, "dtype 'int8' is unknown"),
        ({"language_model": "hf"}, "'llava' cannot be imported as a language model"),
    ],
)
def test_contradictions_are_named(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "hf")
    with pytest.raises(ConfigError, match=message):
        import_model(Request(output="out", **arguments))


def test_no_network(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError, match="someone/model is not a directory here, and downloading it from the hub failed"
    ):
        convert(tmp_path, model="someone/model")


def tool(*arguments: str) -> subprocess.CompletedProcess:
    return programs.run(str(ROOT / "tools" / "convert_from_hf.py"), *arguments, expect=None)


def test_the_command(tmp_path):
    write(tmp_path / "hf")
    done = tool(
        str(tmp_path / "hf"),
        "--output",
        str(tmp_path / "out"),
        "--expert-init",
        "replicate",
        "--num-experts",
        "2",
        "--moe-layer-freq",
        "[1, 0]",
        "--router",
        "linear",
    )
    assert done.returncode == 0, done.stderr
    assert "2 experts in 1 layers, linear router" in done.stdout and "--preset" in done.stdout
    assert json.loads((tmp_path / "out" / "iter_0000000" / "evomoe.json").read_text())["num_experts"] == 2
    again = tool(str(tmp_path / "hf"), "--output", str(tmp_path / "out"))
    assert again.returncode == 2 and again.stderr.startswith("error: ") and "Traceback" not in again.stderr
