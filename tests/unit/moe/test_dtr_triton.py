"""The Triton kernels of moe/dtr/triton.py agree with the paper's equations in float64.

The kernels run on a GPU if there is one, else in Triton's interpreter. Tiles are small, so that few tokens
fill several tiles and leave some half empty.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_evomoe.config import ConfigError, MoEConfig, from_mapping
from megatron_evomoe.model.transformer_config import language_transformer_config
from megatron_evomoe.moe.dtr import kernel as dtr_kernel
from megatron_evomoe.moe.dtr.maths import DtrWeights, HyperWeights, dtr_logits, naive_dtr_logits
from megatron_evomoe.moe.planes import to_planes
from megatron_evomoe.parallel import topology
from megatron_evomoe.train.built import build_stage
from megatron_evomoe.train.step import take_step
from tests.tiny import rows, step_of, tiny_config
from tests.unit.moe.router_models import batch, build_router

THROUGH_PROJECTION = ("z", "weight1", "weight2_down")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# T, C, h, r, N, activation, and which tokens are image tokens.
CASES = {
    "mixed": (45, 40, 3, 2, 4, "none", lambda t: t % 3 == 1),
    "gelu, blocks of each": (37, 33, 2, 3, 3, "gelu", lambda t: (t > 5) & (t < 25)),
    "silu, more columns than a tile": (20, 16, 4, 5, 8, "silu", lambda t: t % 2 == 0),
    "h = r = 1, two experts": (17, 70, 1, 1, 2, "none", lambda t: t < 9),
    "all text": (18, 24, 2, 4, 5, "none", lambda t: t < 0),
    "all image": (32, 24, 2, 2, 4, "gelu", lambda t: t >= 0),
    "one token": (1, 17, 2, 2, 4, "none", lambda t: t >= 0),
    "empty": (0, 24, 2, 2, 4, "none", lambda t: t >= 0),
}


@pytest.fixture(scope="module")
def triton():
    oldest = "3.7" if DEVICE == "cpu" else None  # older interpreters fail on numpy 2.4's scalars
    return pytest.importorskip(
        "triton", minversion=oldest, reason="Triton (for its interpreter: 3.7 or newer) is not installed"
    )


@pytest.fixture
def fused(triton, monkeypatch):
    """The function `dtr_triton.dtr_logits` with tiles of 16."""
    from megatron_evomoe.moe.dtr import triton as dtr_triton

    for name in ("BLOCK_TOKENS", "BLOCK_COLUMNS", "BLOCK_DEPTH"):
        monkeypatch.setattr(dtr_triton, name, 16)
    return dtr_triton.dtr_logits


def problem(case, dtype, weights_dtype=None):
    """Tokens of `dtype`, modalities, weights of `weights_dtype` or else `dtype`, and options."""
    T, C, h, r, N, activation, is_vision = CASES[case]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, scale=0.3, dtype=weights_dtype or dtype):
        return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype).requires_grad_()

    def hyper():
        return HyperWeights(draw(h, C), draw(h), draw(h + 1, 2 * r, C), draw(h + 1, r, C))

    z, weights = draw(T, C, scale=1.0, dtype=dtype), DtrWeights(hyper(), hyper(), draw(N, C))
    return z, is_vision(torch.arange(T, device=DEVICE)), weights, {"activation": activation}


def exactly(weights):
    def double(hyper):
        return HyperWeights(*(w.detach().double().requires_grad_() for w in hyper))

    return DtrWeights(
        double(weights.text), double(weights.vision), weights.phi_NC.detach().double().requires_grad_()
    )


def named_leaves(z, weights):
    halves = {
        f"{half}.{name}": w
        for half in ("text", "vision")
        for name, w in getattr(weights, half)._asdict().items()
    }
    return {"z": z, **halves, "phi": weights.phi_NC}


def logits_and_grads(function, z, is_vision, weights, **options):
    """Logits, and the gradients by name of a random linear form of the logits."""
    logits = function(z, is_vision, weights, **options)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits)
    named = {name: leaf for name, leaf in named_leaves(z, weights).items() if leaf.requires_grad}
    return logits, dict(
        zip(named, torch.autograd.grad((logits * direction).sum(), list(named.values())), strict=True)
    )


def assert_near(name, actual, expected):
    """Check values against float64, in units of the largest entry of a tensor.

    The bound is 4e-6 because sums in fp32 cancel (largest seen: 1.7e-6). A bf16 result may also differ by the
    precision of its 8 bits: 2⁻⁷ of an entry where the last conversion truncates (Triton's interpreter), half
    of that where it rounds (a GPU).

    Gradients through the projection are sums of numbers that were rounded to bf16 before, so their bound is
    2⁻⁷ of the largest entry (largest seen, with truncation: 3.7e-3).
    """
    is_bf16 = actual.dtype == torch.bfloat16
    bound = (
        2.0**-7
        if is_bf16 and name.removesuffix("_hC").removesuffix("_KJC").endswith(THROUGH_PROJECTION)
        else 4e-6
    )
    excess = (actual.double() - expected).abs() - (2.0**-7 if is_bf16 else 0.0) * expected.abs()
    largest = expected.abs().amax().item() if expected.numel() else 1.0
    worst = excess.amax().item() / max(largest, 1e-300) if expected.numel() else 0.0
    assert worst <= bound, f"{name} is off by {worst:.1e} of its largest entry {largest:.3g}"


DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16 tokens": (torch.bfloat16, torch.float32),
}


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_equals_naive_forward_and_every_gradient(fused, case, dtypes):
    z, is_vision, weights, options = problem(case, *dtypes)
    exact_z, exact_weights = z.detach().double().requires_grad_(), exactly(weights)
    expected, expected_grads = logits_and_grads(
        naive_dtr_logits, exact_z, is_vision, exact_weights, dtype=torch.float64, **options
    )
    logits, grads = logits_and_grads(fused, z, is_vision, weights, **options)
    assert logits.dtype == torch.float32
    assert_near("logits", logits, expected)  # the same bound for bf16, whose products are exact
    for name, leaf in named_leaves(z, weights).items():
        assert grads[name].dtype == leaf.dtype
        assert_near(name, grads[name], expected_grads[name])


@pytest.mark.parametrize("frozen", ["z", "weights"])
def test_frozen_parts_get_no_gradient_and_change_no_other(fused, frozen):
    z, is_vision, weights, options = problem("mixed", torch.float32)
    _, expected = logits_and_grads(fused, z, is_vision, weights, **options)
    for name, leaf in named_leaves(z, weights).items():
        leaf.requires_grad_((name == "z") != (frozen == "z"))
    _, grads = logits_and_grads(fused, z, is_vision, weights, **options)
    assert len(grads) == (9 if frozen == "z" else 1)
    assert all(torch.equal(grad, expected[name]) for name, grad in grads.items())


class HostReads(TorchDispatchMode):
    """Fail on operations that need a device synchronisation."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in {
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "equal",
        }, function
        return function(*args, **(kwargs or {}))


