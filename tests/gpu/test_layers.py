"""Transformer Engine's layers match the local ones: same weights and batch, losses and gradients in bf16."""

from __future__ import annotations

import pytest
import torch

from megatron_evomoe.config import from_mapping
from megatron_evomoe.parallel import backend, topology
from tests.gpu import needs

pytestmark = [needs.cuda, needs.transformer_engine, pytest.mark.usefixtures("one_rank")]
# bf16 has 8 significant bits, and a few layers that round differently add up
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 0.01, 0.05


def build(kind: str, implementation: str):
    """A model of the tiny preset and its configuration."""
    from megatron_evomoe.model.build import build_modules

    config = from_mapping(
        {
            "preset": "tiny",
            "language": {"vocab_size": 256},
            "data": {"seq_length": 64},
            "train": {"bf16": True, "transformer_impl": implementation},
            "stages": [{"name": kind}],
        }
    )
    topology.seed_everything(1)
    return build_modules(config, kind)[0], config


@torch.no_grad()
def copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Copy the weights; Transformer Engine keeps some norms inside the linear layer that follows them."""
    given = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        apart = name.replace(".linear_qkv.layer_norm_", ".input_layernorm.").replace(
            ".self_attention.input_", ".input_"
        )
        apart = apart.replace(".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm.")
        parameter.copy_(given[name if name in given else apart])


def loss_and_gradients(
    model: torch.nn.Module, images: int, segments: tuple[int, ...] | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The mean loss of a batch, and the gradients of parameters that both implementations name alike."""
    generator = torch.Generator().manual_seed(2)
    tokens, labels = torch.randint(0, 256, (2, 2, 64), generator=generator).to(backend.device())
    types = torch.zeros_like(tokens)
    types[:, 1 : 1 + images] = 1
    pixels = torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8).to(
        backend.device()
    )
    if segments is not None:
        tokens, types, labels = (x.reshape(1, -1) for x in (tokens, types, labels))
    loss = model(tokens, types, pixels, labels=labels, segments=segments).float().mean()
    loss.backward()
    return loss.detach(), {
        n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None and "norm" not in n
    }


@pytest.mark.parametrize("segments", [None, (50, 14, 1, 63)], ids=["rows", "segments"])
@pytest.mark.parametrize("kind", ["warmup", "route"])
def test_losses_and_gradients_agree(kind, segments):
    (local, config), (fused, _) = build(kind, "local"), build(kind, "auto")
    copy_weights(local, fused)
    images = config.vision.tokens_per_image
    (wanted, local_grads), (got, fused_grads) = (
        loss_and_gradients(local, images, segments),
        loss_and_gradients(fused, images, segments),
    )
    assert got.item() == pytest.approx(wanted.item(), rel=LOSS_TOLERANCE)
    for name in local_grads.keys() & fused_grads.keys():
        # one token that is routed to another expert changes the experts' gradients
        if ".mlp." not in name or kind == "warmup":
            error = (fused_grads[name] - local_grads[name]).norm() / local_grads[name].norm().clamp(min=1e-6)
            assert error < GRADIENT_TOLERANCE, f"{name}: {error:.3f}"
