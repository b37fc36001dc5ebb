"""The routers of moe/routers: gates, output scale, agreement with megatron-core, hooks, parameters."""

from __future__ import annotations

import math
import typing

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from megatron_evomoe.config import MoEConfig
from megatron_evomoe.moe.dtr.maths import naive_dtr_logits
from megatron_evomoe.moe.planes import from_planes, mark_starts, starts_of, to_planes
from megatron_evomoe.moe.router import ROUTERS, router_builder
from megatron_evomoe.moe.routers.base import straight_through
from tests.unit.moe.router_models import batch, build_router, transformer_config

pytestmark = pytest.mark.usefixtures("one_rank")
SMALL = {"dtr_hidden_size": 4, "dtr_rank": 4}


def planes_of(types):
    """The form [s, b, 2] in which token types [b, s] reach the router through `EvoMoELayer`."""
    return to_planes(types).transpose(0, 1).bool()


def aux_of(router, monkeypatch) -> list[torch.Tensor]:
    """Collect the auxiliary losses a router attaches."""
    attached, attach = [], router.attach_and_log_load_balancing_loss

    def noting(probs, coefficient, aux_loss, *args, **kwargs):
        attached.append(aux_loss)
        return attach(probs, coefficient, aux_loss, *args, **kwargs)

    monkeypatch.setattr(router, "attach_and_log_load_balancing_loss", noting)
    return attached


def logits_of(router, hidden, types) -> torch.Tensor:
    """Logits [T, N] that an observer of the router receives."""
    seen = []
    router.observer = lambda layer, types_T, logits_TN, probs_TN, routing_map_TN: seen.append(logits_TN)
    router(hidden, planes_of(types))
    router.observer = None
    return seen[0]


