"""One rank of `test_tensor_parallel`, which computes logits, features and gradients under TP.

Rank 0 saves the results. CPU initialisation draws whole matrices and then cuts them, so the same seed gives
the same model under any TP.
"""

from __future__ import annotations

import sys

import torch

from megatron_evomoe.parallel import backend

LANGUAGE = {
    "vocab_size": 128,
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "tie_word_embeddings": False,
}
PHI = {
    "normalization": "LayerNorm",
    "add_bias_linear": True,
    "parallel_residual": True,
    "lm_head_bias": True,
    "activation": "gelu_tanh",
    "gated_linear_unit": False,
}


def main(tp: int, path: str) -> None:
    """Join the process group given by the environment, run all cases, and save them as rank 0."""
    backend.prepare()
    torch.set_num_threads(1)
    backend.init_process_group(timeout_minutes=1)
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(tp, 1)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    out = cases(tp)
    if torch.distributed.get_rank() == 0:
        torch.save(out, path)
    torch.distributed.destroy_process_group()


def cases(tp: int) -> dict[str, torch.Tensor]:
    """All tensors that the test compares; the process groups must exist."""
    out = {}
    for name, extra in {
        "qwen": {"add_qkv_bias": True, "num_query_groups": 2, "qk_layernorm": True},
        "phi": PHI,
    }.items():
        out.update({f"{name} {k}": v for k, v in language({**LANGUAGE, **extra}, tp).items()})
    out.update({f"packed {k}": v for k, v in packed(tp).items()})
    return {**out, **vision(tp)}


def language(section: dict, tp: int) -> dict[str, torch.Tensor]:
    """Logits, and gradients of replicated parameters reduced as `finalize_model_grads` does."""
    from megatron.core import tensor_parallel

    from megatron_evomoe.config import from_mapping
    from megatron_evomoe.model.language import build_language_model

    torch.manual_seed(2)
    config = from_mapping({"language": section, "parallel": {"tensor_model_parallel_size": tp}})
    model = build_language_model(config, stage_kind="dense")
    tokens = torch.randint(0, 128, (2, 16))
    hidden = model.embedding(input_ids=tokens, position_ids=None)
    if model.config.sequence_parallel:
        hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden)
    logits = tensor_parallel.gather_from_tensor_model_parallel_region(
        model(tokens, None, None, decoder_input=hidden)
    )
    logits.pow(2).mean().backward()
    return {"logits": logits.detach(), **replicated_gradients(model)}


def replicated_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of norms and routers, whole on every rank."""
    out = {}
    for name, parameter in model.named_parameters():
        if "layernorm" in name or ".router." in name:
            gradient = parameter.grad.clone()
            if getattr(parameter, "sequence_parallel", False):
                torch.distributed.all_reduce(gradient)
            out[name] = gradient
    return out


def packed(tp: int) -> dict[str, torch.Tensor]:
    """Losses of a packed row through a mixture, and gradients of it and of a row of padding alone.

    No segment ends where the ranks' parts of the row meet, and one of them holds padding alone.
    """
    from megatron_evomoe.config import from_mapping
    from megatron_evomoe.config.token_types import TokenType
    from megatron_evomoe.model.llava import LlavaModel

    torch.manual_seed(2)
    moe = {"router": "linear", "moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 0.1}
    config = from_mapping({"language": LANGUAGE, "moe": moe, "parallel": {"tensor_model_parallel_size": tp}})
    model = LlavaModel(config, stage_kind="route")
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 128, (1, 40), generator=generator)
    types = torch.full_like(tokens, TokenType.TEXT)
    types[0, 3:19] = TokenType.VISION
    types[0, 20:] = TokenType.PADDING
    pixels = torch.randint(0, 256, (1, 3, 32, 32), generator=generator, dtype=torch.uint8)
    losses = model(tokens, types, pixels, labels=tokens, segments=(1, 18, 1, 20))
    padding = torch.full_like(tokens, TokenType.PADDING)
    empty = model(tokens, padding, pixels[:0], labels=tokens, segments=(40,))
    (losses[types != TokenType.PADDING].mean() + 0 * empty.sum()).backward()
    return {"losses": losses.detach(), **replicated_gradients(model)}


def vision(tp: int) -> dict[str, torch.Tensor]:
    """Projected features of two images and of none, and a gradient of the patch embedding."""
    from megatron_evomoe.config import from_mapping
    from megatron_evomoe.model.projector import build_projector
    from megatron_evomoe.model.vision import build_vision_model

    torch.manual_seed(2)
    config = from_mapping({"language": LANGUAGE, "parallel": {"tensor_model_parallel_size": tp}})
    tower, projector = build_vision_model(config), build_projector(config)
    features = projector(tower(torch.randn(2, 3, 32, 32)))
    none = projector(tower(torch.randn(0, 3, 32, 32)))
    (features.pow(2).sum() + none.sum()).backward()
    return {"features": features.detach(), "no features": none.detach(), "conv1": tower.conv1.weight.grad}


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
