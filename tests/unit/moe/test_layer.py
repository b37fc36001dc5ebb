"""The layer of moe/layer.py: token types for the router, recompute, and an expert's output scale."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules

from megatron_evomoe.config import MoEConfig
from megatron_evomoe.moe.layer import EvoMoELayer, moe_layer_spec
from megatron_evomoe.moe.router import ROUTERS
from tests.unit.moe.router_models import batch, transformer_config

pytestmark = pytest.mark.usefixtures("one_rank")


def build_layer(moe: MoEConfig, **changes) -> EvoMoELayer:
    torch.manual_seed(0)
    spec, config = moe_layer_spec(moe, use_te=False), transformer_config(moe, **changes)
    layer = build_module(spec, config=config) if hasattr(spec, "module") else spec(config=config)
    layer.set_layer_number(1)
    return layer


def build_block(moe: MoEConfig, **changes) -> TransformerBlock:
    """Two transformer layers as in a GPT model, both with mixtures."""
    torch.manual_seed(0)
    model_parallel_cuda_manual_seed(123)
    layer_spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer_spec.submodules.mlp = moe_layer_spec(moe, use_te=False)
    submodules = TransformerBlockSubmodules(
        layer_specs=[layer_spec] * 2, layer_norm=layer_spec.submodules.input_layernorm
    )
    return TransformerBlock(transformer_config(moe, **changes), submodules)


def observe(module: torch.nn.Module) -> list[tuple]:
    seen = []
    for layer in module.modules():
        if isinstance(layer, EvoMoELayer):
            layer.router.observer = lambda *decision: seen.append(decision)
    return seen


def as_causal(s: int) -> torch.Tensor:
    return torch.ones(1, 1, s, s).tril() < 0.5


@pytest.mark.parametrize("name", ROUTERS)
def test_spec_builds_our_layer_and_router(name):
    block = build_block(MoEConfig(router=name))
    for layer in block.layers:
        assert (
            type(layer.mlp) is EvoMoELayer
            and layer.is_moe_layer
            and type(layer.mlp.router) is ROUTERS[name].load()
        )
        assert layer.mlp.router.layer_number == layer.layer_number


def test_types_reach_the_router_token_by_token():
    layer = build_layer(MoEConfig())
    seen = observe(layer)
    hidden, types = batch(s=12, b=3)
    layer(hidden, padding_mask=types)
    layer(hidden, padding_mask=types == 2)
    layer(hidden)
    assert torch.equal(seen[0][1], types.T.flatten())
    assert torch.equal(seen[1][1], torch.where(types == 2, 2, 0).T.flatten())
    assert not seen[2][1].any()


def test_types_of_another_shape_are_refused():
    hidden, types = batch(s=12, b=3)
    with pytest.raises(ValueError, match="scattered along the sequence"):
        build_layer(MoEConfig())(hidden, padding_mask=types.repeat(1, 2))


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_straight_through_starts_as_the_chosen_experts_unscaled(dispatcher):
    layer = build_layer(MoEConfig(moe_token_dispatcher_type=dispatcher))
    hidden, types = batch()
    seen = observe(layer)
    output, _ = layer(hidden, padding_mask=types)
    chosen = seen[0][4].int().argmax(1)
    assert len(chosen.unique()) > 1
    flat, expected = hidden.flatten(0, 1), torch.empty(len(chosen), hidden.shape[-1])
    for n, expert in enumerate(layer.experts.local_experts):
        expected[chosen == n] = expert(flat[chosen == n])[0]
    # The same GEMMs run on the same rows in the same order, so the outputs are equal.
    assert torch.equal(output.flatten(0, 1), expected)


@pytest.mark.parametrize("changes", [
    dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=2),
    dict(recompute_granularity="selective", recompute_modules=["moe"]),
], ids=["full", "full, two layers at once", "selective moe"])  # fmt: skip
@pytest.mark.parametrize("name", ["modality-linear", "dtr"])
def test_recompute_changes_no_bit(name, changes):
    """Two microbatches of different types are in flight.

    The backward of the first comes after the forward of the second.
    """
    moe = MoEConfig(router=name, moe_aux_loss_coeff=0.1, moe_z_loss_coeff=0.1)
    results = []
    for recompute in ({}, changes):
        block = build_block(moe, **recompute)
        seen, inputs, outputs = observe(block), [], []
        for seed in (0, 1):
            hidden, types = batch(seed=seed)
            inputs.append(hidden)
            outputs.append(block(hidden_states=hidden, attention_mask=as_causal(12), padding_mask=types))
        for output in outputs:
            output.square().sum().backward()
        # 2 layers × 2 microbatches; the repeated forward of recompute is not reported.
        assert len(seen) == 4
        results.append([*outputs, *(x.grad for x in inputs), *(p.grad for p in block.parameters())])
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*results, strict=True))
    assert all(gradient is not None and gradient.isfinite().all() for gradient in results[0])


def test_types_matter_in_what_recompute_is_compared_on():
    """Token types change the block's output, so the test above would notice wrong ones."""
    block = build_block(MoEConfig(router="modality-linear", router_gate="prob"))
    hidden, types = batch()
    a, b = (
        block(hidden_states=hidden, attention_mask=as_causal(12), padding_mask=t)
        for t in (types, torch.zeros_like(types))
    )
    assert not torch.equal(a, b)


