"""Checkpoints load as saved, damage is named, and the last good checkpoint always remains."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import shutil
import unittest.mock
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_evomoe.checkpoint import find
from megatron_evomoe.checkpoint import record as records
from megatron_evomoe.checkpoint.record import CheckpointError, Record
from megatron_evomoe.config import CheckpointConfig
from megatron_evomoe.parallel import topology
from tests.tiny import rows, step_of, tiny_config

pytestmark = pytest.mark.usefixtures("one_rank")


def built_for(kind: str, *, trained: int = 0, **sections):
    """Build a stage with fresh weights and train it for `trained` steps."""
    from megatron_evomoe.train.built import build_stage

    config = tiny_config(kind, **sections)
    topology.seed_everything(config.train.seed)
    built = build_stage(config.for_stage(kind), config.stages[0])
    for mlp in built.evolving:
        mlp.begin()
    train(built, 1, trained)
    return config, built


def record_for(kind: str, step: int) -> Record:
    from megatron_evomoe.parallel import rng

    return Record(
        stage=kind,
        kind=kind,
        step=step,
        position=4 * step,
        finished=False,
        layout=rng.layout(),
        vocab_size=64,
        tokenizer_fingerprint="abc",
        num_experts=4 if kind in ("evolve", "route") else 0,
    )


def save(
    directory: Path,
    built,
    kind: str,
    step: int,
    *,
    record: Record | None = None,
    config_yaml: str = "{}\n",
    **config,
) -> Path:
    from megatron_evomoe.checkpoint import store

    return store.Saver(CheckpointConfig(**{"keep": 0, **config})).save(
        directory,
        modules=built.modules,
        optimizer=built.optimizer,
        scheduler=built.scheduler,
        record=record or record_for(kind, step),
        config_yaml=config_yaml,
    )


def load_state(path: Path, built, record: Record | None = None) -> None:
    """Load the checkpoint `path` into what was built; `record` is read from the folder unless it is given."""
    from megatron_evomoe.checkpoint import store

    store.load_training_state(
        path,
        modules=built.modules,
        optimizer=built.optimizer,
        scheduler=built.scheduler,
        record=record or records.read(path),
    )


def train(built, first: int, last: int) -> list[tuple[float, float]]:
    from megatron_evomoe.train.step import take_step

    out = []
    for step in range(first, last + 1):
        result = take_step(built, step_of(rows([1, 0], seed=step), rows([0, 2], seed=100 + step)), step)
        for mlp in built.evolving:
            mlp.evolve(step, 1234)
        out.append((result.loss, result.grad_norm))
    return out


@pytest.mark.parametrize("kind", ["warmup", "evolve", "route"])
def test_resumed_steps_have_the_same_bits(tmp_path, kind):
    """Several steps are compared after a resume.

    One step is not enough: with a wrong optimizer state the first loss after a resume still looks right.
    """

    _, built = built_for(kind, trained=3)
    path = save(tmp_path, built, kind, 3)
    unbroken = train(built, 4, 8)
    weights = {n: t.clone() for n, t in built.modules[0].state_dict().items() if torch.is_tensor(t)}
    experts = [t.clone() for mlp in built.evolving for _, ts in mlp.local_experts() for t in ts.values()]
    _, again = built_for(kind, train={"seed": 99})
    load_state(path, again)
    assert train(again, 4, 8) == unbroken
    for name, tensor in again.modules[0].state_dict().items():
        assert not torch.is_tensor(tensor) or torch.equal(tensor, weights[name]), name
    resumed = [t for mlp in again.evolving for _, ts in mlp.local_experts() for t in ts.values()]
    assert all(torch.equal(a, b) for a, b in zip(experts, resumed, strict=True))


def test_random_generators_continue(tmp_path):
    import random

    import numpy as np

    _, built = built_for("align", trained=1)
    path = save(tmp_path, built, "align", 1)
    drawn = (random.random(), float(np.random.rand()), torch.rand(3).tolist())
    topology.seed_everything(7)
    load_state(path, built)
    assert (random.random(), float(np.random.rand()), torch.rand(3).tolist()) == drawn


@pytest.mark.parametrize("expert_init", ["replicate", "noise"])
def test_dense_checkpoint_fills_every_expert(tmp_path, expert_init):
    from megatron_evomoe.train.transition import start_from

    _, dense = built_for("warmup", trained=1)
    path = save(tmp_path, dense, "warmup", 1)
    config, routed = built_for("route", moe={"expert_init": expert_init}, train={"seed": 5})
    start_from(path, routed, config.for_stage("route"), config.stages[0], fingerprint="abc")
    wanted = dense.modules[0].language_model.decoder.layers[1].mlp.linear_fc1.weight
    experts = [e.linear_fc1.weight for e in routed.mixtures()[0].experts.local_experts]
    for weight in experts:
        # By default the noise is 0.01 of the matrix's own standard deviation.
        if expert_init == "replicate":
            assert torch.equal(weight, wanted)
        else:
            assert 0.005 < ((weight - wanted).std() / wanted.std()).item() < 0.02
    attention = "language_model.decoder.layers.0.self_attention.linear_qkv.weight"
    assert torch.equal(routed.modules[0].get_parameter(attention), dense.modules[0].get_parameter(attention))
    masters = [
        p for o in routed.optimizer.chained_optimizers for g in o.optimizer.param_groups for p in g["params"]
    ]
    assert sum(m.numel() for m in masters) == sum(
        p.numel() for p in routed.modules[0].parameters() if p.requires_grad
    )


def test_evolved_experts_arrive_under_their_index(tmp_path):
    from megatron_evomoe.train.transition import start_from

    _, evolving = built_for("evolve", trained=3)
    path = save(tmp_path, evolving, "evolve", 3)
    config, routed = built_for("route", train={"seed": 5})
    source, _ = start_from(path, routed, config.for_stage("route"), config.stages[0], fingerprint="abc")
    assert source.kind == "evolve"
    mlp, experts = evolving.evolving[0], routed.mixtures()[0].experts.local_experts
    assert torch.equal(experts[0].linear_fc1.weight, mlp.linear_fc1.weight)
    for n, tensors in mlp.local_experts():
        assert torch.equal(experts[n].linear_fc1.weight, tensors["linear_fc1.weight"])
        assert not torch.equal(experts[n].linear_fc1.weight, experts[0].linear_fc1.weight)


def test_wrong_sources_are_refused(tmp_path):
    from megatron_evomoe.train.transition import start_from

    _, dense = built_for("warmup", trained=1)
    path = save(tmp_path, dense, "warmup", 1)
    cases = [
        (
            "align",
            {},
            "abc",
            "cannot start from .* a 'warmup' checkpoint; it starts from align or pretrained",
        ),
        (
            "route",
            {},
            "abc",
            "wants evolved experts .* put an evolve stage before it, or choose replicate or noise",
        ),
        ("evolve", {}, "xyz", "trained with another tokenizer .*vocabulary 64"),
        (
            "warmup",
            {"language": {"hidden_size": 64}},
            "abc",
            "holds 'vision_projection.* with shape .* this model needs",
        ),
        (
            "warmup",
            {"language": {"num_layers": 3}},
            "abc",
            r"lacks 'language_model.decoder.layers.2.*another model",
        ),
        ("warmup", {"language": {"vocab_size": 80}}, "abc", "has a vocabulary of 64, this run one of 80"),
    ]
    for kind, sections, fingerprint, message in cases:
        config, built = built_for(kind, **sections)
        with pytest.raises(CheckpointError, match=message):
            start_from(path, built, config.for_stage(kind), config.stages[0], fingerprint=fingerprint)


def test_damaged_checkpoints_are_named_and_the_one_before_is_used(tmp_path, caplog):

    _, built = built_for("align", trained=1)
    first, second = save(tmp_path, built, "align", 1), save(tmp_path, built, "align", 2)
    assert find.latest(tmp_path) == second
    shard = next(second.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"damaged: {shard.name} has \d+ bytes, \d+ bytes were saved"):
        records.read(second)
    assert find.latest(tmp_path) == first
    assert shard.name in caplog.text and "the checkpoint before it" in caplog.text
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        find.newest_good(tmp_path, step=2)
    (second / "evomoe.json").unlink()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        records.read(second)
    with pytest.raises(CheckpointError, match="no checkpoint under"):
        find.resolve(tmp_path / "nowhere")


def test_flipped_byte_is_named_and_the_one_before_is_used(tmp_path, caplog):
    _, built = built_for("align", trained=1)
    first, second = save(tmp_path, built, "align", 1), save(tmp_path, built, "align", 2)
    assert find.newest_good(tmp_path) == second
    shard = next(second.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert find.newest_good(tmp_path) == first
    assert f"the bytes of {shard.name} are not those that were saved" in caplog.text
    assert "falling back to the checkpoint before it" in caplog.text
    with pytest.raises(CheckpointError, match="not those that were saved"):
        find.resolve(second)
    for name in ("metadata.json", "run_config.yaml", ".metadata"):
        other = bytearray((first / name).read_bytes())
        other[-1] ^= 128
        (first / name).write_bytes(other)
        assert name in find.why_bad(first)
        other[-1] ^= 128
        (first / name).write_bytes(other)
    (first / "metadata.json").unlink()
    with pytest.raises(CheckpointError, match=r"no good checkpoint under .*metadata.json is missing"):
        find.newest_good(tmp_path)


class Payload:
    """An object that creates a file when it is unpickled the ordinary way."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