def test_linear_router_is_the_cores():
    """Probabilities, map and every gradient have the same bits, with both auxiliary losses on."""
    moe = MoEConfig(router="linear", router_gate="prob", moe_aux_loss_coeff=0.1, moe_z_loss_coeff=0.1)
    ours = build_router(moe)
    core = TopKRouter(config=transformer_config(moe), pg_collection=get_default_pg_collection())
    core.load_state_dict(ours.state_dict())
    core.set_layer_number(1)
    results = []
    for router, mask in ((ours, planes_of), (core, lambda types: (types == 2).transpose(0, 1))):
        hidden, types = batch()
        probs, routing_map = router(hidden, mask(types))
        (probs * torch.arange(probs.numel()).view_as(probs)).sum().backward()
        results.append((probs, routing_map, hidden.grad, router.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    # The routers also agree without token types.
    assert all(torch.equal(a, b) for a, b in zip(ours(hidden), core(hidden), strict=True))


def test_modality_linear_applies_each_modalitys_own_map():
    router = build_router(MoEConfig(router="modality-linear"))
    hidden, types = batch()
    flat, is_vision = hidden.flatten(0, 1), (types.T == 1).flatten()
    expected = torch.where(is_vision[:, None], flat @ router.weight_vision.T, flat @ router.weight_text.T)
    torch.testing.assert_close(logits_of(router, hidden, types), expected, rtol=0, atol=1e-6)  # measured: 0


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_dtr_router_is_the_papers_equation(activation):
    router = build_router(
        MoEConfig(router="dtr", dtr_hidden_size=5, dtr_rank=3, dtr_activation=activation, dtr_init_std=0.5)
    )
    hidden, types = batch()
    is_vision = (types.T == 1).flatten()
    expected = naive_dtr_logits(hidden.flatten(0, 1), is_vision, router.weights(), activation=activation)
    # Measured: 3.8e-6, for logits up to 10.
    torch.testing.assert_close(logits_of(router, hidden, types), expected, rtol=0, atol=3e-5)


def test_no_types_means_all_text_and_a_bool_mask_means_padding():
    router = build_router(MoEConfig(router="dtr"))
    hidden, types = batch()
    text = router(hidden, planes_of(torch.zeros_like(types)))
    assert all(torch.equal(a, b) for a, b in zip(router(hidden), text, strict=True))
    assert torch.equal(to_planes(types == 2), to_planes(torch.where(types == 2, 2, 0)))
    assert torch.equal(from_planes(to_planes(types)), types) and set(types.unique().tolist()) == {0, 1, 2}
    starts = torch.rand(types.shape) < 0.5
    marked = to_planes(mark_starts(types, starts))
    assert torch.equal(from_planes(marked), types) and torch.equal(starts_of(marked), starts)


@pytest.mark.parametrize("name", ROUTERS)
def test_bf16_parameters_route_in_fp32(name):
    moe = MoEConfig(router=name)
    router = build_router(moe, params_dtype=torch.bfloat16, bf16=True, moe_router_dtype=None)
    hidden, types = batch(dtype=torch.bfloat16)
    assert {p.dtype for p in router.parameters()} == {torch.bfloat16}
    exact = build_router(moe)
    exact.load_state_dict(router.state_dict())
    logits = logits_of(router, hidden, types)
    assert logits.dtype == torch.float32 and torch.equal(logits, logits_of(exact, hidden.float(), types))
    assert router(hidden, planes_of(types))[0].dtype == torch.float32


def test_straight_through_is_one_with_the_gradient_of_the_probability():
    router = build_router(MoEConfig(router="linear", router_gate="straight_through", moe_aux_loss_coeff=0.0))
    hidden, types = batch()
    direction = torch.randn(hidden.shape[0] * hidden.shape[1], 4, generator=torch.Generator().manual_seed(5))
    probs, routing_map = router(hidden, planes_of(types))
    assert torch.equal(probs, routing_map.float()) and (routing_map.sum(1) == 1).all()
    (probs * direction).sum().backward()
    rho, expert = torch.softmax(hidden.flatten(0, 1) @ router.weight.T, dim=-1).max(dim=-1)
    rho.retain_grad()
    # d(rho / stopgrad(rho)) = d rho / rho, times the loss's gradient by the chosen expert's scale.
    by_hand = torch.autograd.grad(
        rho, [hidden, router.weight], direction.gather(1, expert[:, None])[:, 0] / rho.detach()
    )
    torch.testing.assert_close(hidden.grad, by_hand[0], rtol=0, atol=1e-7)  # measured: 0, entries up to 0.1
    # Measured: 0, for entries up to 11.
    torch.testing.assert_close(router.weight.grad, by_hand[1], rtol=0, atol=1e-5)
    assert router.weight.grad.abs().max() > 0.1


def test_top_2_straight_through_keeps_post_softmax_weights_and_pre_softmax_gradients():
    moe = MoEConfig(router="linear", moe_router_topk=2, moe_aux_loss_coeff=0.0)
    router = build_router(moe)
    post = TopKRouter(
        config=transformer_config(moe, moe_router_pre_softmax=False),
        pg_collection=get_default_pg_collection(),
    )
    post.load_state_dict(router.state_dict())
    hidden, types = batch()
    probs, routing_map = router(hidden, planes_of(types))
    expected_probs, expected_map = post(hidden)
    assert torch.equal(routing_map, expected_map) and (routing_map.sum(1) == 2).all()
    torch.testing.assert_close(probs, expected_probs, rtol=0, atol=1e-6)  # measured: 6e-8
    # Unlike megatron-core's post-softmax weights, the sum of these weights has a gradient, so the experts
    # that were not chosen learn too.
    (gradient,) = torch.autograd.grad(probs.sum(), router.weight)
    assert gradient.abs().max() > 0.1
    rho = torch.softmax(hidden.flatten(0, 1) @ router.weight.T, dim=-1)
    mass = (rho * routing_map).sum(1)
    (by_hand,) = torch.autograd.grad((mass / mass.detach()).sum(), router.weight)
    torch.testing.assert_close(gradient, by_hand, rtol=0, atol=1e-5)  # measured: 0, entries up to 7


def test_prob_gate_scales_by_the_probability():
    router = build_router(MoEConfig(router="dtr", router_gate="prob"))
    hidden, types = batch()
    probs, routing_map = router(hidden, planes_of(types))
    rho = torch.softmax(logits_of(router, hidden, types), dim=-1)
    assert torch.equal(probs, rho * routing_map) and torch.equal(routing_map.int().argmax(1), rho.argmax(1))


@pytest.mark.parametrize("name", ROUTERS)
def test_aux_loss_is_the_papers_over_real_tokens_only(name, monkeypatch):
    """The loss is α·N·Σ F_i·G_i over real tokens, and padding gets no gradient.

    Loss and gradient are compared with values computed by hand.
    """
    router = build_router(MoEConfig(router=name, moe_aux_loss_coeff=0.3))
    attached = aux_of(router, monkeypatch)
    hidden, types = batch()
    probs, routing_map = router(hidden, planes_of(types))
    (probs * 0).sum().backward()  # only the auxiliary loss remains
    real = (types.T != 2).flatten()
    logits_TN = router.gating(hidden, types.T).flatten(0, 1)
    share_N = routing_map[real].float().mean(0)
    expected = 0.3 * 4 * (share_N * torch.softmax(logits_TN, -1)[real].mean(0)).sum()
    with_padding = 0.3 * 4 * (routing_map.float().mean(0) * torch.softmax(logits_TN, -1).mean(0)).sum()
    torch.testing.assert_close(attached[0], expected, rtol=0, atol=1e-6)  # measured: 0
    assert abs(with_padding - expected) > 1e-4
    (by_hand,) = torch.autograd.grad(expected, hidden)
    # Measured: 5e-10, for entries up to 2e-3.
    torch.testing.assert_close(hidden.grad, by_hand, rtol=0, atol=1e-8)
    assert hidden.grad[types.T != 2].abs().max() > 1e-5 and not hidden.grad[types.T == 2].any()


def test_z_loss_by_hand_over_real_tokens_only():
    router = build_router(MoEConfig(router="dtr", moe_aux_loss_coeff=0.0, moe_z_loss_coeff=0.5))
    hidden, types = batch()
    probs, _ = router(hidden, planes_of(types))
    (probs * 0).sum().backward()
    logits = router.gating(hidden, types.T)
    (by_hand,) = torch.autograd.grad(0.5 * logits.logsumexp(-1)[types.T != 2].square().mean(), hidden)
    torch.testing.assert_close(hidden.grad, by_hand, rtol=0, atol=1e-8)  # measured: 0, entries up to 0.04
    assert hidden.grad.abs().max() > 1e-5


@pytest.mark.parametrize("topk", [1, 2])
def test_capacity_drops_the_least_probable_and_leaves_weights_finite(topk):
    moe = MoEConfig(router="dtr", moe_router_topk=topk, moe_expert_capacity_factor=0.5, dtr_init_std=0.5)
    router, free = (
        build_router(moe),
        build_router(MoEConfig(router="dtr", moe_router_topk=topk, dtr_init_std=0.5)),
    )
    hidden, types = batch()
    probs, routing_map = router(hidden, planes_of(types))
    _, wanted = free(hidden, planes_of(types))
    real = types.T.flatten() != 2
    capacity = math.ceil(int(real.sum()) * topk / 4 / 2)  # half an even share of the real tokens
    rho = torch.softmax(logits_of(router, hidden, types), dim=-1)
    for n in range(4):
        kept, dropped = rho[routing_map[:, n], n], rho[real & wanted[:, n] & ~routing_map[:, n], n]
        assert len(kept) == min(int((real & wanted[:, n]).sum()), capacity)
        assert not len(dropped) or kept.min() >= dropped.max() - 2**-12
    assert not routing_map[~real].any()
    assert probs.isfinite().all() and not probs[~routing_map].any()
    served = routing_map.any(1)
    assert 0 < served.sum() < len(served)
    # Measured: 0.
    torch.testing.assert_close(probs[served].sum(1), torch.ones(int(served.sum())), rtol=0, atol=1e-6)
    probs.sum().backward()
    assert all(p.grad.isfinite().all() for p in router.parameters())
    # In evaluation nothing is dropped: an answer must not depend on other questions of its batch.
    assert torch.equal(router.eval()(hidden, planes_of(types))[1], wanted)


def test_straight_through_alone():
    probs = torch.tensor([[0.4, 0.0, 0.1], [0.0, 0.7, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    weights = straight_through(probs)
    assert torch.allclose(weights, torch.tensor([[0.8, 0.0, 0.2], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    weights.sum().backward()
    torch.testing.assert_close(probs.grad, torch.tensor([[2.0] * 3, [1 / 0.7] * 3, [1.0] * 3]))


def test_observer_sees_every_decision_without_a_graph():
    router, seen = build_router(MoEConfig(router="dtr")), []
    router.observer = lambda *decision: seen.append(decision)
    hidden, types = batch()
    probs, routing_map = router(hidden, planes_of(types))
    ((layer, types_T, logits, observed_probs, observed_map),) = seen
    assert layer == 1 and torch.equal(types_T, types.T.flatten())
    assert torch.equal(observed_probs, probs) and torch.equal(observed_map, routing_map)
    assert torch.equal(logits.argmax(1), routing_map.int().argmax(1))
    assert not logits.requires_grad and not observed_probs.requires_grad


def test_intervention_replaces_the_decision_in_evaluation_only():
    router = build_router(MoEConfig(router="dtr"))
    hidden, types = batch()
    router.intervene = lambda probs, routing_map, types_T: (probs.roll(1, 1), routing_map.roll(1, 1))
    with pytest.raises(ValueError, match="eval"):
        router(hidden, planes_of(types))
    router.eval()
    probs, routing_map = router(hidden, planes_of(types))
    router.intervene = None
    plain = router(hidden, planes_of(types))
    assert torch.equal(probs.roll(-1, 1), plain[0]) and torch.equal(routing_map.roll(-1, 1), plain[1])


@pytest.mark.parametrize("name, count", [("linear", 4 * 32), ("modality-linear", 2 * 4 * 32),
                                         ("dtr", 4 * 32 + 2 * (16 * 32 + 16 + 17 * 48 * 32)),
                                         ("cosine", 4 * 32 + 1)])  # fmt: skip
def test_parameters_are_marked_used_and_saved_once(name, count):
    router = build_router(MoEConfig(router=name))
    parameters = dict(router.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == count  # the base class's weight is removed
    hidden, types = batch()
    router(hidden, planes_of(torch.zeros_like(types)))[0].sum().backward()
    assert all(p.grad is not None and p.sequence_parallel is False for p in parameters.values())
    sharded = router.sharded_state_dict(prefix="router.")
    assert set(sharded) == {f"router.{key}" for key in parameters}
    for key, parameter in parameters.items():
        tensor = sharded[f"router.{key}"]
        assert tensor.key == f"router.{key}" and tensor.global_shape == parameter.shape == tensor.local_shape
        assert tensor.replica_id == (0, 0, 0) and tensor.data.data_ptr() == parameter.data_ptr()


def test_sequence_parallel_mark_follows_the_configuration():
    for name in ROUTERS:
        moe = MoEConfig(router=name)
        config = transformer_config(moe)
        config.sequence_parallel = True  # set late, because TransformerConfig requires TP > 1
        router = router_builder(moe)(
            config=config, pg_collection=get_default_pg_collection(), is_mtp_layer=False, another=1
        )
        assert all(p.sequence_parallel is True for p in router.parameters())


def test_contradictions_are_refused():
    moe = MoEConfig(router="dtr", moe_router_topk=2)
    with pytest.raises(ValueError, match="pre_softmax"):
        build_router(moe, moe_router_pre_softmax=False)
    with pytest.raises(ValueError, match="top-1"):
        build_router(moe, moe_router_topk=1)
    build_router(MoEConfig(router="dtr", moe_router_topk=2, router_gate="prob"), moe_router_pre_softmax=False)


@pytest.mark.parametrize("gate", ["prob", "straight_through"])
@pytest.mark.parametrize("router", ROUTERS)
def test_forward_and_backward_never_wait_for_the_device(router, gate):
    """Forward and backward need no device synchronisation.

    Fake tensors have no contents, so reading a number or a data-dependent shape on the host fails. `gathers`
    is set as on a GPU; `test_gathering_is_what_waits` shows that a synchronisation would be noticed.
    """
    with FakeTensorMode():
        built = build_router(
            MoEConfig(router=router, router_gate=gate, moe_router_topk=2, moe_z_loss_coeff=1e-3, **SMALL)
        )
        built.gathers = False
        hidden, types = torch.randn(12, 3, 32).requires_grad_(), torch.randint(0, 3, (12, 3))
        probs, _ = built(hidden, to_planes(types))
        probs.sum().backward()
        assert all(p.grad is not None for p in [hidden, *built.parameters()])


def test_gathering_is_what_waits():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        built = build_router(MoEConfig(router="dtr", **SMALL))
        assert built.gathers  # on a CPU, where there is no synchronisation
        built(torch.randn(12, 3, 32), to_planes(torch.randint(0, 3, (12, 3))))


def test_the_configuration_names_every_router():
    assert typing.get_args(typing.get_type_hints(MoEConfig)["router"]) == tuple(ROUTERS)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_gate_that_is_called_as_megatron_core_does_takes_every_token_for_text(name):
    router, (hidden, types) = build_router(MoEConfig(router=name)), batch()
    assert torch.equal(router.gating(hidden), router.gating(hidden, torch.zeros_like(types.T)))
