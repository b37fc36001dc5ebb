"""Random models of every shape that an export must support, saved as the checkpoints it reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_evomoe.checkpoint.record import Record
from megatron_evomoe.checkpoint.store import Saver
from megatron_evomoe.config import CheckpointConfig, RunConfig, from_mapping
from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.data.tokenizer import build_tokenizer
from megatron_evomoe.model.build import build_modules
from megatron_evomoe.model.llava import LlavaModel
from tests.unit.hf.fresh_process import BATCH, IMAGES, answer_of, pixels

# relative to the largest logit; measured: at most 3e-6, from sums in another order
TOLERANCE = 1e-5
LLAMA: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "make_vocab_size_divisible_by": 16,
    "tie_word_embeddings": False,
    "max_position_embeddings": 256,
}
PHI = {
    "normalization": "LayerNorm",
    "norm_epsilon": 1e-5,
    "add_bias_linear": True,
    "parallel_residual": True,
    "lm_head_bias": True,
    "activation": "gelu_tanh",
    "gated_linear_unit": False,
    "rotary_percent": 0.5,
}
LANGUAGES: dict[str, dict[str, Any]] = {
    "llama": {"norm_epsilon": 1e-5},
    "llama-biased": {"add_bias_linear": True},
    "llama3-rope": {"rope_scaling_type": "llama3", "rope_scaling_factor": 8.0, "rotary_base": 500000},
    "linear-rope": {"rope_scaling_type": "linear", "rope_scaling_factor": 2.0},
    "mistral": {"num_query_groups": 2, "window_size": 6},
    "qwen2": {
        "num_query_groups": 2,
        "rotary_base": 1000000,
        "add_qkv_bias": True,
        "tie_word_embeddings": True,
    },
    "qwen3": {"num_query_groups": 1, "kv_channels": 24, "qk_layernorm": True},
    "stablelm": {
        "normalization": "LayerNorm",
        "norm_epsilon": 1e-5,
        "add_qkv_bias": True,
        "rotary_percent": 0.25,
    },
}
CUSTOM = {**LANGUAGES, "phi": PHI}
VISION_SIZES = {
    "image_size": 32,
    "patch_size": 16,
    "hidden_size": 32,
    "num_layers": 3,
    "num_attention_heads": 2,
    "ffn_hidden_size": 48,
}
MOE = {"moe_layer_freq": [0, 1, 1], "dtr_hidden_size": 3, "dtr_rank": 5, "moe_router_topk": 1}


@dataclass
class Saved:
    """A model in memory, its configuration, and the folder of its checkpoint."""

    model: LlavaModel
    folder: Path
    config: RunConfig


def saved_model(
    folder: Path,
    tokenizer: Path,
    kind: str,
    *,
    language: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    moe: dict[str, Any] | None = None,
    template: str = "v1",
    data: dict[str, Any] | None = None,
) -> Saved:
    """A random model of stage `kind`, with no norm or bias left at 1 or 0, saved as a run saves it."""
    tok = build_tokenizer(tokenizer)
    config = from_mapping(
        {
            "language": {**LLAMA, "vocab_size": tok.vocab_size, **(language or {})},
            "vision": {**VISION_SIZES, **(vision or {})},
            "moe": {**MOE, **(moe or {})},
            "data": {
                "tokenizer": str(tokenizer),
                "conversation_template": template,
                "seq_length": 128,
                **(data or {}),
            },
            "stages": [{"name": kind}],
        }
    )
    model = build_modules(config, kind)[0].eval()
    _randomise(model)
    _move_experts_apart(model)
    record = Record(
        stage=kind,
        kind=kind,
        step=7,
        position=56,
        finished=True,
        layout={"world": 1},
        vocab_size=tok.vocab_size,
        tokenizer_fingerprint=tok.fingerprint(),
        num_experts=4 if kind in ("evolve", "route") else 0,
        lineage=[{"stage": "align", "kind": "align", "step": 3, "path": "gone/align/iter_0000003"}],
    )
    parts = {name: getattr(model, name) for name in ("vision_model", "vision_projection", "language_model")}
    Saver(CheckpointConfig(save=str(folder))).save_weights(folder / kind, parts, record, config.to_yaml())
    return Saved(model, folder / kind, config)


@torch.no_grad()
def _randomise(model: LlavaModel) -> None:
    torch.manual_seed(11)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.3)
        else:
            parameter.copy_(
                torch.randn_like(parameter)
                * (1.0 if ".router." in name else 2.0)
                * parameter.shape[-1] ** -0.5
            )


@torch.no_grad()
def _move_experts_apart(model: LlavaModel) -> None:
    from megatron_evomoe.moe.evolving_mlp import EvolvingMLP

    for layer in (m for m in model.modules() if isinstance(m, EvolvingMLP)):
        layer.begin()
        for _, tensors in layer.local_experts():
            for tensor in tensors.values():
                tensor.add_(torch.randn_like(tensor) * 0.1)


@torch.no_grad()
def core_answer(saved: Saved, image_token: int, stage: str = "") -> dict[str, torch.Tensor]:
    """The answer of megatron-core's model, in the form of `fresh_process.answer_of`.

    It consists of the logits at all positions that are not padding, and the chosen experts. Rows are
    right-padded here and left-padded there, so padding is cut out of both.
    """
    chosen: dict[int, torch.Tensor] = {}
    for module in saved.model.modules():
        if hasattr(module, "observer"):
            module.observer = lambda layer, types, logits, probs, routing: chosen.__setitem__(
                layer, (routing, types)
            )
    tokens, types = _right_padded(image_token)
    images = torch.cat([pixels(i) for i in range(IMAGES)])
    # the pixels are normalised already; the model's own normalisation is compared elsewhere
    saved.model._normalize = lambda given, dtype: given.to(dtype)
    logits = saved.model(tokens, types, images)
    real = types != TokenType.PADDING
    out = {"logits": logits[real][:, : saved.config.language.vocab_size]}
    rows, length = tokens.shape
    for i, layer in enumerate(sorted(chosen)):
        # megatron-core orders tokens by position, then by row
        routing = chosen[layer][0].view(length, rows, -1).transpose(0, 1)
        out[f"experts.{i}"] = routing[real]
    return out


def _right_padded(image_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, BATCH))
    tokens, types = (
        torch.zeros(len(BATCH), longest, dtype=torch.long),
        torch.full((len(BATCH), longest), TokenType.PADDING),
    )
    for i, row in enumerate(BATCH):
        ids = torch.tensor(row)
        tokens[i, : len(row)] = ids.clamp(min=0)
        types[i, : len(row)] = (ids < 0).long() * TokenType.VISION
    return tokens, types


__all__ = ["CUSTOM", "LANGUAGES", "TOLERANCE", "Saved", "answer_of", "core_answer", "saved_model"]