def rewrite(path: Path, content: bytes) -> None:
    """Overwrite a file and its recorded checksum, as an attacker would."""
    path.write_bytes(content)
    record = records.read_unchecked(path.parent)
    record.files[path.name] = [len(content), zlib.crc32(content)]
    record.write(path.parent)


@pytest.mark.parametrize("is_checked", [True, False])
@pytest.mark.parametrize("place", [".metadata", "common.pt", "object"])
def test_no_code_is_run_from_a_checkpoint(tmp_path, monkeypatch, place, is_checked):
    """Code in a checkpoint is never run.

    This holds too on a rank that reads another file than the one that was checked.
    """
    from megatron_evomoe.checkpoint import metadata

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    _, built = built_for("align", trained=1)
    path = save(tmp_path, built, "align", 1)
    trace = tmp_path / "ran"
    # Transformer Engine's _extra_state is such an object: pickled bytes inside a tensor file, which torch
    # opens with torch.load.
    if place == "object":
        key, at = next(
            (index.fqn, info)
            for index, info in metadata.read(path).storage_data.items()
            if index.fqn.endswith("shard_0_1")
        )
        harmful = io.BytesIO()
        torch.save(Payload(trace), harmful)
        content = (path / at.relative_path).read_bytes()
        found = metadata.read(path)
        found.storage_data[MetadataIndex(key)] = dataclasses.replace(
            at, offset=len(content), length=len(harmful.getvalue())
        )
        rewrite(path / at.relative_path, content + harmful.getvalue())
        rewrite(path / ".metadata", pickle.dumps(found))
    elif place == ".metadata":
        rewrite(path / ".metadata", pickle.dumps(Payload(trace)))
    else:
        harmful = io.BytesIO()
        torch.save({"scheduler": Payload(trace)}, harmful)
        rewrite(path / "common.pt", harmful.getvalue())
    with pytest.raises(CheckpointError, match=r"nothing was loaded"):
        load_state(find.resolve(path) if is_checked else path, built, records.read(path))
    assert not trace.exists()