def test_router_above_a_frozen_stack_learns_under_selective_recompute():
    """In stage `route` nothing below the first mixture needs a gradient.

    A re-entrant checkpoint would return no gradient for its router.
    """
    gradients = []
    for changes in ({}, dict(recompute_granularity="selective", recompute_modules=["moe"])):
        layer = build_layer(MoEConfig(), **changes)
        layer.experts.requires_grad_(False)
        hidden, types = batch()
        layer(hidden.detach(), padding_mask=types)[0].square().sum().backward()
        gradients.append([p.grad for p in layer.router.parameters()])
    assert all(g is not None and torch.equal(plain, g) for plain, g in zip(*gradients, strict=True))
    assert all(gradient.any() for gradient in gradients[0])


class PermuteAsTransformerEngine(torch.autograd.Function):
    """megatron-core's permutation with the gradients that Transformer Engine's fused one computes.

    The probabilities have a gradient only if the tokens need one.
    """

    @staticmethod
    def forward(ctx, tokens, probs, routing_map):
        ctx.save_for_backward(tokens, probs, routing_map)
        permuted, permuted_probs, indices = moe_utils.permute(tokens, routing_map, probs)
        ctx.mark_non_differentiable(indices)
        return permuted, permuted_probs, indices

    @staticmethod
    def backward(ctx, *gradients):
        if not ctx.needs_input_grad[0]:
            return None, None, None
        tokens, probs, routing_map = ctx.saved_tensors
        with torch.enable_grad():
            inputs = tokens.detach().requires_grad_(), probs.detach().requires_grad_()
            outputs = moe_utils.permute(inputs[0], routing_map, inputs[1])[:2]
        return *torch.autograd.grad(outputs, inputs, gradients[:2]), None


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("router", ["linear", "dtr", "cosine"])
def test_router_above_a_frozen_stack_learns_under_fused_permutation(monkeypatch, router, dispatcher):
    def permute_tokens(tokens, routing_map, num_out_tokens):
        permuted, _, indices = moe_utils.permute(tokens, routing_map)
        return permuted, indices

    def permute(tokens, probs, routing_map, num_out_tokens):
        return PermuteAsTransformerEngine.apply(tokens, probs, routing_map)

    def unpermute(tokens, indices, merging_probs, restore_shape):
        assert merging_probs is None  # the experts apply them
        return moe_utils.unpermute(tokens, indices, restore_shape)

    def sort_chunks(chunks, *arguments):
        *probs, sizes, order = arguments
        sorted_chunks, sorted_probs = moe_utils.sort_chunks_by_idxs(chunks, sizes, order, *probs)
        return (sorted_chunks, sorted_probs) if probs else sorted_chunks

    kernels = {
        "fused_permute": permute_tokens,
        "fused_permute_with_probs": permute,
        "fused_unpermute": unpermute,
        "fused_sort_chunks_by_index": sort_chunks,
        "fused_sort_chunks_by_index_with_probs": sort_chunks,
    }
    for name, kernel in ({"HAVE_TE": True} | kernels).items():
        monkeypatch.setattr(moe_utils, name, kernel, raising=False)
    gradients = []
    for fused in (False, True):
        moe = MoEConfig(router=router, moe_token_dispatcher_type=dispatcher, moe_aux_loss_coeff=0.1)
        layer = build_layer(moe)
        layer.config.moe_permute_fusion = fused
        layer.experts.requires_grad_(False)
        hidden, types = batch()
        layer(hidden.detach(), padding_mask=types)[0].square().sum().backward()
        gradients.append([p.grad for p in layer.router.parameters()])
    for plain, fused in zip(*gradients, strict=True):
        assert plain.any() and torch.equal(plain, fused)


def test_an_image_tokens_output_ignores_the_text_hypernetwork():
    layer = build_layer(MoEConfig(dtr_init_std=0.5))
    hidden, types = batch()
    before, _ = layer(hidden, padding_mask=types)
    with torch.no_grad():
        for parameter in layer.router.text.parameters():
            parameter.normal_()
    after, _ = layer(hidden, padding_mask=types)
    is_vision = types.T == 1
    # Text tokens now go to other experts and change those batches; rows of a GEMM may then round differently.
    # The difference measured is 0, for outputs up to 5e-3.
    torch.testing.assert_close(after[is_vision], before[is_vision], rtol=0, atol=1e-7)
    assert not torch.allclose(after[~is_vision], before[~is_vision], atol=1e-4)


def test_bf16_layer_keeps_its_type_and_differs_from_fp32_by_rounding():
    moe = MoEConfig()
    layer = build_layer(moe, params_dtype=torch.bfloat16, bf16=True)
    hidden, types = batch(dtype=torch.bfloat16)
    output, _ = layer(hidden, padding_mask=types)
    exact = build_layer(moe)
    exact.load_state_dict(layer.state_dict())
    expected, _ = exact(hidden.float(), padding_mask=types)
    assert output.dtype == torch.bfloat16
    error = (output.float() - expected).norm() / expected.norm()
    # One bf16 rounding is 2^-9 = 0.002; measured: 0.0038.
    assert error < 0.01
    output.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.router.parameters())


@pytest.mark.parametrize("setting", [
    dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=1),
    dict(mlp_chunks_for_prefill=2),
], ids=["block recompute", "chunked prefill"])  # fmt: skip
def test_settings_that_lose_the_types_are_refused(setting):
    with pytest.raises(ValueError, match="loses the token types"):
        build_layer(MoEConfig(), **setting)
