"""Checkpoints: what is saved comes back, what is broken is named, and the last good one always stays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_evomoe.checkpoint import record as records
from megatron_evomoe.checkpoint.record import CheckpointError, Record
from megatron_evomoe.parallel import topology
from tests.tiny import rows, step_of, tiny_config

pytestmark = pytest.mark.usefixtures("one_rank")


def built_for(kind: str, *, trained: int = 0, **sections):
    """A stage with fresh weights after `trained` steps."""
    from megatron_evomoe.train.build import build_stage

    config = tiny_config(kind, **sections)
    topology.seed_everything(config.train.seed)
    built = build_stage(config.for_stage(kind), config.stages[0])
    for mlp in built.evolving:
        mlp.begin()
    train(built, 1, trained)
    return config, built


def record_for(kind: str, step: int) -> Record:
    from megatron_evomoe.parallel import rng

    return Record(stage=kind, kind=kind, step=step, position=4 * step, finished=False, layout=rng.layout(), vocab_size=64,
                  tokenizer_fingerprint="abc", num_experts=4 if kind in ("evolve", "route") else 0)


def save(directory: Path, built, kind: str, step: int, keep: int = 0) -> Path:
    from megatron_evomoe.checkpoint import store

    return store.save(directory, modules=built.modules, optimizer=built.optimizer, scheduler=built.scheduler,
                      record=record_for(kind, step), config_yaml="{}\n", keep=keep)


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
    """Several steps, not one: with a wrong optimizer state the first loss after a resume still looks right."""
    from megatron_evomoe.checkpoint import store

    _, built = built_for(kind, trained=3)
    path = save(tmp_path, built, kind, 3)
    unbroken = train(built, 4, 8)
    weights = {n: t.clone() for n, t in built.modules[0].state_dict().items() if torch.is_tensor(t)}
    experts = [t.clone() for mlp in built.evolving for _, ts in mlp.local_experts() for t in ts.values()]
    _, again = built_for(kind, train={"seed": 99})
    store.load_training_state(path, modules=again.modules, optimizer=again.optimizer, scheduler=again.scheduler,
                              record=records.read(path))
    assert train(again, 4, 8) == unbroken
    for name, tensor in again.modules[0].state_dict().items():
        assert not torch.is_tensor(tensor) or torch.equal(tensor, weights[name]), name
    resumed = [t for mlp in again.evolving for _, ts in mlp.local_experts() for t in ts.values()]
    assert all(torch.equal(a, b) for a, b in zip(experts, resumed, strict=True))


def test_random_generators_continue(tmp_path):
    import random

    import numpy as np

    from megatron_evomoe.checkpoint import store

    _, built = built_for("align", trained=1)
    path = save(tmp_path, built, "align", 1)
    drawn = (random.random(), float(np.random.rand()), torch.rand(3).tolist())
    topology.seed_everything(7)
    store.load_training_state(path, modules=built.modules, optimizer=built.optimizer, scheduler=built.scheduler,
                              record=records.read(path))
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
        if expert_init == "replicate":
            assert torch.equal(weight, wanted)
        else:  # 0.01 of the matrix's own deviation by default
            assert 0.005 < ((weight - wanted).std() / wanted.std()).item() < 0.02
    attention = "language_model.decoder.layers.0.self_attention.linear_qkv.weight"
    assert torch.equal(routed.modules[0].get_parameter(attention), dense.modules[0].get_parameter(attention))
    masters = [p for o in routed.optimizer.chained_optimizers for g in o.optimizer.param_groups for p in g["params"]]
    assert sum(m.numel() for m in masters) == sum(p.numel() for p in routed.modules[0].parameters() if p.requires_grad)


def test_evolved_experts_arrive_under_their_index(tmp_path):
    from megatron_evomoe.train.transition import start_from

    _, evolving = built_for("evolve", trained=3)
    path = save(tmp_path, evolving, "evolve", 3)
    config, routed = built_for("route", train={"seed": 5})
    source = start_from(path, routed, config.for_stage("route"), config.stages[0], fingerprint="abc")
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
        ("align", {}, "abc", "cannot start from .* a 'warmup' checkpoint; it starts from align or pretrained"),
        ("route", {}, "abc", "wants evolved experts .* put an evolve stage before it, or choose replicate or noise"),
        ("evolve", {}, "xyz", "trained with another tokenizer .*vocabulary 64"),
        ("warmup", {"language": {"hidden_size": 64}}, "abc", "holds 'vision_projection.* with shape .* this model needs"),
        ("warmup", {"language": {"num_layers": 3}}, "abc", r"lacks 'language_model.decoder.layers.2.*another model"),
        ("warmup", {"language": {"vocab_size": 80}}, "abc", "has a vocabulary of 64, this run one of 80"),
    ]
    for kind, sections, fingerprint, message in cases:
        config, built = built_for(kind, **sections)
        with pytest.raises(CheckpointError, match=message):
            start_from(path, built, config.for_stage(kind), config.stages[0], fingerprint=fingerprint)


def test_damaged_checkpoints_are_named_and_the_one_before_is_used(tmp_path, caplog):
    from megatron_evomoe.checkpoint import store

    _, built = built_for("align", trained=1)
    first, second = save(tmp_path, built, "align", 1), save(tmp_path, built, "align", 2)
    assert store.latest(tmp_path) == second
    shard = next(second.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"damaged: {shard.name} has \d+ bytes, \d+ bytes were saved"):
        records.read(second)
    assert store.latest(tmp_path) == first
    assert shard.name in caplog.text and "the checkpoint before it" in caplog.text
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        store.latest(tmp_path, step=2)
    (second / "evomoe.json").unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        records.read(second)
    with pytest.raises(CheckpointError, match="no checkpoint under"):
        store.resolve(tmp_path / "nowhere")


def test_killed_while_saving_leaves_the_last_good_one(tmp_path, monkeypatch):
    """Dies when the tensors are written and nothing is published yet: the worst moment."""
    from megatron_evomoe.checkpoint import store

    _, built = built_for("align", trained=1)
    first = save(tmp_path, built, "align", 1)

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(records.Record, "write", die)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, built, "align", 2)
    monkeypatch.undo()
    assert store.latest(tmp_path) == first
    assert (tmp_path / store.TRACKER).read_text() == "1"
    assert save(tmp_path, built, "align", 2).exists(), "the leftover of the killed save is no obstacle"


def test_no_space_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    from megatron_evomoe.checkpoint import store

    _, built = built_for("align", trained=1)
    first = save(tmp_path, built, "align", 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1, used=0, free=1000))
    with pytest.raises(CheckpointError, match=r"needs about .* and 0.0 MiB are free\. Nothing was written; .*iter_0000001 stays"):
        save(tmp_path, built, "align", 2)
    assert [p.name for p in tmp_path.glob("iter_*")] == [first.name]
    assert store.latest(tmp_path) == first


def test_failed_write_is_reported_and_cleaned_up(tmp_path, monkeypatch):
    from megatron_evomoe.checkpoint import store

    _, built = built_for("align", trained=1)
    first = save(tmp_path, built, "align", 1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.dist_checkpointing, "save", full)
    with pytest.raises(CheckpointError, match=r"No space left on device\. Nothing was published; .*iter_0000001 stays the newest"):
        save(tmp_path, built, "align", 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [first.name, store.TRACKER]


def test_old_checkpoints_are_dropped(tmp_path):
    _, built = built_for("align", trained=1)
    for step in (1, 2, 3):
        save(tmp_path, built, "align", step, keep=2)
    assert sorted(p.name for p in tmp_path.glob("iter_*")) == ["iter_0000002", "iter_0000003"]
    assert json.loads((tmp_path / "iter_0000003" / "evomoe.json").read_text())["step"] == 3