def test_torchs_own_openers_are_not_used(tmp_path, monkeypatch):
    """Resuming and starting from weights use neither pickle nor torch's default loader.

    An environment variable can change torch's default.
    """
    from megatron_evomoe.train.transition import start_from

    config, built = built_for("warmup", trained=1)
    path, opened, load = save(tmp_path, built, "warmup", 1), [], torch.load
    monkeypatch.setattr(
        "torch.distributed.checkpoint.filesystem.pickle.load", lambda *_: pytest.fail("unpickled")
    )
    monkeypatch.setattr(
        torch,
        "load",
        lambda *args, **kwargs: opened.append(kwargs.get("weights_only")) or load(*args, **kwargs),
    )
    start_from(find.resolve(path), built, config.for_stage("warmup"), config.stages[0], fingerprint="abc")
    load_state(find.resolve(path), built, records.read(path))
    assert set(opened) <= {True, False} and True in opened, "always said"


def test_a_record_of_another_step_is_refused(tmp_path):
    _, built = built_for("align", trained=1)
    path = save(tmp_path, built, "align", 2)
    with pytest.raises(CheckpointError, match="its record is of step 2, its schedule of 1"):
        load_state(path, built)


def test_background_save_is_published_when_written_and_holds_the_step_it_was_asked_at(tmp_path):
    from megatron_evomoe.checkpoint import store

    _, built = built_for("warmup", trained=2)
    wanted = {n: p.clone() for n, p in built.modules[0].named_parameters()}
    saver = store.Saver(CheckpointConfig(async_save=True))
    asked = {
        "modules": built.modules,
        "optimizer": built.optimizer,
        "scheduler": built.scheduler,
        "config_yaml": "{}\n",
    }
    record = record_for("warmup", 2)
    assert saver.save(tmp_path, record=record, **asked) is None
    assert find.latest(tmp_path) is None and not (tmp_path / records.TRACKER).exists()
    record.step = 3  # the loop goes on to its next step
    train(built, 3, 3)
    assert saver.poll(wait=True) == tmp_path / "iter_0000002" and saver.poll() is None
    assert (tmp_path / records.TRACKER).read_text() == "2"
    _, again = built_for("warmup", train={"seed": 99})
    path = find.resolve(tmp_path)
    load_state(path, again)
    for name, parameter in again.modules[0].named_parameters():
        assert torch.equal(parameter, wanted[name]), name
    unbroken = train(built, 4, 5)
    assert train(again, 3, 5)[1:] == unbroken


