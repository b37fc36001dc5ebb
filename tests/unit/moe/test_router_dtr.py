"""The factored DTR of moe/dtr/maths.py equals the paper's equations in float64.

The equations build Θ explicitly. The initial values are tested too.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_evomoe.config import LanguageConfig, MoEConfig
from megatron_evomoe.moe.dtr.maths import DtrWeights, HyperWeights, dtr_logits, naive_dtr_logits
from megatron_evomoe.moe.router import draw_router, router_tensors

T, C, N, h, r = 13, 24, 4, 3, 2
MODALITIES = {
    "mixed": torch.arange(T) % 3 == 1,
    "all text": torch.zeros(T, dtype=torch.bool),
    "all image": torch.ones(T, dtype=torch.bool),
    "one text": torch.tensor([False]),
    "one image": torch.tensor([True]),
    "empty": torch.zeros(0, dtype=torch.bool),
}


def make_weights(width=C, hidden=h, rank=r, dtype=torch.float64, seed=0) -> DtrWeights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (
            (torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.2).to(dtype).requires_grad_()
        )

    def hyper():
        return HyperWeights(
            draw(hidden, width),
            draw(hidden),
            draw(hidden + 1, 2 * rank, width),
            draw(hidden + 1, rank, width),
        )

    return DtrWeights(hyper(), hyper(), draw(N, width))


def leaves(weights: DtrWeights) -> list[torch.Tensor]:
    return [*weights.text, *weights.vision, weights.phi_NC]


def tokens(count, width=C, dtype=torch.float64):
    return (
        torch.randn(count, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
    )


def logits_and_grads(function, z, is_vision, weights, **options):
    """Logits, and the gradients of a random linear form of them by z and every weight."""
    logits = function(z, is_vision, weights, **options)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(
        logits.dtype
    )
    return logits, torch.autograd.grad((logits * direction).sum(), [z, *leaves(weights)])


@pytest.mark.parametrize("gather", [True, False], ids=["gather", "mask"])
@pytest.mark.parametrize("activation", ["none", "gelu", "silu"])
@pytest.mark.parametrize("case", MODALITIES)
def test_equals_naive_forward_and_every_gradient(case, activation, gather):
    is_vision, weights = MODALITIES[case], make_weights()
    z, options = tokens(len(is_vision)), dict(activation=activation, dtype=torch.float64)
    expected, expected_grads = logits_and_grads(naive_dtr_logits, z, is_vision, weights, **options)
    logits, grads = logits_and_grads(dtr_logits, z, is_vision, weights, gather=gather, **options)
    # The largest difference over all these cases is 3.6e-14 forward, and 1.2e-13 in a gradient, with entries
    # up to 200.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)


def test_naive_is_the_papers_equation():
    """For one token, with Θ as one matrix from one linear map, as in Eq. 5."""
    weights, z = make_weights(), tokens(1)
    w = weights.vision
    W2 = torch.cat(
        [w.weight2_down_KJC[:-1].flatten(1), w.weight2_up_KrC[:-1].transpose(1, 2).flatten(1)], dim=1
    ).T
    b2 = torch.cat([w.weight2_down_KJC[-1].flatten(), w.weight2_up_KrC[-1].T.flatten()])
    theta = W2 @ (w.weight1_hC @ z[0] + w.bias1_h) + b2
    down, up = theta[: 2 * r * C].view(2 * r, C), theta[2 * r * C :].view(C, r)
    gate, value = (down @ z[0]).chunk(2)
    expected = weights.phi_NC @ (up @ (gate * torch.sigmoid(gate) * value))
    logits = naive_dtr_logits(z, torch.tensor([True]), weights, dtype=torch.float64)
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["all text", "all image", "empty"])
@pytest.mark.parametrize("gather", [True, False], ids=["gather", "mask"])
def test_absent_modality_gets_zero_gradients_not_none(case, gather):
    is_vision, weights = MODALITIES[case], make_weights()
    dtr_logits(
        tokens(len(is_vision)), is_vision, weights, dtype=torch.float64, gather=gather
    ).sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in leaves(weights))
    for present, hyper in ((~is_vision, weights.text), (is_vision, weights.vision)):
        assert all(bool(weight.grad.any()) == bool(present.any()) for weight in hyper)


@pytest.mark.parametrize("gather", [True, False], ids=["gather", "mask"])
@pytest.mark.parametrize("perturbed", ["text", "vision"])
def test_logits_do_not_depend_on_the_other_modalitys_hypernetwork(perturbed, gather):
    is_vision, z, weights = MODALITIES["mixed"], tokens(T), make_weights()
    other = weights._replace(**{perturbed: HyperWeights(*(w + 1 for w in getattr(weights, perturbed)))})
    before, after = (
        dtr_logits(z, is_vision, w, dtype=torch.float64, gather=gather) for w in (weights, other)
    )
    untouched = is_vision if perturbed == "text" else ~is_vision
    assert torch.equal(before[untouched], after[untouched])
    assert (before[~untouched] != after[~untouched]).all()


def test_bf16_tokens_and_weights_are_computed_in_fp32():
    is_vision, z, weights = (
        MODALITIES["mixed"],
        tokens(T, dtype=torch.bfloat16),
        make_weights(dtype=torch.bfloat16),
    )
    logits, grads = logits_and_grads(dtr_logits, z, is_vision, weights)
    z32 = z.detach().float().requires_grad_()
    text, vision = (
        HyperWeights(*(w.detach().float().requires_grad_() for w in hyper)) for hyper in weights[:2]
    )
    exact, exact_grads = logits_and_grads(
        dtr_logits, z32, is_vision, DtrWeights(text, vision, weights.phi_NC.detach().float().requires_grad_())
    )
    # Both runs have the same products and sums, so the bits are equal.
    assert logits.dtype == torch.float32 and torch.equal(logits, exact)
    assert all(
        grad.dtype == torch.bfloat16 and torch.equal(grad, e.bfloat16())
        for grad, e in zip(grads, exact_grads, strict=True)
    )


def test_masked_bf16_against_float64():
    """With a mask, bf16 logits are as exact as fp32 logits; gradients are rounded to bf16.

    Products of bf16 numbers are exact in fp32 (largest difference seen: 7.5e-7 of the largest entry).
    Gradients through the projection are rounded to bf16 before it, 2⁻⁹ each, and so are the results (largest
    seen in all: 4.4e-3).
    """
    z, weights = tokens(300, 96, torch.bfloat16), make_weights(96, dtype=torch.bfloat16)
    is_vision = torch.arange(300) % 5 < 3
    halves = (HyperWeights(*(w.detach().double().requires_grad_() for w in hyper)) for hyper in weights[:2])
    exact = DtrWeights(*halves, weights.phi_NC.detach().double().requires_grad_())
    exact_z = z.detach().double().requires_grad_()
    logits, grads = logits_and_grads(dtr_logits, z, is_vision, weights, gather=False)
    wanted, wanted_grads = logits_and_grads(naive_dtr_logits, exact_z, is_vision, exact, dtype=torch.float64)
    assert logits.dtype == torch.float32 and off(logits, wanted) < 5e-6
    assert all(
        grad.dtype == torch.bfloat16 and off(grad, e) < 2.0**-7
        for grad, e in zip(grads, wanted_grads, strict=True)
    )


def off(got, wanted) -> float:
    """Largest difference, in units of the largest entry."""
    return float((got.double() - wanted.double()).abs().amax() / wanted.double().abs().amax())


@pytest.mark.parametrize("gather", [True, False], ids=["gather", "mask"])
def test_saves_no_copy_of_the_tokens(gather):
    """Autograd keeps no copy of the tokens.

    Besides z and the weights it keeps T·K·J numbers for u, and little else; a gathered or converted z would
    add T·C.
    """
    count, width = 64, 512
    z, weights, saved = tokens(count, width, torch.float32), make_weights(width, dtype=torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        dtr_logits(z, torch.arange(count) % 2 == 0, weights, gather=gather)
    own = {x.untyped_storage().data_ptr() for x in [z, *leaves(weights)]}
    # Only tensors that grow with T count; the weights joined for the masked product do not.
    kept = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() // 4
        for x in saved
        if x.shape[:1] == (count,)
    }
    assert sum(size for pointer, size in kept.items() if pointer not in own) < count * width / 2


@pytest.mark.parametrize("width", [128, 2048])
def test_start_has_usable_logits_and_gradients_at_any_width(width):
    weights = make_weights(width, 16, 16, torch.float32)
    moe = MoEConfig(num_experts=N, dtr_hidden_size=16, dtr_rank=16, dtr_init_std=0.02)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        draw_router(router_tensors(moe, LanguageConfig(hidden_size=width)), weights.named())
    z = tokens(512, width, torch.float32)
    is_vision = torch.arange(512) % 2 == 0
    identity = weights._replace(phi_NC=torch.eye(width))
    with torch.no_grad():
        E_scale = dtr_logits(z, is_vision, identity).square().mean().sqrt().item()
    logits, grads = logits_and_grads(dtr_logits, z, is_vision, weights)
    assert 0.5 < E_scale < 0.8  # seen with four seeds at each width: 0.59 to 0.69
    assert 0.8 < logits.std().item() / (0.6 * 0.02 * width**0.5) < 1.4  # seen with four seeds: 0.94 to 1.22
    assert 0.1 < logits.std().item() < 1.0  # seen: 0.14 to 0.17 at width 128, 0.51 to 0.58 at 2048
    # A step of Adam moves the logits by lr·Σ|∂/∂w|. No matrix may be orders of magnitude behind the first.
    reach = [grad.abs().sum().item() for grad in grads[1:] if grad.ndim > 1]
    # Seen with four seeds: 0.022 (φ, with 8192 numbers, against matrices of a million).
    assert min(reach) > 0.01 * max(reach)
    assert all(grad.any() for grad in grads[1:])


def test_off_the_cpu_bf16_products_come_out_in_fp32():
    """The calls made on a GPU have the right arguments, dtypes and shapes, forward and backward.

    Meta tensors, which have no contents, stand for a GPU's tensors.
    """
    z, weights = tokens(300, 96, torch.bfloat16), make_weights(96, dtype=torch.bfloat16)
    z, *parts = (
        leaf.detach().to("meta").requires_grad_()
        for leaf in [z, *weights.text, *weights.vision, weights.phi_NC]
    )
    weights = DtrWeights(HyperWeights(*parts[:4]), HyperWeights(*parts[4:8]), parts[8])
    with ProductsSeen() as seen:
        logits = dtr_logits(z, torch.zeros(300, dtype=torch.bool, device="meta"), weights, gather=False)
        logits.sum().backward()
    assert logits.dtype == torch.float32 and logits.shape == (300, 4)
    assert z.grad.shape == z.shape and all(part.grad.dtype == torch.bfloat16 for part in parts)
    assert seen.exact == 3  # forward, the tokens' gradient and the weights' gradient


class ProductsSeen(TorchDispatchMode):
    """Counts the products of bf16 numbers with an fp32 result."""

    exact = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.exact += function is torch.ops.aten.mm.dtype
        return function(*args, **(kwargs or {}))
