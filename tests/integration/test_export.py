"""Export of a trained run: Megatron and transformers give the same answers to held-out questions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from megatron_evomoe.data.batch import prepare_eval
from megatron_evomoe.data.conversation import IMAGE_TOKEN, stop_ids
from megatron_evomoe.data.image import decode_image, processor_for
from megatron_evomoe.data.shards import ShardDataset
from megatron_evomoe.data.tokenizer import build_tokenizer
from megatron_evomoe.hf import register, verification
from megatron_evomoe.hf.to_hf import verify_export
from megatron_evomoe.hf.to_hf.exporting import Exported, Request, export_model
from megatron_evomoe.train.decoding import greedy
from tests.programs import ROOT, environment
from tests.runs import run

pytest.importorskip(
    "transformers", minversion="4.56", reason="transformers 4.56 or later is not installed (extra [hf])"
)
pytestmark = pytest.mark.slow
NEW_TOKENS = 8
MOST = 200


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_yaml):
    """A run of all four stages, long enough for its answers to depend on the question."""
    folder = tmp_path_factory.mktemp("trained")
    path = tiny_yaml(
        folder,
        train={"micro_batch_size": 8, "global_batch_size": 8, "seed": 1, "train_iters": 40},
        checkpoint={"save": str(folder / "run"), "save_interval": 0},
    )
    run("train", "--config", str(path))
    return folder / "run"


def held_out(config):
    """Yield held-out questions: turns before the answer, pictures, and training's prompt and pixels."""
    tokenizer, processor = build_tokenizer(config.data.tokenizer), processor_for(config)
    data = ShardDataset(config.data.eval_data[0])
    try:
        for i in range(min(len(data), MOST)):
            raw = data.read(i)
            samples = prepare_eval(
                raw, tokenizer, processor, config.data.conversation_template, config.vision.tokens_per_image
            )
            yield raw.record["conversations"][:-1], [decode_image(image) for image in raw.images], samples[0]
    finally:
        data.close()


def megatrons_answers(exported: Exported) -> list[str]:
    config = exported.config
    tokenizer = build_tokenizer(config.data.tokenizer)
    samples = [sample for *_, sample in held_out(config)]
    with verify_export.core_model(exported) as model, torch.no_grad():
        ids = greedy(
            [model],
            [s.prompt for s in samples],
            torch.cat([s.images for s in samples]),
            pad_id=tokenizer.pad_id,
            stop=stop_ids(tokenizer, config.data.conversation_template),
            max_new_tokens=NEW_TOKENS,
        )
    return [tokenizer.decode(answer).strip() for answer in ids]


def message(turn: dict[str, str]) -> dict[str, Any]:
    parts = [
        {"type": "image"} if part == IMAGE_TOKEN else {"type": "text", "text": part}
        for part in re.split(f"({IMAGE_TOKEN})", turn["value"])
        if part
    ]
    return {"role": {"human": "user"}.get(turn["from"], turn["from"]), "content": parts}


def transformers_answers(exported: Exported) -> list[str]:
    """Answer with transformers: AutoProcessor, a left-padded batch, and `generate` with a cache."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    register()
    processor = AutoProcessor.from_pretrained(exported.output)
    model = AutoModelForImageTextToText.from_pretrained(exported.output).eval()
    texts, pictures = [], []
    for turns, images, _ in held_out(exported.config):
        texts.append(
            processor.apply_chat_template(
                [message(turn) for turn in turns], add_generation_prompt=True, tokenize=False
            )
        )
        pictures += [np.asarray(image) for image in images]
    batch = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**batch, max_new_tokens=NEW_TOKENS)
    new = tokens[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


@pytest.mark.parametrize("stage", ["warmup", "route"])
def test_held_out_answers_are_the_same(trained, stage, tmp_path):
    exported = export_model(Request(checkpoint=str(trained / stage), output=str(tmp_path / "out")))
    ours, theirs = megatrons_answers(exported), transformers_answers(exported)
    wanted = [sample.answer.strip() for *_, sample in held_out(exported.config)]
    same = np.mean([a == b for a, b in zip(ours, theirs, strict=True)])
    exact = [np.mean([a == b for a, b in zip(answers, wanted, strict=True)]) for answers in (ours, theirs)]
    assert same == 1.0 and exact[0] == exact[1], (same, exact)


def test_the_command_after_training(trained, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tools" / "convert_to_hf.py"),
            str(trained / "route"),
            "--output",
            str(tmp_path / "out"),
            "--verify",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, **environment()},
    )
    assert done.returncode == 0 and "FAILED" not in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2},
        {"expert_model_parallel_size": 2},
    ],
    ids=["TP 2", "PP 2", "EP 2"],
)
def test_every_layout_exports(tiny_yaml, parallel, tmp_path):
    """Two processes train; the export of their checkpoint is compared with the checkpoint loaded on one."""
    path = tiny_yaml(
        tmp_path, parallel=parallel, checkpoint={"save": str(tmp_path / "run"), "save_interval": 0}
    )
    run("train", "--config", str(path), "--train-iters", "2", "--eval-samples", "2", processes=2)
    for stage in ("warmup", "route"):
        exported = export_model(
            Request(checkpoint=str(tmp_path / "run" / stage), output=str(tmp_path / stage))
        )
        rows = verify_export.compare(exported)
        assert all(row.good for row in rows), verification.table(rows)