def test_failed_background_save_is_reported_at_the_next_poll(tmp_path):
    from megatron_evomoe.checkpoint import store

    _, built = built_for("align", trained=1)
    first = save(tmp_path, built, "align", 1)
    saver = store.Saver(CheckpointConfig(async_save=True))
    with (
        unittest.mock.patch(
            "torch.distributed.checkpoint.filesystem._write_item", side_effect=OSError(28, "No space left")
        ),
        unittest.mock.patch(
            "megatron.core.dist_checkpointing.strategies.filesystem_async._write_item",
            side_effect=OSError(28, "No space left"),
        ),
    ):
        saver.save(
            tmp_path,
            modules=built.modules,
            optimizer=built.optimizer,
            scheduler=built.scheduler,
            record=record_for("align", 2),
            config_yaml="{}\n",
        )
        with pytest.raises(
            CheckpointError,
            match=r"saving .*iter_0000002 failed.*Nothing was published; .*iter_0000001 stays",
        ):
            saver.poll(wait=True)
    assert find.latest(tmp_path) == first
    assert not list(tmp_path.glob("saving_*"))
    assert saver.poll() is None, "the failure is told once"


def test_killed_while_saving_leaves_the_last_good_one(tmp_path, monkeypatch):
    """The process dies at the worst moment: the tensors are written, nothing is published yet."""

    _, built = built_for("align", trained=1)
    first = save(tmp_path, built, "align", 1)

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(records.Record, "write", die)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, built, "align", 2)
    monkeypatch.undo()
    assert find.latest(tmp_path) == first
    assert (tmp_path / records.TRACKER).read_text() == "1"
    assert save(tmp_path, built, "align", 2).exists(), "the leftover of the killed save is no obstacle"


def test_no_space_is_refused_before_anything_is_written(tmp_path, monkeypatch):

    _, built = built_for("align", trained=1)
    first = save(tmp_path, built, "align", 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1, used=0, free=1000))
    with pytest.raises(
        CheckpointError,
        match=r"needs about .* and 0.0 MiB are free\. Nothing was written; .*iter_0000001 stays",
    ):
        save(tmp_path, built, "align", 2)
    assert [p.name for p in tmp_path.glob("iter_*")] == [first.name]
    assert find.latest(tmp_path) == first


def test_failed_write_is_reported_and_cleaned_up(tmp_path, monkeypatch):
    from megatron_evomoe.checkpoint import store

    _, built = built_for("align", trained=1)
    first = save(tmp_path, built, "align", 1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.SummingStrategy, "save", full)
    with pytest.raises(
        CheckpointError,
        match=r"No space left on device\. Nothing was published; .*iter_0000001 stays the newest",
    ):
        save(tmp_path, built, "align", 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [first.name, records.TRACKER]


def test_old_checkpoints_are_dropped(tmp_path):
    _, built = built_for("align", trained=1)
    for step in (1, 2, 3):
        save(tmp_path, built, "align", step, keep=2)
    assert sorted(p.name for p in tmp_path.glob("iter_*")) == ["iter_0000002", "iter_0000003"]
    assert json.loads((tmp_path / "iter_0000003" / "evomoe.json").read_text())["step"] == 3
    for step in (4, 5, 6):
        save(tmp_path, built, "align", step, keep=1, keep_every=2)
    assert sorted(p.name for p in tmp_path.glob("iter_*")) == ["iter_0000002", "iter_0000004", "iter_0000006"]
