"""One optimizer step: the loss's mean, which parameters get gradients, and what stops a run."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megatron_evomoe.config.recipe import PARTS
from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.data.conversation import IGNORE_INDEX
from megatron_evomoe.parallel import topology
from tests.tiny import rows, step_of, tiny_config

pytestmark = pytest.mark.usefixtures("one_rank")


def built_for(kind, **sections):
    from megatron_evomoe.train.built import build_stage

    config = tiny_config(kind, **sections)
    topology.seed_everything(config.train.seed)
    return build_stage(config.for_stage(kind), config.stages[0])


def gradients(built):
    return {n: p.main_grad.clone() for n, p in built.modules[0].named_parameters() if p.requires_grad}


def test_loss_is_the_mean_over_the_global_batch_not_over_microbatches():
    """Answers of 1 and 9 tokens lie in different microbatches.

    A mean of the microbatches' means would weigh the first answer's token nine times.
    """
    from megatron_evomoe.train.step import _count, _forward_backward, _reduce_loss

    short, long = rows([1], seed=1, answer=(1,)), rows([0], seed=2, answer=(9,))
    both = {k: short[k] + long[k] if k == "keys" else torch.cat([short[k], long[k]]) for k in short}
    results = []
    for step in (step_of(short, long), step_of(both)):
        built = built_for("warmup")
        counts = _count(step)
        loss = _reduce_loss(_forward_backward(built, step, counts)) / counts.supervised
        results.append((counts.supervised, loss.item(), gradients(built)))
    (n1, loss1, grads1), (n2, loss2, grads2) = results
    assert n1 == n2 == 10
    # The fp32 sums have another order; the largest relative difference seen is 4e-7.
    assert loss1 == pytest.approx(loss2, rel=1e-5)
    for name in grads1:
        torch.testing.assert_close(grads1[name], grads2[name], rtol=1e-4, atol=1e-6, msg=name)


def padding_alone(packed: bool):
    """A microbatch without samples, as two rows or as one segment."""
    batch = rows([0, 0]) if not packed else rows([0], length=7)
    batch["token_types"].fill_(TokenType.PADDING)
    batch["labels"].fill_(IGNORE_INDEX)
    return {**batch, "segments": (7,) if packed else None, "keys": []}


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize(
    ("kind", "moe"),
    [
        ("warmup", {}),
        ("evolve", {}),
        ("route", {"router": "dtr", "moe_z_loss_coeff": 0.1}),
        ("route", {"router": "linear", "moe_router_topk": 2, "moe_expert_capacity_factor": 1.0}),
    ],
)
def test_microbatches_of_padding_change_nothing(kind, moe, packed):
    """Loss, gradients and logged auxiliary losses are those of the step without them, to the last bit.

    The steps have two and four microbatches, so that the factors that undo megatron-core's mean are exact.
    """
    from megatron_evomoe.diagnose.collect import Watch
    from megatron_evomoe.train.routing_metrics import forget_auxiliary_losses, routing_metrics
    from megatron_evomoe.train.step import take_step

    filled = [rows([1, 0], seed=1), rows([0, 2], seed=2)]
    results = []
    for step in (filled, [padding_alone(packed), filled[0], padding_alone(packed), filled[1]]):
        forget_auxiliary_losses()
        built = built_for(kind, moe={"moe_aux_loss_coeff": 0.5, **moe})
        result = take_step(built, step_of(*step), 1)
        logged = {}
        if kind == "route":
            config = tiny_config(kind, moe={"moe_aux_loss_coeff": 0.5, **moe})
            watch = Watch(config, with_logits=False)
            logged = routing_metrics(watch, config, microbatches=result.filled_microbatches)
        results.append((result, logged, gradients(built)))
    (short, logged, wanted), (long, with_padding, got) = results
    assert (short.microbatches, long.microbatches) == (2, 4)
    assert short.filled_microbatches == long.filled_microbatches == 2
    assert short.loss == long.loss and short.grad_norm == long.grad_norm > 0
    for name, value in logged.items():
        assert with_padding[name] == value or math.isnan(value), name
    assert kind != "route" or logged["load_balancing_loss"] > 0
    for name, gradient in wanted.items():
        assert torch.equal(got[name], gradient), name


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("kind", ["warmup", "route"])
def test_a_step_of_padding_alone_has_no_gradient(kind, packed):
    from megatron_evomoe.train.step import take_step

    built = built_for(kind, moe={"moe_z_loss_coeff": 0.1})
    result = take_step(built, step_of(padding_alone(packed)), 1)
    assert result.loss == result.grad_norm == 0
    assert not any(gradient.any() for gradient in gradients(built).values())


def test_loss_equals_cross_entropy_by_hand():
    from megatron_evomoe.train.step import take_step

    built = built_for("warmup")
    batch = rows([1, 0], seed=3)
    with torch.no_grad():
        logits = built.modules[0](batch["tokens"], batch["token_types"], batch["images"])
        wanted = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE_INDEX
        )
    assert take_step(built, step_of(batch), 1).loss == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["align", "warmup", "evolve", "route"])
@pytest.mark.parametrize("images", [[0, 0], [2, 0], [1, 1]])
def test_every_trained_parameter_gets_a_gradient_whatever_the_images(kind, images):
    """Autograd reaches every trained parameter in text-only batches too.

    Otherwise a rank without images would not join the reduction of those gradients.
    """
    built = built_for(kind)
    batch = rows(images)
    for p in built.modules[0].parameters():
        p.grad = None
    losses = built.modules[0](batch["tokens"], batch["token_types"], batch["images"], labels=batch["labels"])
    trained = {n: p for n, p in built.modules[0].named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(
        (losses * (batch["labels"] != IGNORE_INDEX)).sum(), list(trained.values()), allow_unused=True
    )
    unreached = [n for n, g in zip(trained, grads, strict=True) if g is None]
    assert trained and not unreached


@pytest.mark.parametrize(
    ("kind", "prefixes"),
    [
        ("align", {"vision_projection."}),
        ("evolve", {"language_model.decoder.layers.1.mlp.linear_fc"}),
        ("route", {"language_model.decoder.layers.1.mlp.router."}),
    ],
)
def test_only_the_stage_s_part_trains_and_has_optimizer_state(kind, prefixes):
    from megatron_evomoe.train.step import take_step

    built = built_for(kind)
    before = {n: p.detach().clone() for n, p in built.modules[0].named_parameters()}
    take_step(built, step_of(rows([1, 0]), rows([0, 1], seed=9)), 1)
    changed = {n for n, p in built.modules[0].named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(any(n.startswith(p) for p in prefixes) for n in changed)
    held = sum(
        s["exp_avg"].numel() for o in built.optimizer.chained_optimizers for s in o.optimizer.state.values()
    )
    trained = sum(p.numel() for p in built.modules[0].parameters() if p.requires_grad)
    reduced = sum(
        p.numel() for w in built.wrapped for b in (*w.buffers, *w.expert_parallel_buffers) for p in b.params
    )
    # A frozen parameter is in no gradient buffer, and only buffers are reduced over ranks.
    assert held == trained == reduced


@pytest.mark.parametrize(("kind", "first_with_gradient"), [("evolve", 1), ("route", 1), ("warmup", 0)])
def test_no_backward_below_the_lowest_trained_layer(kind, first_with_gradient):
    built = built_for(kind)
    layers = built.modules[0].language_model.decoder.layers
    seen, tower = {}, []
    for i, layer in enumerate(layers):
        layer.register_forward_hook(lambda m, a, out, i=i: seen.update({i: out[0].requires_grad}))
    for layer in built.modules[0].vision_model.decoder.layers:
        layer.register_forward_hook(
            lambda m, a, out: tower.append((out[0].requires_grad, torch.is_grad_enabled()))
        )
    batch = rows([1, 0])
    built.modules[0](batch["tokens"], batch["token_types"], batch["images"], labels=batch["labels"])
    assert seen == {i: i >= first_with_gradient for i in range(2)}
    assert tower and not any(itertools.chain(*tower))  # a frozen tower runs without autograd


@pytest.mark.parametrize(
    ("kind", "recompute"), [("evolve", "full"), ("route", "full"), ("evolve", "selective")]
)
def test_recompute_gives_the_same_gradients_above_frozen_layers(kind, recompute):
    from megatron_evomoe.train.step import take_step

    found = []
    for granularity in (None, recompute):
        built = built_for(kind, train={"recompute_granularity": granularity, "recompute_modules": ["mlp"]})
        take_step(built, step_of(rows([1, 0])), 1)
        found.append(gradients(built))
    assert any(g.abs().max() > 0 for g in found[0].values())
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name]), name


def test_images_land_on_their_positions_in_order():
    built = built_for("warmup")
    model = built.modules[0]
    batch = rows([1, 0, 2])
    with torch.no_grad():
        hidden = model.embed(batch["tokens"], batch["token_types"], batch["images"]).transpose(0, 1)
        features = model.encode_images(batch["images"])
        words = model.language_model.embedding(input_ids=batch["tokens"], position_ids=None).transpose(0, 1)
    is_vision = batch["token_types"] == TokenType.VISION
    assert torch.equal(hidden[is_vision], features.flatten(0, 1))
    assert torch.equal(hidden[~is_vision], words[~is_vision])


def test_padding_and_other_rows_do_not_change_a_row():
    built = built_for("route")
    model = built.modules[0].eval()
    batch = rows([1, 1])
    altered = batch["tokens"].clone()
    altered[batch["token_types"] == TokenType.PADDING] = 5
    with torch.no_grad():
        one = model(batch["tokens"], batch["token_types"], batch["images"])
        two = model(altered, batch["token_types"], batch["images"])
    real = batch["token_types"] != TokenType.PADDING
    assert torch.equal(one[real], two[real])


def test_nan_stops_naming_step_rank_and_samples():
    from megatron_evomoe.train.step import NonFiniteError, take_step

    built = built_for("warmup")
    good, bad = rows([0, 0], seed=1), rows([1, 0], seed=2)
    with torch.no_grad():
        # Only rows with an image depend on this bias.
        built.modules[0].vision_projection.encoder.linear_fc1.bias[0] = math.nan
    with pytest.raises(NonFiniteError) as error:
        take_step(built, step_of(good, bad), 17)
    message = str(error.value)
    assert "loss is nan at step 17 (rank 0, microbatches [1], samples sample-2-0, sample-2-1)" in message
    assert "last checkpoint is untouched" in message


def test_clipping_and_schedule():
    from megatron_evomoe.train.step import take_step

    built = built_for(
        "warmup",
        optimizer={"lr_decay_style": "cosine", "lr_warmup_fraction": 0.2, "lr": 1.0, "clip_grad": 0.5},
    )
    rates, taken = [], []
    for i in range(10):
        result = take_step(built, step_of(rows([1, 0])), i + 1)
        taken.append(result.learning_rate)
        rates.append(built.optimizer.param_groups[0]["lr"])
        grads = torch.cat([g.flatten() for g in gradients(built).values()])
        assert grads.norm().item() <= 0.5 + 1e-4 or result.grad_norm <= 0.5
    warm = [0.5, 1.0]
    cosine = [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(1, 9)]
    assert rates == pytest.approx(warm + cosine, abs=1e-9)
    assert taken == pytest.approx([0.0, *rates[:-1]]), "what is logged is the rate of the step itself"


@pytest.mark.parametrize(
    "language",
    [
        {},
        {"parallel_residual": True, "normalization": "LayerNorm"},
        {"qk_layernorm": True},
        {"tie_word_embeddings": False, "add_bias_linear": True},
    ],
)
@pytest.mark.parametrize(
    ("kind", "moe"), [("warmup", {}), ("evolve", {}), ("route", {}), ("route", {"router": "modality-linear"})]
)
def test_every_trained_parameter_belongs_to_a_module_that_is_called(kind, moe, language):
    """A trained parameter must belong to a module whose forward is called.

    With `overlap_param_gather` megatron-core waits for a parameter's update when the module that owns it is
    called.
    """
    built = built_for(kind, moe=moe, language=language, train={"trainable": list(PARTS)})
    called = set()
    for name, module in built.modules[0].named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    batch = rows([1, 0], seed=1)
    built.modules[0](batch["tokens"], batch["token_types"], batch["images"], labels=batch["labels"])
    owners = {name.rpartition(".")[0] for name, p in built.modules[0].named_parameters() if p.requires_grad}
    assert owners and owners <= called, owners - called
