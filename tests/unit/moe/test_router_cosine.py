"""The cosine router equals its definition in float64.

Tested are logits, gradients, the clamp, and vectors of length zero.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_evomoe.config import MoEConfig
from megatron_evomoe.moe.routers.cosine import EPSILON, MAX_LOG_SCALE, cosine_logits
from tests.unit.moe.router_models import batch, build_router

T, C, N = 29, 24, 5
DIRECTION = torch.randn(T, N, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def problem(dtype=torch.float64, log_scale=0.7):
    generator = torch.Generator().manual_seed(4)
    z = 3 * torch.randn(T, C, generator=generator, dtype=torch.float64)
    centroids = 0.02 * torch.randn(N, C, generator=generator, dtype=torch.float64)
    values = (z, centroids, torch.tensor([log_scale], dtype=torch.float64))
    return [v.to(dtype).requires_grad_() for v in values]


def by_definition(z, centroids, log_scale):
    return F.cosine_similarity(z[:, None], centroids[None], dim=-1) * log_scale.clamp(max=MAX_LOG_SCALE).exp()


def logits_and_grads(function, leaves):
    logits = function(*leaves)
    return logits, torch.autograd.grad((logits * DIRECTION.to(logits.dtype)).sum(), leaves)


@pytest.mark.parametrize(
    ("dtype", "gate", "forward", "backward"),
    [  # bounds in units of the largest entry
        (torch.float64, torch.float64, 3e-15, 3e-15),  # measured: 3.4e-16, 3.9e-16
        (torch.float32, torch.float32, 1e-6, 1e-6),  # measured: 1.3e-7, 1.3e-7
        (torch.bfloat16, torch.float32, 1e-6, 2**-8),  # measured: 1.3e-7, 2.7e-3; gradients are bf16
    ],
)
def test_equals_the_definition(dtype, gate, forward, backward):
    leaves = problem(dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted, wanted_grads = logits_and_grads(by_definition, exact)
    logits, grads = logits_and_grads(lambda *inputs: cosine_logits(*inputs, gate), leaves)
    assert logits.dtype == gate and (logits - wanted).abs().max() <= forward * wanted.abs().max()
    for grad, other, leaf in zip(grads[:2], wanted_grads, leaves, strict=False):
        assert grad.dtype == leaf.dtype and (grad - other).abs().max() <= backward * other.abs().max()
    # The gradient of log_scale is the sum of these terms, which nearly cancel.
    terms = (wanted * DIRECTION).abs().sum()
    assert (grads[2] - wanted_grads[2]).abs() <= backward * terms


def test_lengths_do_not_matter():
    z, centroids, log_scale = problem(torch.float32)
    logits = cosine_logits(z, centroids, log_scale, torch.float32)
    assert torch.equal(logits, cosine_logits(8 * z, centroids / 4, log_scale, torch.float32))
    assert logits.abs().max() <= math.exp(0.7)


def test_the_temperature_is_clamped_and_then_gets_no_gradient():
    at_limit, beyond = (problem(log_scale=value) for value in (MAX_LOG_SCALE, MAX_LOG_SCALE + 1))
    (logits, grads), (clamped, clamped_grads) = (
        logits_and_grads(lambda *inputs: cosine_logits(*inputs, torch.float64), leaves)
        for leaves in (at_limit, beyond)
    )
    assert torch.equal(logits, clamped) and torch.equal(grads[0], clamped_grads[0])
    assert grads[2].item() != 0 and clamped_grads[2].item() == 0


@pytest.mark.parametrize("length", [0.0, EPSILON / 10])
def test_a_vector_of_no_length_has_finite_logits_and_gradients(length):
    z, centroids, log_scale = problem(torch.float32)
    with torch.no_grad():
        z[3].mul_(length)
        centroids[1].mul_(length)
    logits, grads = logits_and_grads(
        lambda *inputs: cosine_logits(*inputs, torch.float32), [z, centroids, log_scale]
    )
    assert torch.isfinite(logits).all() and all(torch.isfinite(g).all() for g in grads)
    if not length:
        assert not logits[3].any() and not logits[:, 1].any()


def test_the_backward_keeps_no_copy_of_the_tokens():
    leaves, saved = problem(torch.bfloat16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        cosine_logits(*leaves, torch.float32)
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in leaves}


def test_a_fresh_router_starts_at_a_temperature_of_half(one_rank):
    router, (hidden, types) = build_router(MoEConfig(router="cosine")), batch()
    assert router.log_scale.exp().item() == pytest.approx(
        2
    ) and router.centroids.std().item() == pytest.approx(0.02, rel=0.3)
    assert router.gating(hidden, types.T).abs().max() <= 2 * (1 + 1e-6)
