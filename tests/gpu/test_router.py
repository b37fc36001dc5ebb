"""The DTR on a GPU, masked and with Triton kernels, against the paper's equations in float64.

The sizes are those of training. `tests/unit/moe/test_dtr_triton.py` has the corner cases, with small tiles;
on a GPU it runs there too.
"""

from __future__ import annotations

import pytest
import torch

from megatron_evomoe.config import LanguageConfig, MoEConfig
from megatron_evomoe.moe.dtr.maths import DtrWeights, HyperWeights, dtr_logits, naive_dtr_logits
from megatron_evomoe.moe.router import draw_router, router_tensors
from tests.gpu import needs

pytestmark = needs.cuda
FORMS = ["masked", pytest.param("triton", marks=needs.triton)]
# relative to a tensor's largest entry; bf16 results have 8 significant bits
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}


def problem(T: int, C: int, h: int, r: int, N: int, dtype: torch.dtype):
    """Tokens, modalities and the weights with which a run starts."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to("cuda", dtype).requires_grad_()

    def hyper() -> HyperWeights:
        return HyperWeights(draw(h, C), draw(h), draw(h + 1, 2 * r, C), draw(h + 1, r, C))

    weights = DtrWeights(hyper(), hyper(), draw(N, C))
    moe = MoEConfig(num_experts=N, dtr_hidden_size=h, dtr_rank=r, dtr_init_std=0.02)
    with torch.no_grad():
        draw_router(router_tensors(moe, LanguageConfig(hidden_size=C)), weights.named())
    return draw(T, C), torch.rand(T, generator=generator).to("cuda") < 0.5, weights


def leaves(z: torch.Tensor, weights: DtrWeights) -> list[torch.Tensor]:
    return [z, *weights.text, *weights.vision, weights.phi_NC]


def doubled(weights: DtrWeights) -> DtrWeights:
    text, vision = (
        HyperWeights(*(w.detach().double().requires_grad_() for w in half))
        for half in (weights.text, weights.vision)
    )
    return DtrWeights(text, vision, weights.phi_NC.detach().double().requires_grad_())


def logits_of(form: str, *arguments) -> torch.Tensor:
    if form == "masked":
        return dtr_logits(*arguments, gather=False)
    from megatron_evomoe.moe.dtr import triton as dtr_triton

    return dtr_triton.dtr_logits(*arguments)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1000, 512, 16, 16, 4), (129, 2048, 8, 32, 8)], ids=str)
def test_logits_and_gradients_equal_float64(shape, dtype, form):
    z, is_vision, weights = problem(*shape, dtype)
    exact_z, exact = z.detach().double().requires_grad_(), doubled(weights)
    logits, wanted = (
        logits_of(form, z, is_vision, weights),
        naive_dtr_logits(exact_z, is_vision, exact, dtype=torch.float64),
    )
    direction = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).to("cuda")
    assert_near(logits, wanted, TOLERANCE[torch.float32])  # for bf16 inputs too: their products are exact
    grads = torch.autograd.grad((logits * direction).sum(), leaves(z, weights))
    wanted_grads = torch.autograd.grad((wanted * direction.double()).sum(), leaves(exact_z, exact))
    for got, expected in zip(grads, wanted_grads, strict=True):
        assert_near(got, expected, TOLERANCE[dtype])


def assert_near(got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    worst = (got.double() - wanted).abs().amax() / wanted.abs().amax()
    assert worst <= tolerance, f"off by {worst:.1e} of the largest entry"
