"""A GPT of megatron-core's own parts, the baseline for a stage's overhead.

It has the shape of a run's decoder and uses the core's layer specs, data-parallel wrapper, optimizer and
schedule. It has no vision tower, no token types, and a linear router. It trains the parameters that the stage
trains. In `align` these are the projector's, in place of which a learned vector is added to the embeddings:
gradients then flow through all layers, as they do in the stage.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_evomoe.config import RunConfig
from megatron_evomoe.data.conversation import IGNORE_INDEX
from megatron_evomoe.model.build import freeze
from megatron_evomoe.model.inventory import padded_vocab_size
from megatron_evomoe.model.transformer_config import language_transformer_config, resolve_transformer_impl
from megatron_evomoe.parallel import backend
from megatron_evomoe.parallel.broadcast import Step
from megatron_evomoe.train import optimizer as optim


class Offset(torch.nn.Module):
    """Add one learned vector to every position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector = torch.nn.Parameter(torch.zeros(width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.vector


class BareGpt(MegatronModule):
    """A GPT whose parts have `LlavaModel`'s names, because `freeze` selects what trains by name."""

    def __init__(self, config: RunConfig, kind: str) -> None:
        core = _core_config(config, kind)
        super().__init__(config=core)
        lm = config.language
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = lm.tie_word_embeddings
        use_te = resolve_transformer_impl(config) == "transformer_engine"
        self.language_model = GPTModel(
            config=core,
            transformer_layer_spec=get_gpt_decoder_block_spec(core, use_te, normalization=lm.normalization),
            vocab_size=padded_vocab_size(config),
            max_sequence_length=lm.max_position_embeddings,
            share_embeddings_and_output_weights=lm.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_percent=lm.rotary_percent,
            rotary_base=lm.rotary_base,
        )
        self.vision_projection = Offset(lm.hidden_size)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Do nothing. The schedule calls it, but there is only one pipeline stage."""

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss per position, [b, s]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        embedded = self.vision_projection(
            self.language_model.embedding(input_ids=tokens, position_ids=positions)
        )
        return self.language_model(
            tokens, positions, None, decoder_input=embedded, labels=labels.clamp(min=0)
        )


def _core_config(config: RunConfig, kind: str) -> TransformerConfig:
    core = copy.copy(language_transformer_config(config))
    if kind != "route":
        core.num_moe_experts, core.moe_layer_freq = None, 1
    return core


def build(config: RunConfig, kind: str, step: Step) -> Callable[[], float]:
    """Function that takes one optimizer step of a bare model on `step` and returns the loss.

    `config` is resolved for the stage `kind`.
    """
    model = BareGpt(config, kind).to(backend.device(), dtype=torch.bfloat16 if config.train.bf16 else None)
    freeze(model, config, kind, 0)
    wrapped = optim.wrap([model], config)
    optimizer = optim.build_optimizer(wrapped, config)
    scheduler = optim.build_scheduler(optimizer, config)
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.grad_scale_func, model.config.no_sync_func = optimizer.scale_loss, wrapped[0].no_sync
    m = len(step.microbatches)
    b, s = step.microbatches[0].tokens.shape

    def forward_step(batches: Any, chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        micro = step.microbatches[next(batches)]
        supervised = micro.labels != IGNORE_INDEX

        def loss_func(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            loss = (losses.float() * supervised).sum() / supervised.sum()
            return loss, {"loss": loss.detach().clone()}  # clone: the schedule divides the loss in place

        return chunk(micro.tokens, micro.labels), loss_func

    def take_step() -> float:
        wrapped[0].zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(range(m)),
            model=wrapped,
            num_microbatches=m,
            seq_length=s,
            micro_batch_size=b,
            forward_only=False,
        )
        optimizer.step()
        scheduler.step(increment=1)
        return float(torch.stack([r["loss"] for r in reports]).mean())

    return take_step
