"""An imported model is trained by the very command that the import prints, under a layout of its own."""

from __future__ import annotations

import json

import yaml

from megatron_evomoe.checkpoint.find import latest
from megatron_evomoe.checkpoint.record import read
from megatron_evomoe.commands.convert_from_hf import describe
from megatron_evomoe.data.tokenizer import build_tokenizer
from megatron_evomoe.hf.from_hf.importing import Request, import_model
from tests.runs import metrics, run
from tests.unit.hf.sources import LLAVA, TEXT, TOWER, write

STAGES = [
    {"name": "warmup", "train_iters": 2},
    {"name": "route", "train_iters": 1, "expert_init": "replicate"},
]


def test_train_from_an_import(tmp_path, digits, tiny_yaml):
    tokenizer = digits / "tokenizer.model"
    config = {
        **LLAVA,
        "text_config": {
            **TEXT,
            "vocab_size": build_tokenizer(tokenizer).vocab_size,
            "max_position_embeddings": 128,
        },
        "vision_config": {**TOWER, "image_size": 32},
    }
    imported = import_model(
        Request(model=str(write(tmp_path / "hf", config)), output=str(tmp_path / "imported"))
    )
    printed = describe(imported).splitlines()[-1].split()
    arguments = printed[printed.index("--preset") :]
    run_yaml = tiny_yaml(
        tmp_path, language=None, vision=None, parallel={"tensor_model_parallel_size": 2}, stages=STAGES
    )
    run("train", "--config", str(run_yaml), *arguments, processes=2)
    route = latest(tmp_path / "run" / "route")
    assert [step["kind"] for step in read(route).lineage] == ["pretrained", "warmup"]
    used = yaml.safe_load((route / "run_config.yaml").read_text())
    assert (
        used["language"]["vocab_size"] == config["text_config"]["vocab_size"]
        and used["vision"]["image_size"] == 32
    )
    assert all(step["lm loss"] > 0 for step in metrics(tmp_path / "run"))
    begun = [
        e
        for e in map(json.loads, (tmp_path / "run" / "events.jsonl").read_text().splitlines())
        if e["event"] == "begin"
    ]
    assert begun[0]["source"] == str(imported.checkpoint)