def test_nothing_is_read_back_by_the_host(fused):
    z, is_vision, weights, options = problem("mixed", torch.float32)
    with HostReads():
        logits_and_grads(fused, z, is_vision, weights, **options)
    # The factored form in PyTorch does synchronise with the device.
    with (
        pytest.raises(AssertionError, match="_local_scalar_dense"),
        HostReads(),
    ):
        logits_and_grads(dtr_logits, z, is_vision, weights, **options)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_a_cuda_graph_holds_forward_and_backward(fused):
    z, is_vision, weights, options = problem("mixed", torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fused(z, is_vision, weights, **options).sum().backward()  # compiles the kernels
    torch.cuda.current_stream().wait_stream(side)
    graph, leaves = torch.cuda.CUDAGraph(), list(named_leaves(z, weights).values())
    with torch.cuda.graph(graph):
        captured = fused(z, is_vision, weights, **options)
        captured_grads = torch.autograd.grad(captured.sum(), leaves)
    is_vision.logical_not_()
    graph.replay()
    logits = fused(z, is_vision, weights, **options)
    assert torch.equal(captured, logits)
    assert all(
        torch.equal(a, b)
        for a, b in zip(captured_grads, torch.autograd.grad(logits.sum(), leaves), strict=True)
    )


@pytest.mark.skipif(DEVICE == "cuda", reason="the other tests here run the compiled kernels")
def test_kernels_compile_for_hopper(triton):
    """The kernels compile without a GPU, because Triton includes the assembler.

    A new process is needed, in which Triton does not interpret the kernels.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    script = Path(__file__).with_name("compile_dtr_kernels.py")
    result = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # bf16 products must run on tensor cores (wgmma); fp32 products must not, for they would round to TF32.
    assert result.stdout.split("\n")[:-1] == [
        "grouped_product bf16 forward: wgmma", "grouped_product bf16 backward: wgmma", "weight_gradient "
                                                                                       "bf16: wgmma",
        "grouped_product fp32: fma", "mix: fma", "mix_backward: fma",
    ]  # fmt: skip


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_router_decides_and_learns_as_on_torch(fused, dtype):
    results = []
    for kernel in ("torch", "triton"):
        router = build_router(MoEConfig(dtr_kernel=kernel, dtr_hidden_size=3, dtr_rank=2), params_dtype=dtype)
        assert (router.fused is None) == (kernel == "torch")
        hidden, types = batch(dtype=dtype)
        probs, routing_map = router(hidden, to_planes(types).transpose(0, 1))
        (probs * torch.arange(4)).sum().backward()
        results.append(
            (
                probs,
                routing_map,
                {"z": hidden.grad, **{name: p.grad for name, p in router.named_parameters()}},
            )
        )
    (probs, routing_map, grads), (fused_probs, fused_map, fused_grads) = results
    assert torch.equal(fused_map, routing_map)
    torch.testing.assert_close(fused_probs, probs, rtol=0, atol=1e-6)
    for name, grad in grads.items():
        assert_near(name, fused_grads[name], grad.double())


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("train", [{}, {"recompute_granularity": "full"}], ids=["", "recompute"])
def test_a_stage_trains_as_on_torch(fused, train):
    """Three steps of `route` give the same losses as on torch; the third has no image.

    The optimizer would wait forever for a parameter without a gradient.
    """
    losses = []
    for kernel in ("torch", "triton"):
        config = tiny_config("route", moe={"dtr_kernel": kernel}, train=train)
        topology.seed_everything(config.train.seed)
        built = build_stage(config.for_stage("route"), config.stages[0])
        steps = [
            step_of(rows([1, 0], seed=1), rows([0, 1], seed=2)),
            step_of(rows([2, 1], seed=3)),
            step_of(rows([0, 0], seed=4)),
        ]
        losses.append([take_step(built, step, number).loss for number, step in enumerate(steps, 1)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(set(losses[0])) == 3


def run_config(**moe):
    return from_mapping({"language": {"vocab_size": 100}, "moe": moe})


def test_torch_imports_no_kernel():
    code = (
        "import sys, torch\n"
        "from megatron_evomoe.moe.routers import dynamic\n"
        "from megatron_evomoe.moe.dtr import kernel as dtr_kernel\n"
        "assert dtr_kernel.fused('torch', torch.float32) is None\n"
        "assert not [name for name in sys.modules if 'dtr.triton' in name]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with (
        monkeypatch.context() as without,
        pytest.raises(ConfigError, match="needs Triton, which does not import here"),
    ):
        without.setattr(importlib.util, "find_spec", lambda name: None)
        dtr_kernel.check("triton")
    if importlib.util.find_spec("triton") is not None:
        with pytest.raises(ConfigError, match="needs a GPU, and there is none; set dtr_kernel to torch"):
            language_transformer_config(run_config(dtr_kernel="triton"))


def test_triton_is_refused_for_what_it_does_not_compute(triton, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ConfigError, match=r"computes in fp32, and this router in torch\.float64"):
        dtr_kernel.fused("triton", torch.float64)
    with pytest.raises(ConfigError, match="computes the router dtr, and this router is linear"):
        run_config(dtr_kernel="triton", router="linear").check()
